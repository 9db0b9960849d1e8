"""Op-level recording: what modules hide, bit-identity, every kind of tensor, and the files."""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import ALL, MLP, Checkpointed, batch, loss_of
from torch import nn

from precscope import summarize
from precscope.emulation import emulate
from precscope.errors import ModelError, RunDirectoryError, UsageError
from precscope.opstore import OpSite, load_ops, read_ops
from precscope.recording import record
from precscope.recording.ops import record_ops
from precscope.tracing import trace


class Attention(nn.Module):
    """Attention written out, with a mask and index arithmetic."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.gain = gain

    def forward(self, x):
        q, k, v = self.qkv(x * self.gain).chunk(3, -1)
        logits = torch.matmul(q, k.transpose(-2, -1))
        mask = torch.full(logits.shape[-2:], -1e9).triu(1)
        positions = torch.arange(x.shape[1], dtype=torch.float32) * 1000
        weights = torch.exp(torch.log_softmax(logits + mask, -1))
        self.seen = logits.detach(), positions
        return self.proj(weights @ v) * (1 + 0 * positions.sum())


class Graph(nn.Module):
    """Scatter, index_add, sums of squares."""

    def forward(self, x, index):
        hubs = torch.zeros(3, x.shape[1]).index_add(0, index, x)
        pooled = torch.zeros(3, x.shape[1]).scatter_add(0, index[:, None].expand_as(x), x)
        return (hubs - pooled + x.pow(2).sum()) * 1.0


def rows(ops) -> dict[tuple[str, str, str, int], int]:
    sites, _ = ops.table()
    return {(s.module, s.phase, s.op, s.index): i for i, s in enumerate(sites)}


def test_what_a_module_hides_is_seen():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Attention(gain=900.0))
    with record_ops(model) as ops:
        model(torch.randn(2, 5, 8)).sum().backward()
    found, (sites, table) = rows(ops), ops.table()
    logits, positions = model[1].seen
    at = found["1", "forward", "bmm", 0]
    assert table.amax[at] == logits.abs().max().item()
    assert np.array_equal(table.counts[at], summarize(logits).counts)
    assert table.amax[found["1", "forward", "full", 0]] == 1e9
    assert table.amax[found["1", "forward", "mul", 1]] == positions.max().item()  # x * gain is the first
    assert table.amax[found["1", "forward", "exp", 0]] <= 1
    assert table.amax[found["1", "forward", "bmm", 1]] > 0
    assert found.keys() >= {("1", "backward", "bmm", i) for i in range(4)}
    assert found.keys() >= {("1.proj", "forward", "addmm", 0), ("1.qkv", "backward", "mm", 0)}
    answer = ops.ask("fp16").set_index(["module", "phase", "op", "index"])
    assert answer.loc["1", "forward", "full", 0].overflow_lo > 0.3
    assert answer.loc["1", "forward", "bmm", 0].overflow_hi > 0
    assert answer.loc["1", "forward", "exp", 0].overflow_hi == 0
    assert list(answer.columns) == [
        "dtype", "count", "amax", "amin_nonzero", "input_amax", "zeros", "nonfinite", "overflow_lo", "overflow_hi",
        "flushed", "subnormal", "sqnr_db",
    ]  # fmt: skip
    assert not {s.op for s in sites} & {"view", "transpose", "detach", "clone", "t", "split", "expand", "empty"}


def test_scatter_and_sums_of_squares():
    model = Graph()
    x, index = torch.full((3000, 2), 0.5), torch.zeros(3000, dtype=torch.long)
    with record_ops(model) as ops:
        model(x, index)
    found, (_, table) = rows(ops), ops.table()
    for op in ("index_add", "scatter_add"):
        assert table.amax[found["", "forward", op, 0]] == 1500
    assert table.amax[found["", "forward", "sum", 0]] == 1500.0
    assert table.amax[found["", "forward", "pow", 0]] == 0.25


def test_statistics_are_those_of_the_tensor_itself():
    torch.manual_seed(0)
    model, x = nn.Linear(8, 8), torch.randn(4, 8)
    with record_ops(model) as ops:
        y = model(x)
        y.backward(torch.full_like(y, 2.0**-20))
    found, (sites, table) = rows(ops), ops.table()
    row = found["", "forward", "addmm", 0]
    assert table.row(row) == summarize(y)
    weight = table.row(found["", "backward", "mm", 0])
    expected = summarize(model.weight.grad.t())
    assert np.array_equal(weight.counts, expected.counts) and weight.amax == expected.amax
    assert sites[row] == OpSite("", "forward", "addmm", 0, "fp32")
    assert str(sites[row]) == "(root): addmm (forward, fp32)"


@pytest.mark.parametrize("name", ALL)
def test_recording_changes_no_bit(name):
    results = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = ALL[name]()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for step in range(3):
            optimizer.zero_grad()
            if watched:
                with record_ops(model) as ops:
                    loss = loss_of(model, batch(step))
                    loss.backward()
                    optimizer.step()
                sites, table = ops.table()
                assert len(sites) == len(table) > 5 and {s.phase for s in sites} == {"forward", "backward"}
                assert (table.count > 0).all()
            else:
                loss = loss_of(model, batch(step))
                loss.backward()
                optimizer.step()
            losses.append(loss.detach())
        results.append([*losses, torch.get_rng_state(), *model.state_dict().values()])
    assert all(map(torch.equal, *results))


def test_the_optimizer_is_left_out():
    model = MLP()
    optimizer = torch.optim.AdamW(model.parameters())
    with record_ops(model) as ops:
        loss_of(model, batch(0)).backward()
        before = len(ops.table()[0])
        optimizer.step()
    assert len(ops.table()[0]) == before
    assert not any(o.startswith(("addcdiv", "lerp", "_foreach")) for _, _, o, _ in rows(ops))


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_is_not_counted_twice(reentrant):
    torch.manual_seed(0)
    model = Checkpointed(reentrant=reentrant)
    with record_ops(model) as ops:
        loss_of(model, batch(0)).backward()
    found, (_, table) = rows(ops), ops.table()
    forward = [key for key in found if key[0].startswith("body") and key[1] == "forward"]
    assert sorted(forward) == [
        ("body.act", "forward", "gelu", 0), ("body.fc1", "forward", "addmm", 0), ("body.fc2", "forward", "addmm", 0)
    ]  # fmt: skip
    assert all(table.count[found[key]] == 6 * width for key, width in zip(sorted(forward), (16, 16, 8), strict=True))
    assert ("body.fc1", "backward", "mm", 0) in found


def test_calls_and_passes_of_a_module_share_rows_and_keep_indices():
    model = ALL["shared"]()
    with record_ops(model) as ops:
        for step in range(2):
            loss_of(model, batch(step)).backward()
    found, (_, table) = rows(ops), ops.table()
    assert table.count[found["layer", "forward", "addmm", 0]] == 2 * 3 * 6 * 8
    assert ("layer", "forward", "addmm", 1) not in found
    assert {i for m, p, o, i in found if (m, p, o) == ("", "forward", "tanh")} == {0, 1, 2}


def test_the_loss_scale_is_divided_out_of_gradients():
    answers = []
    for scale in (1.0, 2.0**12, 3.0):
        torch.manual_seed(0)
        model = MLP()
        with record_ops(model, loss_scale=torch.tensor(scale) if scale > 1 else None) as ops:
            (loss_of(model, batch(0)) * scale).backward()
        found, (_, table) = rows(ops), ops.table()
        sites = ("fc2", "backward", "mm"), ("act", "backward", "gelu_backward"), ("fc1", "forward", "addmm")
        answers.append([table.row(found[*site, 0]) for site in sites])
    for plain, scaled, odd in zip(*answers, strict=True):
        assert np.array_equal(plain.counts, scaled.counts) and plain.amax == scaled.amax
        assert odd.amax == pytest.approx(plain.amax, rel=1e-5)
    with record_ops(model, loss_scale=math.inf) as ops:
        model(torch.randn(2, 8))
    with pytest.raises(UsageError, match="loss_scale must be finite"):
        ops.table()


def test_input_ranges_come_from_the_ops_before():
    model = nn.Module()
    model.forward = lambda x: torch.exp((x * 2).view(-1)[:].reshape(2, 2).t())
    nn.Module.__call__(model, torch.ones(2, 2))
    with record_ops(model) as ops:
        model(torch.tensor([[1.0, 2.0], [3.0, -4.0]]))
    answer = ops.ask("fp16").set_index("op")
    assert answer.loc["exp"].input_amax == 8
    assert math.isnan(answer.loc["mul"].input_amax)


def test_a_tensor_written_in_place_is_reduced_again():
    model = nn.Module()
    model.forward = lambda x: ((y := x * 2).add_(100), y.exp())[1]
    with record_ops(model) as ops:
        model(torch.ones(3))
    answer = ops.ask("fp16").set_index("op")
    assert answer.loc["add_"].amax == 102 and answer.loc["mul"].amax == 2
    assert answer.loc["exp"].input_amax == 102


def test_every_kind_of_tensor():
    class Odd(nn.Module):
        def forward(self, x):
            integer = (x * 10).long().cumsum(0) + 1
            power = torch.fft.fft(x).abs() * (integer > 3)
            sparse = torch.sparse_coo_tensor(torch.tensor([[0, 1]]), x[:2] * 3, (8,), check_invariants=True) * 4
            best = (x * 5).max(0).values
            parts = torch.split(x + 1, 4)
            assert (x[:0] * 2).numel() == 0
            assert (torch.ones(3, device="meta") * 2).is_meta
            double, half = x.double() * 2, x.half() + 1
            with torch.no_grad():
                quiet = x * 7
            with torch.inference_mode():
                loud = torch.ones(3) * 70
            several = (power, best, parts[0], quiet, loud, sparse, double, half)
            return sum(x.sum() for x in several)

    model = Odd()
    with record_ops(model) as ops:
        model(torch.arange(1.0, 9.0))
    sites, table = ops.table()
    assert {s.dtype for s in sites} == {"fp64", "fp32", "fp16"}
    amax = {(s.op, s.index, s.dtype): a for s, a in zip(sites, table.amax, strict=True)}
    assert amax["abs", 0, "fp32"] == pytest.approx(36)
    assert amax["max", 0, "fp32"] == 40
    assert {70, 56, 24} <= set(table.amax)  # inference mode, no_grad and sparse
    assert not any("cumsum" in s.op or "gt" in s.op or "fft" in s.op for s in sites)


def test_sparse_gradients():
    model = ALL["sparse"]()
    with record_ops(model) as ops:
        loss_of(model, batch(0)).backward()
    assert model.emb.weight.grad.is_sparse
    assert any(m == "emb" and p == "backward" for m, p, _, _ in rows(ops))


def test_ops_outside_every_module():
    model = MLP()
    with record_ops(model) as ops:
        loss = loss_of(model, batch(0))
        (loss * 1e6).backward()
    found, (_, table) = rows(ops), ops.table()
    assert {"_log_softmax", "nll_loss_forward", "mul"} <= {o for m, p, o, _ in found if m == "" and p == "forward"}
    assert table.amax[found["", "forward", "mul", 0]] == pytest.approx(1e6 * loss.item())


def test_an_exception_leaves_nothing_and_keeps_what_was_seen():
    model, x = MLP(), torch.randn(2, 8)
    with pytest.raises(ZeroDivisionError):
        with record_ops(model) as ops:
            model(x)
            raise ZeroDivisionError
    assert len(ops.table()[0]) == 3
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ModelError, match="expected a torch.nn.Module"):
        record_ops(torch.exp)


def test_recording_an_emulated_run_sees_the_rounded_numbers():
    model = nn.Module()
    model.forward = lambda x: x * x
    with emulate(model, "fp16"), record_ops(model) as ops:
        model(torch.tensor([300.0, 1.0]))
    _, table = ops.table()
    assert table.pos_inf.tolist() == [1] and table.amax.tolist() == [1.0]


# files


def recorded(seed: int = 0):
    torch.manual_seed(seed)
    model = MLP()
    with record_ops(model, loss_scale=4.0) as ops:
        (loss_of(model, batch(seed)) * 4).backward()
    return ops


def test_parts_are_read_as_they_were_written(tmp_path):
    first, second = recorded(0), recorded(1)
    assert first.write(tmp_path, step=10).name == "ops-000000.parquet"
    assert second.write(tmp_path, step=20).name == "ops-000001.parquet"
    sites, table = read_ops(tmp_path)
    (own, a), (_, b) = first.table(), second.table()
    assert sites == own
    assert np.array_equal(table.counts, a.counts + b.counts)
    assert np.array_equal(table.amax, np.maximum(a.amax, b.amax))
    assert np.array_equal(table.source_exponent, a.source_exponent) and table.source_exponent.min() == -2
    everything = load_ops(tmp_path)
    assert everything.steps.tolist() == [10] * len(own) + [20] * len(own)
    assert set(everything.loss_scale) == {1.0, 4.0}
    assert everything.ask("e5m2").equals(everything.merged().ask("e5m2"))
    assert [p.name for p in tmp_path.iterdir() if "tmp" in p.name] == []


def test_no_parts_is_no_rows(tmp_path):
    sites, table = read_ops(tmp_path)
    assert sites == [] and len(table) == 0 and len(load_ops(tmp_path).ask("fp16")) == 0


def test_damaged_parts_say_so(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = recorded().write(tmp_path)
    whole = path.read_bytes()
    (tmp_path / "ops-000001.parquet").write_bytes(whole[:500])
    with pytest.raises(RunDirectoryError, match=r"ops-000001\.parquet cannot be read .* skip_damaged=True"):
        read_ops(tmp_path)
    assert len(read_ops(tmp_path, skip_damaged=True)[0]) > 5
    pq.write_table(pa.table({"a": [1]}), tmp_path / "ops-000001.parquet")
    with pytest.raises(RunDirectoryError, match="was not written by precscope"):
        read_ops(tmp_path)
    newer = pq.read_table(path).replace_schema_metadata({"precscope.schema": "2", "precscope.kind": "ops"})
    pq.write_table(newer, tmp_path / "ops-000001.parquet")
    with pytest.raises(RunDirectoryError, match="has schema 2, this precscope reads up to 1: upgrade"):
        read_ops(tmp_path)
    lacking = pq.read_table(path).drop_columns(["hist"])
    pq.write_table(lacking, tmp_path / "ops-000001.parquet")
    with pytest.raises(RunDirectoryError, match="lacks the columns hist"):
        read_ops(tmp_path)
    with pytest.raises(RunDirectoryError, match="cannot write"):
        recorded().write(tmp_path / "absent")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_nothing_waits():
    model = MLP().cuda()
    data, labels = (t.cuda() for t in batch(0))
    for _ in range(2):  # kernels are compiled at first
        with record_ops(model) as ops:
            F.cross_entropy(model(data), labels).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with record_ops(model) as ops:
            F.cross_entropy(model(data), labels).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found, (_, table) = rows(ops), ops.table()
    assert table.amax[found["fc1", "forward", "addmm", 0]] == model.fc1(data).abs().max().item()
    assert ("fc1", "backward", "mm", 0) in found


def test_a_recorder_is_entered_once_at_a_time():
    model, x = nn.Linear(4, 4), torch.ones(1, 4)
    ops = record_ops(model)
    with ops, pytest.raises(UsageError, match=r"entered already: call record_ops\(model\) again"):
        ops.__enter__()
    with ops:
        model(x)
    assert [s.op for s in ops.table()[0]] == ["addmm"] and not model._forward_hooks


def test_what_a_module_recorder_computes_is_not_recorded(tmp_path):
    """Nor traced: samples, copies and shadow steps of a recorder run beside the run."""

    def train(recorder, watch):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        x = torch.randn(4, 8)
        with record(model, tmp_path / watch.__name__, optimizer=optimizer, every=1) if recorder else nullcontext() as r:
            with watch(model) as seen:
                for _ in range(2):
                    optimizer.zero_grad()
                    loss = model(x).sum()
                    loss.backward()
                    if r is not None:
                        r.shadow(lambda: model(x).sum(), loss=loss)
                    optimizer.step()
                    if r is not None:
                        r.step()
        return seen

    plain, beside = train(False, record_ops).table(), train(True, record_ops).table()
    assert plain[0] == beside[0] and (plain[1].count == beside[1].count).all()
    assert train(True, trace).ops < 2 * train(False, trace).ops  # views of what the hooks look at


def test_a_higher_order_operator_is_one_op():
    attention = pytest.importorskip("torch.nn.attention.flex_attention")

    class Flex(nn.Module):
        def forward(self, q):
            return attention.flex_attention(q, q, q)

    model, q = Flex(), torch.randn(1, 1, 4, 8)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # it would rather be compiled
        expected = model(q)
        with record_ops(model) as ops, trace(model) as t:
            assert torch.equal(model(q), expected)
        with emulate(model, "bf16"):
            assert torch.equal(model(q).bfloat16().float(), model(q))
    assert any("flex_attention" in s.op for s in ops.table()[0]) and t.first_nonfinite is None
