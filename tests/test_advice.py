"""From ranges and costs to a plan: constraints, the linear program, reasons."""

from __future__ import annotations

import itertools
import time

import models
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import precscope as ps
from precscope.advice import Limits, recommend
from precscope.advice.cost import CostTable, save
from precscope.advice.measurement import measure
from precscope.advice.solve import Problem, solve
from precscope.advice.units import ModelGraph
from precscope.errors import FormatError, UsageError
from precscope.histogram import EXP_LO
from precscope.profiles import Profile
from precscope.recording import record
from precscope.recording.flops import count_flops
from precscope.sites import Role, Site
from precscope.stats import StatsTable
from precscope.store import StatsWriter, write_json


class Net(nn.Module):
    """Three linear layers; `gain` makes the middle one's output large."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.c = nn.Linear(16, 32), nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 4)
        with torch.no_grad():
            self.b.weight.mul_(gain)

    def forward(self, x):
        return self.c(self.norm(self.b(torch.tanh(self.a(x)))))


def recorded(path, model, *, batches=4, scale_loss=1.0, optimizer=None):
    torch.manual_seed(0)
    x = torch.randn(64, 16)
    flops = count_flops(model, lambda: model(x))
    with record(model, path, every=1, optimizer=optimizer) as rec:
        rec.flops = flops
        for _ in range(batches):
            (model(x).pow(2).mean() * scale_loss).backward()
            if optimizer is not None:
                optimizer.step()
            rec.step()
    return Profile.load(path)


def net(gain=1.0):
    torch.manual_seed(0)
    return Net(gain)


def test_healthy_model_goes_low_everywhere(tmp_path):
    plan = recommend(recorded(tmp_path / "run", net()), costs="model")
    assert {plan[n].compute for n in ("a", "b", "norm", "c")} == {"fp16"}
    assert plan.loss_scale["interval"][0] <= np.log2(plan.loss_scale["initial"]) <= plan.loss_scale["interval"][1]
    assert plan.confirmed is None and "predicted" in str(plan)
    assert plan.made_from["low_precision_flops_share"] == 1.0
    assert "plain fp16 autocast is already right" in plan.made_from["says"]


def test_overflowing_layer_is_kept_out_of_fp16_with_numbers(tmp_path):
    plan = recommend(recorded(tmp_path / "run", net(3e5)), formats=("fp16", "fp32"), costs="model")
    assert plan["b"].compute == "fp32"
    assert {plan[n].compute for n in ("a", "c")} == {"fp16"}
    reason = next(r for r in plan["b"].reasons if r.code == "overflow")
    assert "65504" in reason.text and reason.numbers["amax"] > 65504 and reason.site.startswith("b.")
    with_bf16 = recommend(tmp_path / "run", costs="model")
    assert with_bf16["b"].compute == "bf16"


def test_head_room_is_asked_for(tmp_path):
    model = net()
    profile = recorded(tmp_path / "run", model)
    amax = profile.ask("fp16").query("module == 'b' and role == 'output'").amax.iloc[0]
    near = recorded(tmp_path / "near", net(30000 / amax))  # within a binade and a half of the end
    plan = recommend(near, formats=("fp16", "fp32"), costs="model")
    assert plan["b"].compute == "fp32" and "binades below the end of fp16" in plan["b"].reasons[0].text
    assert recommend(near, formats=("fp16", "fp32"), costs="model", limits=Limits(headroom=0))["b"].compute == "fp16"


def test_a_loss_scale_is_found_for_tiny_gradients(tmp_path):
    plan = recommend(recorded(tmp_path / "run", net(), scale_loss=2.0**-30), costs="model")
    assert plan["a"].compute == "fp16"
    assert plan.loss_scale["initial"] >= 2.0**17 and plan.loss_scale["interval"][0] > 0


def test_gradients_that_fit_no_common_scale(tmp_path):
    """One layer's gradients are 2^60 larger than the others': it must leave, the others stay."""

    class Gap(nn.Module):
        def __init__(self):
            super().__init__()
            self.small, self.large = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.small(x), self.large(x)

    torch.manual_seed(0)
    model = Gap()
    x = torch.randn(64, 16)
    flops = count_flops(model, lambda: model(x))
    with record(model, tmp_path / "run", every=1) as rec:
        rec.flops = flops
        a, b = model(x)
        (a.sum() * 2.0**-30 + b.sum() * 2.0**30).backward()
        rec.step()
    plan = recommend(tmp_path / "run", formats=("fp16", "fp32"), costs="model")
    assert sorted(plan[n].compute for n in ("small", "large")) == ["fp16", "fp32"]
    out = next(n for n in ("small", "large") if plan[n].compute == "fp32")
    assert any(r.code == "gradient" and "loss scale" in r.text for r in plan[out].reasons)


def test_nonfinite_values_forbid(tmp_path):
    model = net()
    with record(model, tmp_path / "run", every=1) as rec:
        model(torch.full((4, 16), float("inf")))
        rec.step()
    plan = recommend(tmp_path / "run", costs="model")
    assert plan["a"].compute == "fp32"
    assert any(r.code == "nonfinite" for r in plan["a"].reasons)


def test_cast_policy_keeps_params_fp32_where_updates_are_swallowed(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(
        [{"params": model.a.parameters(), "lr": 1e-7}, {"params": model.c.parameters(), "lr": 1.0}]
    )
    profile = recorded(tmp_path / "run", model, optimizer=optimizer)
    plan = recommend(profile, formats=("bf16", "fp32"), policy="cast", costs="model")
    assert plan["a"].params == "fp32" and plan["c"].params == "bf16"
    assert any(r.code == "swallowed" and "half an ulp" in r.text for r in plan["a"].reasons)
    assert recommend(profile, formats=("bf16", "fp32"), costs="model")["c"].params == "fp32"  # autocast: masters


def test_tied_weights_agree(tmp_path):
    torch.manual_seed(0)
    model = models.Tied()
    x = models.batch(0)[0]
    flops = count_flops(model, lambda: model(x))
    with record(model, tmp_path / "run", every=1) as rec:
        rec.flops = flops
        model(x).pow(2).sum().backward()
        rec.step()
    plan = recommend(tmp_path / "run", costs="model")
    assert plan["emb"].compute == plan["head"].compute


def test_low_precision_that_does_not_pay_is_not_chosen(tmp_path):
    profile = recorded(tmp_path / "run", net())
    rows = [
        {"module": m, "format": f, "time_ms": t, "how": "measured", "cast_ms_per_element": 1e-6}
        for m in ("a", "b", "norm", "c")
        for f, t in (("fp32", 1.0), ("bf16", 0.99), ("fp16", 50.0))
    ]
    save(pd.DataFrame(rows), tmp_path / "run" / "cost.parquet")
    plan = recommend(profile)
    assert {p.compute for p in plan.modules.values()} == {"fp32"}
    assert "bf16 0.99, fp32 1, fp16 50 ms, measured" in plan["a"].reasons[-1].text
    for row in rows:
        if row["format"] == "bf16":
            row["time_ms"] = 0.4
    save(pd.DataFrame(rows), tmp_path / "run" / "cost.parquet")
    assert {p.compute for p in recommend(profile).modules.values()} == {"bf16"}


def test_gains_of_microseconds_are_not_believed(tmp_path):
    profile = recorded(tmp_path / "run", net())
    for scale, expected in ((0.01, "fp32"), (10.0, "bf16")):
        rows = [
            {"module": m, "format": f, "time_ms": scale * t, "how": "measured", "cast_ms_per_element": 1e-9}
            for m in ("a", "b", "norm", "c")
            for f, t in (("fp32", 2.0), ("bf16", 1.0))
        ]
        save(pd.DataFrame(rows), tmp_path / "run" / "cost.parquet")
        plan = recommend(profile, formats=("bf16", "fp32"))
        assert {plan[m].compute for m in ("a", "b", "norm", "c")} == {expected}
    assert "plain bf16 autocast is already right" in plan.made_from["says"]


def test_wrong_arguments(tmp_path):
    profile = recorded(tmp_path / "run", net(), batches=1)
    with pytest.raises(FormatError, match="unknown format 'fp17'"):
        recommend(profile, formats=("fp17",))
    with pytest.raises(UsageError, match="a plan cannot compute in e2m1"):
        recommend(profile, formats=("e2m1", "fp32"))
    with pytest.raises(UsageError, match="policy must be"):
        recommend(profile, policy="half")
    with pytest.raises(UsageError, match="add fp32 to formats"):
        recommend(recorded(tmp_path / "hot", net(3e5), batches=1), formats=("fp16",))
    (tmp_path / "run" / "graph.json").unlink()
    with pytest.raises(UsageError, match="has no graph.json"):
        recommend(tmp_path / "run")


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_the_program_finds_what_exhaustive_search_finds(seed):
    rng = np.random.default_rng(seed)
    units, formats = 4, 3
    cost = rng.uniform(0, 10, (units, formats))
    allowed = rng.random((units, formats)) < 0.8
    allowed[:, 0] = True
    edges = [(a, b, float(rng.uniform(0, 4))) for a, b in itertools.combinations(range(units), 2) if rng.random() < 0.6]
    groups = [[0, 2]] if seed % 2 else []
    best = min(
        sum(cost[u, f] for u, f in enumerate(pick)) + sum(ms for a, b, ms in edges if pick[a] != pick[b])
        for pick in itertools.product(range(formats), repeat=units)
        if all(allowed[u, f] for u, f in enumerate(pick)) and all(pick[a] == pick[b] for a, b in groups)
    )
    found = solve(Problem([f"u{i}" for i in range(units)], ["x", "y", "z"], cost, allowed, edges, groups))
    assert found.time_ms == pytest.approx(best, rel=1e-6)


def test_two_thousand_units_solve_in_seconds():
    rng = np.random.default_rng(0)
    n = 2000
    problem = Problem(
        units=[f"m{i}" for i in range(n)],
        formats=["fp32", "bf16", "fp16"],
        cost=rng.uniform(0.1, 1, (n, 3)),
        allowed=np.concatenate([np.ones((n, 1), bool), rng.random((n, 2)) < 0.9], axis=1),
        edges=[(i, i + 1, 0.05) for i in range(n - 1)],
    )
    start = time.perf_counter()
    solve(problem)
    assert time.perf_counter() - start < 20  # a guard against explosion, no benchmark


def test_costs_are_measured_and_state_is_left_alone():
    torch.manual_seed(0)
    model = models.Convolutional()
    x = models.batch(0, 16)[0]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    from precscope.preservation import preserved

    with preserved(model):
        table = measure(model, lambda: model(x), ("fp32", "bf16", "fp16", "e4m3"))
    assert set(table.format) == {"fp32", "bf16", "fp16"}
    assert {"conv", "bn", "head", "frozen"} <= set(table.module)
    assert (table.time_ms >= 0).all() and (table[table.module == "conv"].time_ms > 0).all()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert torch.equal(rng, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


def test_emulated_formats_gain_nothing_and_say_so(tmp_path):
    profile = recorded(tmp_path / "run", net(), batches=1)
    graph = ModelGraph.of(profile)
    rows = [
        {"module": "a", "format": f, "time_ms": t, "how": "measured", "cast_ms_per_element": 1e-6}
        for f, t in (("fp32", 2.0), ("bf16", 1.0))
    ]
    table = CostTable.of(pd.DataFrame(rows), graph, ("fp32", "bf16", "e4m3"))
    assert table.time_ms["a", "e4m3"] == 2.0 and table.how["a", "e4m3"] == "emulated"
    assert table.how["b", "bf16"] == "model"


# What a review found


def run_of(path, model, step, *, flops=None, optimizer=None):
    """A profile of one recorded call of step(), which does forward and backward."""
    with record(model, path, every=1, optimizer=optimizer) as rec:
        if flops is not None:
            rec.flops = flops
        step()
        if optimizer is not None:
            optimizer.step()
        rec.step()
    return Profile.load(path)


def edit_graph(profile, **changes):
    """The profile with every module of its graph changed."""
    for module in profile.graph["modules"]:
        module.update(changes)
    return profile


def codes(layer):
    return {r.code for r in layer.reasons}


def test_without_flops_owners_of_a_matrix_are_judged_and_the_share_is_unknown(tmp_path):
    model = net()
    with torch.no_grad():
        model.b.weight[0, 0] = 1e6  # hurts no output here: what b takes is tiny
        model.a.weight.mul_(1e-4)
        model.a.bias.mul_(1e-4)
    x = torch.randn(8, 16)
    profile = edit_graph(run_of(tmp_path / "run", model, lambda: model(x).sum().backward()), flops=0)
    plan = recommend(profile, formats=("fp16", "fp32"), costs="model")
    assert any(r.code == "overflow" and ".weight" in r.site for r in plan["b"].reasons)
    assert np.isnan(plan.made_from["low_precision_flops_share"])
    plan.save(tmp_path / "plan.json")
    loaded = ps.PrecisionPlan.load(tmp_path / "plan.json")
    assert np.isnan(loaded.made_from["low_precision_flops_share"]) and "predicted" in str(loaded)


def test_without_flops_a_look_up_is_no_matrix_product_in_fp8(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 16))
    profile = run_of(tmp_path / "run", model, lambda: model(torch.arange(8)).sum().backward())
    plan = recommend(edit_graph(profile, flops=0), formats=("e4m3", "bf16", "fp32"), costs="model")
    assert plan["0"].evidence["forbidden"] == ["e4m3"] and plan["1"].evidence["forbidden"] == []


class OwnCode(nn.Module):
    """What the root does itself leaves fp16, none of its modules does."""

    def __init__(self, factor):
        super().__init__()
        self.fc, self.factor = nn.Linear(16, 16), factor

    def forward(self, x):
        return self.fc(x) * self.factor


@pytest.mark.parametrize(("factor", "code"), [(1e6, "overflow"), (1e-9, "flushed")])
def test_code_of_the_root_is_judged_and_the_plan_really_holds(tmp_path, factor, code):
    torch.manual_seed(0)
    model, x = OwnCode(factor), torch.randn(8, 16)
    flops = count_flops(model, lambda: model(x))
    profile = run_of(tmp_path / "run", model, lambda: model(x).sum().backward(), flops=flops)
    plan = recommend(profile, formats=("fp16", "fp32"), costs="model")
    assert plan[""].compute == plan.default.compute == plan["never.ran"].compute == "fp32"
    assert code in codes(plan[""]) and "parent" in codes(plan["fc"])
    reference = model(x)
    with ps.apply(plan, model):
        assert torch.allclose(model(x), reference, rtol=1e-2)
    assert recommend(profile, formats=("bf16", "fp32"), costs="model").default.compute == "bf16"


def test_a_parent_that_only_hands_on_is_no_reason_against_its_other_modules(tmp_path):
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.out = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.out(x * self.gate(x))

    torch.manual_seed(0)
    model, x = Gate(), torch.randn(8, 16)
    with torch.no_grad():
        model.out.bias.fill_(1e6)
    flops = count_flops(model, lambda: model(x))
    profile = run_of(tmp_path / "run", model, lambda: model(x).sum().backward(), flops=flops)
    plan = recommend(profile, formats=("fp16", "fp32"), costs="model")
    assert plan["out"].compute == plan.default.compute == "fp32" and plan["gate"].compute == "fp16"


def test_default_is_the_formats_of_a_healthy_root(tmp_path):
    plan = recommend(recorded(tmp_path / "run", net()), costs="model")
    assert plan.default.compute == plan[""].compute == "fp16" and "" in plan.modules


@pytest.mark.parametrize("fill", [float("-inf"), -1e9, torch.finfo(torch.float32).min])
def test_attention_masks_forbid_nothing(tmp_path, fill):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x, mask = torch.randn(4, 6, 16), torch.triu(torch.full((6, 6), fill), 1)
    flops = count_flops(model, lambda: model(x, src_mask=mask))
    profile = run_of(tmp_path / "run", model, lambda: model(x, src_mask=mask).sum().backward(), flops=flops)
    assert profile.ask("fp16", by="tensor").query("role == 'input'").eval("amax > 1e4 or nonfinite > 0").any()
    for fmt in ("fp16", "bf16"):
        plan = recommend(profile, formats=(fmt, "fp32"), costs="model")
        assert plan["self_attn"].compute == fmt and not codes(plan["self_attn"]) & {"nonfinite", "overflow"}


@pytest.mark.parametrize(
    ("value", "compute"), [(float("-inf"), "bf16"), (float("inf"), "fp32"), (float("nan"), "fp32")]
)
def test_masked_logits_are_no_overflow_but_nan_and_inf_are(tmp_path, value, compute):
    class Masked(nn.Module):
        def forward(self, x):
            return x.masked_fill(torch.eye(16, dtype=torch.bool), value)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), Masked(), nn.Softmax(-1))
    x = torch.randn(16, 16)
    flops = count_flops(model, lambda: model(x))
    plan = recommend(
        run_of(tmp_path / "run", model, lambda: model(x), flops=flops), formats=("bf16", "fp32"), costs="model"
    )
    assert plan["1"].compute == compute
    assert plan["0"].compute == "bf16"


def test_buffers_are_judged_where_they_are_stored_low_only(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
    model[1].running_var.fill_(1e6)
    model[2].register_buffer("table", torch.full((4, 4), 1e6))
    x = torch.randn(64, 16)
    flops = count_flops(model, lambda: model(x))
    profile = run_of(tmp_path / "run", model, lambda: model(x).sum().backward(), flops=flops)
    for p in profile.graph["parameters"]:
        p["buffer"] = p["name"].rpartition(".")[2] in ("running_var", "running_mean", "table")
    autocast = recommend(profile, formats=("fp16", "fp32"), costs="model")
    assert autocast["1"].compute == autocast["2"].compute == "fp16"
    cast = recommend(profile, formats=("fp16", "fp32"), policy="cast", costs="model")
    assert cast["1"].compute == cast["2"].compute == "fp32" and "overflow" in codes(cast["1"])


def test_no_forward_pass_is_said(tmp_path):
    model = net()
    with record(model, tmp_path / "run"):
        pass
    with pytest.raises(UsageError, match="no forward pass was recorded; run the model inside the with block"):
        recommend(tmp_path / "run")


def test_overflow_of_a_run_in_fp16_does_not_forbid_bf16(tmp_path):
    model, x = net(1e7), torch.randn(8, 16)
    flops = count_flops(model, lambda: model(x))

    def step():
        with torch.autocast("cpu", torch.float16):
            model(x)

    profile = run_of(tmp_path / "run", model, step, flops=flops)
    table = profile.ask("bf16")
    assert (table.query("module == 'b' and role == 'output'").nonfinite > 0).all()
    assert (table.query("module == 'norm' and role == 'output'").nonfinite > 0).all()  # NaN in fp32, further on
    plan = recommend(profile, costs="model")
    assert plan["b"].compute == plan["norm"].compute == "bf16"
    assert any(r.code == "nonfinite" and r.text.startswith("not fp16") for r in plan["b"].reasons)
    doubt = next(r for r in plan["b"].reasons if r.code == "censored")
    assert "beyond 65504 is not known: fp16 had overflowed in the recorded run" in doubt.text
    assert "censored" not in codes(plan["a"])


def times(path, table):
    """cost.parquet of {module: {format: ms}}."""
    rows = [
        {"module": m, "format": f, "time_ms": t, "how": "measured", "cast_ms_per_element": 1e-6}
        for m, by_format in table.items()
        for f, t in by_format.items()
    ]
    save(pd.DataFrame(rows), path / "cost.parquet")


def test_reasons_about_cost_are_true(tmp_path):
    profile = recorded(tmp_path / "run", net())
    usual = {"fp32": 1.0, "bf16": 0.5, "fp16": 0.3}
    times(tmp_path / "run", {"a": usual, "b": usual, "c": usual, "norm": {"fp32": 0.30, "bf16": 0.20, "fp16": 0.32}})
    plan = recommend(profile)
    assert plan["norm"].compute == "fp16"
    assert "one 16-bit format per plan, here fp16: bf16 would save 0.12 ms here" in plan["norm"].reasons[-1].text
    plan = recommend(profile, formats=("fp16", "fp32"))
    assert plan["norm"].compute == "fp16" and "fp32 would save 0.02 ms here, within the noise" in str(
        plan["norm"].reasons[-1]
    )
    assert "fastest allowed" in plan["a"].reasons[-1].text
    times(tmp_path / "run", {m: {"fp32": 1.0, "bf16": 0.97} for m in ("a", "b", "c", "norm")} | {
        "c": {"fp32": 1.0, "bf16": 2.0}})  # fmt: skip
    plain = recommend(profile, formats=("bf16", "fp32"))["a"]
    assert plain.compute == "fp32"
    assert "fp32 throughout: no mix of formats gains 2% over it in all; bf16 would save 0.03 ms" in str(
        plain.reasons[-1]
    )


def test_tied_weights_are_the_reason_where_they_are(tmp_path):
    torch.manual_seed(0)
    model, x = models.Tied(), models.batch(0)[0]
    flops = count_flops(model, lambda: model(x))
    profile = run_of(tmp_path / "run", model, lambda: model(x).pow(2).sum().backward(), flops=flops)
    times(tmp_path / "run", {"emb": {"fp32": 0.5, "fp16": 2.0}, "head": {"fp32": 9.0, "fp16": 1.0}})
    plan = recommend(profile, formats=("fp16", "fp32"))
    assert plan["emb"].compute == "fp16" and "head, whose weights are tied to it" in str(plan["emb"].reasons[-1])


def test_noise_without_flushed_values_has_its_own_code(tmp_path):
    plan = recommend(recorded(tmp_path / "run", net()), formats=("bf16", "fp32"), costs="model",
                     limits=Limits(min_sqnr_db=60))  # fmt: skip
    found = [r for r in plan["b"].reasons if r.code in ("sqnr", "flushed")]
    assert found and {r.code for r in found} == {"sqnr"} and "flushed" not in found[0].text


def test_storage_advice_knows_the_format(tmp_path):
    """Updates of 2^-10 of the weights: fp16 keeps them, bf16 swallows them."""
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Tanh())
    with torch.no_grad():
        model[0].weight.copy_(1 + torch.rand(16, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    class Fixed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            ctx.save_for_backward(w)
            return w.clone()

        @staticmethod
        def backward(ctx, g):
            return ctx.saved_tensors[0] * 2.0**-10.5

    def step():
        model(torch.randn(8, 16))
        Fixed.apply(model[0].weight).sum().backward()

    profile = run_of(tmp_path / "run", model, step, optimizer=optimizer)
    low = recommend(profile, formats=("bf16", "fp32"), policy="cast", costs="model")["0"]
    assert low.compute == low.params == "fp32"  # casting so small a weight at each pass costs what bf16 gains
    assert any(r.code == "swallowed" and "in bf16" in r.text for r in low.reasons)
    times(tmp_path / "run", {"0": {"fp32": 9.0, "bf16": 3.0}})
    fast = recommend(profile, formats=("bf16", "fp32"), policy="cast")["0"]
    assert fast.compute == "bf16" and fast.params == "fp32"
    fine = recommend(profile, formats=("fp16", "fp32"), policy="cast", costs="model")["0"]
    assert fine.compute == fine.params == "fp16" and "swallowed" not in codes(fine)


def test_optimizer_state_that_fp16_flushes_keeps_params_fp32(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    x = torch.randn(64, 16)
    optimizer = torch.optim.Adam(model[0].parameters(), lr=0.1)
    flops = count_flops(model, lambda: model(x))
    profile = run_of(
        tmp_path / "run", model, lambda: (model(x).mean() * 1e-2).backward(), flops=flops, optimizer=optimizer
    )
    plan = recommend(profile, formats=("fp16", "fp32"), policy="cast", costs="model")
    reason = next(r for r in plan["0"].reasons if r.code == "eps")
    assert plan["0"].params == "fp32"
    assert "exp_avg_sq" in reason.text and "eps=1e-08 is itself 0 in fp16" in reason.text
    assert plan["2"].params == "fp16" and not codes(plan["2"]) & {"state", "eps", "swallowed"}  # never updated
    bf16 = recommend(profile, formats=("bf16", "fp32"), policy="cast", costs="model")
    assert not codes(bf16["0"]) & {"state", "eps"}


def test_loss_scale_minds_the_gradient_that_a_matrix_product_makes(tmp_path):
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.b(self.a(x) * 2.0**-12)

    torch.manual_seed(0)
    model, x = Narrow(), torch.randn(8, 16)
    with torch.no_grad():
        model.b.weight.mul_(100)
    flops = count_flops(model, lambda: model(x))
    profile = run_of(tmp_path / "run", model, lambda: model(x).sum().backward(), flops=flops)
    table = profile.ask("fp16").set_index(["module", "role"]).amax
    assert table["b", "grad_input"] * 65536 > 65504 > table["b", "grad_output"] * 2**15
    for policy in ("autocast", "cast"):
        plan = recommend(profile, formats=("fp16", "fp32"), policy=policy, costs="model")
        assert plan["b"].compute == "fp16"
        assert plan.loss_scale["initial"] * table["b", "grad_input"] < 65504
        assert "b.grad_input" in plan.loss_scale["hi_site"]


def test_loss_scale_is_that_of_the_units_in_fp16(tmp_path):
    """c binds the scale, and leaves fp16 for its cost: its gradients then bind nothing."""
    profile = recorded(tmp_path / "run", net())
    before = recommend(profile, formats=("fp16", "fp32"), costs="model").loss_scale
    assert before["hi_site"].startswith("c.")
    usual, slow = {"fp32": 1.0, "fp16": 0.3}, {"fp32": 0.1, "fp16": 5.0}
    times(tmp_path / "run", {"a": usual, "b": usual, "norm": usual, "c": slow})
    plan = recommend(profile, formats=("fp16", "fp32"))
    assert plan["c"].compute == "fp32" and plan["b"].compute == "fp16"
    assert not any(plan.loss_scale[k].startswith("c.") for k in ("lo_site", "hi_site"))


def test_loss_scale_without_a_gradient_names_no_site(tmp_path):
    model, x = net(), torch.randn(8, 16)
    flops = count_flops(model, lambda: model(x))
    profile = run_of(tmp_path / "run", model, lambda: (model(x).sum() * 0).backward(), flops=flops)
    scale = recommend(profile, formats=("fp16", "fp32"), costs="model").loss_scale
    assert scale["initial"] == 2.0**16 and not {"lo_site", "hi_site"} & set(scale)


def graph_json(modules, edges=(), parameters=()):
    module = {"type": "M", "parent": None, "params": 0, "own_params": 0, "calls": 1, "elements": 8, "flops": 0}
    return {
        "schema": 1,
        "modules": [module | {"name": m, "leaf": bool(m)} for m in modules],
        "parameters": list(parameters),
        "edges": [{"producer": a, "consumer": b, "elements": n} for a, b, n in edges],
    }


def test_a_tensor_into_a_container_is_cast_once():
    edges = [("s", "b", 8), ("s", "b.ln", 8), ("b.ln", "b", 8), ("s", "c", 8), ("c", "b", 4), ("c", "b.ln", 8)]
    graph = ModelGraph.from_json(graph_json(["", "s", "b", "b.ln", "c"], edges))
    assert [(e.producer, e.consumer) for e in graph.edges] == [
        ("s", "b.ln"), ("b.ln", "b"), ("s", "c"), ("c", "b"), ("c", "b.ln"),
    ]  # fmt: skip


def test_two_thousand_modules_are_recommended_in_seconds(tmp_path):
    n, rng = 2000, np.random.default_rng(0)
    names = [f"blocks.{i // 8}.m{i % 8}" for i in range(n)]
    roles = (Role.INPUT, Role.OUTPUT, Role.WEIGHT, Role.GRAD_INPUT, Role.GRAD_OUTPUT, Role.GRAD_WEIGHT)
    sites = [Site(m, r, 0, "weight" if "weight" in r else "") for m in names for r in roles]
    table = StatsTable.empty(len(sites))
    exponent = rng.integers(-6, 4, len(sites))
    exponent[:: 6 * 20] = 127  # the input of every twentieth leaves no head-room in any 16-bit format
    for offset in range(8):
        table.counts[np.arange(len(sites)), exponent - offset - EXP_LO] = 100
    table.amax, table.amin_nonzero = 1.5 * 2.0**exponent, 2.0 ** (exponent - 7)
    table.sumsq = 200.0 * 4.0**exponent
    table.source[:] = "fp32"
    path = tmp_path / "run"
    path.mkdir()
    StatsWriter(path).write(np.zeros(len(sites), np.int64), sites, table, np.ones(len(sites)), {})
    graph = graph_json(
        ["", *names],
        [(a, b, 1 << 16) for a, b in itertools.pairwise(names)],
        [{"name": f"{m}.weight", "shape": [8, 8], "dtype": "float32", "requires_grad": True, "owners": [m]}
         for m in names],
    )  # fmt: skip
    for module in graph["modules"]:
        module["flops"], module["elements"] = (10**9 if module["name"] else 0), 1 << 16
    write_json(path / "graph.json", graph)
    write_json(path / "run.json", {"schema": 1})
    profile = Profile.load(path)
    start = time.perf_counter()
    plan = recommend(profile, costs="model")
    seconds = time.perf_counter() - start
    print(f"recommend of {n} modules: {seconds:.2f} s")
    assert len(plan.modules) == n + 1 and {p.compute for p in plan.modules.values()} == {"fp16", "fp32"}
    assert seconds < 30  # a guard against explosion, no benchmark
