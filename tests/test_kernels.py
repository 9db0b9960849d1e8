"""The kernels against an independent count by frexp, against each other, and under the conditions of a training run."""

from __future__ import annotations

import math
import multiprocessing
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from precscope import kernels
from precscope.errors import UsageError
from precscope.histogram import BINS, EXP_LO, swallowed_share
from precscope.kernels import SlotBuffer, backend_for, openmp, summarize
from precscope.stats import TensorStats

pytest.importorskip("numba")

BACKENDS = ("torch", "numba")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
CODES = st.integers(-(2**15), 2**15 - 1)  # of the 16-bit formats
EXACT = ("zeros", "pos_inf", "neg_inf", "nan", "amax", "amin_nonzero")


def expected(x: torch.Tensor) -> dict[str, object]:
    """The statistics of x by math.frexp's exponents and math.fsum, no bits involved."""
    values = x.detach().to("cpu").to(torch.float64).numpy().ravel()
    finite = values[np.isfinite(values)]
    nonzero = finite[finite != 0]
    column = np.clip(np.frexp(nonzero)[1] - 1 - EXP_LO, 0, BINS - 1)
    with np.errstate(over="ignore", under="ignore"):
        squares = finite**2
    return {
        "counts": np.bincount(column, minlength=BINS),
        "zeros": int((values == 0).sum()),
        "pos_inf": int((values == np.inf).sum()),
        "neg_inf": int((values == -np.inf).sum()),
        "nan": int(np.isnan(values).sum()),
        "amax": np.abs(nonzero).max(initial=0.0),
        "amin_nonzero": np.abs(nonzero).min(initial=np.inf),
        "sum": math.fsum(finite),
        "sumsq": math.fsum(squares) if np.isfinite(squares).all() else np.inf,
        "size": np.abs(finite).sum(),
    }


def check(stats: TensorStats, x: torch.Tensor, sums: float = 1e-12) -> None:
    """sums: relative error allowed to sumsq, and to sum, of the sum of magnitudes."""
    truth = expected(x)
    np.testing.assert_array_equal(stats.counts, truth["counts"])
    for name in EXACT:
        assert getattr(stats, name) == truth[name], name
    assert stats.count == x.numel()
    assert stats.sum == pytest.approx(truth["sum"], rel=sums, abs=sums / 10 * truth["size"])
    assert stats.sumsq == pytest.approx(truth["sumsq"], rel=sums)


def awkward(dtype: torch.dtype, n: int = 10_007) -> torch.Tensor:
    """All binades of fp32, its subnormals, zeros of both signs, infinities, NaN, and neighbours of powers of two."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, generator=generator, dtype=torch.float64)
    x *= torch.exp2(torch.randint(-149, 126, (n,), generator=generator).double())
    if dtype in (torch.float16, torch.float64):  # their own range
        x = x.sign() * x.abs() ** (0.12 if dtype == torch.float16 else 5)
    x[::11] = 0.0
    x[::13] = -0.0
    x[3], x[5000], x[5001] = math.inf, -math.inf, math.nan
    powers = torch.exp2(torch.arange(-14, 15).double())
    info = torch.finfo(dtype)
    x[100 : 100 + len(powers)] = powers
    x[200 : 200 + len(powers)] = powers * (1 - info.eps / 2)  # log2 rounds these up
    x[300], x[301], x[302] = info.max, info.tiny, info.smallest_normal * info.eps
    return x.to(dtype)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_are_exact(backend, name):
    x = awkward(DTYPES[name])
    stats = summarize(x, backend=backend)
    check(stats, x)
    assert stats.source == name and stats.source_exponent == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_code_of_the_16_bit_formats(dtype, backend):
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    check(summarize(codes, backend=backend), codes)
    for code in (1, -1, 0x03FF, 0x0400, 0x7BFF, 0x7C00, -0x0400, 0x7C01):  # one at a time: no other value covers for it
        one = torch.tensor([code], dtype=torch.int16).view(dtype)
        check(summarize(one, backend=backend), one)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
)
def test_every_code_of_the_8_bit_formats(dtype, backend):
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    stats = summarize(codes, backend=backend)
    check(stats, codes.float())
    assert stats.source == {"torch.float8_e4m3fn": "e4m3", "torch.float8_e5m2": "e5m2"}.get(
        str(dtype), str(dtype).removeprefix("torch.float8_")
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32), max_size=40), st.sampled_from(BACKENDS))
def test_any_floats(values, backend):
    x = torch.tensor(values, dtype=torch.float32)
    check(summarize(x, backend=backend), x)


@settings(max_examples=40, deadline=None)
@given(st.lists(CODES, max_size=20), st.lists(CODES, max_size=20), st.sampled_from(BACKENDS))
def test_parts_add_up_to_the_whole(a, b, backend):
    x, y = (torch.tensor(codes, dtype=torch.int16).view(torch.float16) for codes in (a, b))
    merged = summarize(x, backend=backend) + summarize(y, backend=backend)
    check(merged, torch.cat([x, y]))


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 4095, 4096, 4097, 32768, 65535, 65536, 98304, 100_003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sizes_around_blocks_and_chunks(n, dtype):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
    check(summarize(x, backend="numba"), x)
    if n > 4:
        x[n // 2] = math.inf
        x[-1] = 2.0**-130
        check(summarize(x, backend="numba"), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_whose_binades_wander_spread_and_vanish(dtype):
    """The CPU counts pairs of values in a window of 31 binades, which moves with the blocks."""
    generator = torch.Generator().manual_seed(5)
    low, high = (-14, 15) if dtype == torch.float16 else (-126, 127)
    blocks = []
    for i in range(24):
        width = (0, 1, 15, 29, 30, 31, 60)[i % 7]
        first = int(torch.randint(low, high - min(width, high - low) + 1, (1,), generator=generator))
        exponents = torch.randint(first, min(first + width, high) + 1, (4096,), generator=generator)
        x = (1 + torch.rand(4096, generator=generator) * 0.9).double() * torch.exp2(exponents.double())
        x[torch.rand(4096, generator=generator) < 0.1 * (i % 3)] = 0.0
        x[0], x[-1] = 2.0**first, 2.0 ** min(first + width, high)  # the very ends of the window
        blocks.append(x * torch.randn(4096, generator=generator).sign())
    blocks += [torch.zeros(4096), torch.full((4096,), -1.0), blocks[0][:1000]]
    x = torch.cat([b.double() for b in blocks]).to(dtype)
    check(summarize(x, backend="numba"), x)
    for special in (math.inf, math.nan, 2.0**-149 if dtype != torch.float16 else 2.0**-24):
        x[5 * 4096 + 17] = special
        check(summarize(x, backend="numba"), x)
    buffer = SlotBuffer("cpu", 1, backend="numba")
    buffer.accumulate(0, x, multiplier=2.0**-20)
    check(buffer.read().row(0), x.double() * 2.0**-20)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_and_strides(backend):
    base = torch.randn(6, 8, 10, 4, generator=torch.Generator().manual_seed(0))
    views = {
        "scalar": torch.tensor(-3.0),
        "empty": torch.empty(0, 3),
        "transposed": base.transpose(0, 2),
        "channels last": base.to(memory_format=torch.channels_last),
        "sliced": base[:, 1:3, ::2],
        "offset": base[2],
        "narrow columns": base[..., :2],
        "expanded": base[:1].expand(5, 8, 10, 4),
        "overlapping": base.view(-1).as_strided((10, 10), (1, 1)),
        "flipped": base.flip(0),
        "imaginary part of a conjugate": torch.randn(7, dtype=torch.complex64).conj().imag,
        "with gradient": base.clone().requires_grad_() * 2,
        "inside a module": torch.nn.Parameter(base.clone()),
    }
    for name, x in views.items():
        try:
            check(summarize(x, backend=backend), x)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def test_permuted_dense_tensors_are_not_copied(monkeypatch):
    x = torch.randn(64, 32, 8).permute(2, 0, 1)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda *a, **k: pytest.fail("copied"))
    check(summarize(x, backend="numba"), x)


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_result_does_not_depend_on_the_number_of_threads(dtype):
    before = torch.get_num_threads()
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(summarize(x, backend="numba"))
        assert results[0] == results[1] == results[2]  # sums bit for bit
        check(results[0], x)
    finally:
        torch.set_num_threads(before)


def test_denormals_are_zero_mode_changes_no_count():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no denormals-are-zero mode")
    try:
        halves = torch.arange(0, 2048, dtype=torch.int16).view(torch.float16)
        tiny = torch.arange(0, 2048, dtype=torch.int32).view(torch.float32)
        found = [summarize(x, backend="numba") for x in (halves, tiny)]
    finally:
        torch.set_flush_denormal(False)
    check(found[0], halves)
    assert (found[1].counts == expected(tiny)["counts"]).all()
    assert (found[1].amin_nonzero, found[1].zeros) == (2.0**-149, 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_multiplier_is_exact_for_powers_of_two(backend):
    x = awkward(torch.float16)
    buffer = SlotBuffer("cpu", 2, backend=backend)
    buffer.accumulate(1, x, multiplier=2.0**-16)
    row = buffer.read().row(1)
    check(row, x.double() * 2.0**-16)
    assert (row.source, row.source_exponent) == ("fp16", -16)
    buffer.accumulate(1, x, multiplier=1.0)
    assert buffer.read().source_exponent[1] == -16


@pytest.mark.parametrize("backend", BACKENDS)
def test_multiplier_that_is_no_power_of_two(backend):
    x = torch.randn(100)
    buffer = SlotBuffer("cpu", 1, backend=backend)
    buffer.accumulate(0, x, multiplier=1 / 3)
    check(buffer.read().row(0), x.double() * (1 / 3))
    assert buffer.read().source[0] == "mixed"
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UsageError, match="multiplier must be finite and above 0"):
            buffer.accumulate(0, x, multiplier=bad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_add_up_and_keep_apart(backend):
    a, b = torch.randn(5000), torch.randn(70_000) * 1e-3
    buffer = SlotBuffer("cpu", 2, backend=backend)
    buffer.accumulate(0, a)
    buffer.accumulate(0, b)
    buffer.accumulate(1, b)
    table = buffer.read()
    check(table.row(0), torch.cat([a, b]))
    check(table.row(1), b)
    buffer.grow(5)
    assert buffer.capacity == 5 and len(buffer.read(3)) == 3
    buffer.accumulate(4, a.bfloat16())
    check(buffer.read().row(4), a.bfloat16())
    assert buffer.read().source.tolist() == ["fp32", "fp32", "none", "none", "bf16"]
    check(table.row(1), b)  # what was read is a copy
    buffer.accumulate(4, a)
    assert buffer.read().source[4] == "mixed"
    buffer.clear()
    assert buffer.capacity == 5
    assert all(buffer.read().row(i) == TensorStats.empty() for i in range(5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DTYPES)
def test_updates_and_their_ratios(backend, name):
    generator = torch.Generator().manual_seed(2)
    n = 70_001
    before = torch.randn(n, generator=generator).to(DTYPES[name])
    after = before + (torch.randn(n, generator=generator) * 1e-2).to(DTYPES[name]) * before
    before[:50], after[25:75] = 0, 0
    after[100], before[101], after[102] = math.nan, math.inf, -math.inf
    before[200:300] = 2.0**-24  # subnormal in fp16
    after[200:210] = 0.0
    if name == "fp32":
        before[300:310], after[300:310] = 2.0**-140, 2.0**-142
    buffer = SlotBuffer("cpu", 2, backend=backend)
    buffer.accumulate_update(0, 1, before, after)
    table = buffer.read()
    wide = torch.float64 if name == "fp64" else torch.float32
    step = after.to(wide) - before.to(wide)
    check(table.row(0), step)

    w, dw = before.double().numpy(), step.double().numpy()
    good = np.isfinite(w) & np.isfinite(dw)
    moved = good & (w != 0) & (dw != 0)
    difference = np.frexp(dw[moved])[1].astype(int) - np.frexp(w[moved])[1]
    ratio = table.row(1)
    truth = np.bincount(np.clip(difference - EXP_LO, 0, BINS - 1), minlength=BINS)
    np.testing.assert_array_equal(ratio.counts, truth)
    assert ratio.nan == (~good).sum() and ratio.zeros == (good & (dw == 0)).sum()
    assert ratio.pos_inf == (good & (w == 0) & (dw != 0)).sum() and ratio.neg_inf == 0
    assert ratio.count == n


@pytest.mark.parametrize("backend", BACKENDS)
def test_updates_of_any_layout(backend):
    before = torch.randn(8, 16, 4, 4)
    after = before + 1e-3 * torch.randn_like(before)
    layouts = [
        (before.transpose(0, 1), after.transpose(0, 1)),
        (before.to(memory_format=torch.channels_last), after),
        (before[:, ::2], after[:, ::2]),
        (torch.empty(0), torch.empty(0)),
        (before.bfloat16(), after),
        (before[:1].expand(8, 16, 4, 4), after),
    ]
    for old, new in layouts:
        buffer = SlotBuffer("cpu", 2, backend=backend)
        buffer.accumulate_update(0, 1, old, new)
        check(buffer.read().row(0), new.float() - old.float())
        assert buffer.read().row(1).count == old.numel()
    with pytest.raises(UsageError, match=r"an update needs equal shapes, got \(2,\) before and \(3,\) after"):
        SlotBuffer("cpu", 2, backend=backend).accumulate_update(0, 1, torch.ones(2), torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rate", [1e-2, 1e-4])
def test_swallowed_bounds_from_an_update_contain_what_storing_it_swallows(dtype, rate):
    generator = torch.Generator().manual_seed(4)
    w = torch.randn(1 << 15, generator=generator).to(dtype).float()
    dw = torch.randn(1 << 15, generator=generator) * rate
    buffer = SlotBuffer("cpu", 2)
    buffer.accumulate_update(0, 1, w, w + dw)
    ratio = buffer.read().row(1)
    precision = {torch.bfloat16: 7, torch.float16: 10}[dtype]
    lo, hi = swallowed_share(ratio.counts, precision, unchanged=ratio.zeros, from_zero=ratio.pos_inf)
    swallowed = (((w + dw).to(dtype).float() == w) & (w + dw != w)).double().mean().item()
    assert lo <= swallowed <= hi and hi - lo < 0.6


@pytest.mark.parametrize("backend", BACKENDS)
def test_sparse_tensors_count_their_implicit_zeros(backend):
    dense = torch.zeros(10, 6)
    dense[2, 3], dense[5] = -7.0, 1.5
    check(summarize(dense.to_sparse(), backend=backend), dense)
    twice = torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.tensor([1.0, 2.0]), (4,), check_invariants=True)
    check(summarize(twice, backend=backend), torch.tensor([0.0, 3.0, 0.0, 0.0]))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(UsageError, match=f"floating-point tensor of 8 to 64 bits, got {dtype}: convert it first"):
        summarize(torch.ones(3).to(dtype))
    with pytest.raises(UsageError, match="floating-point tensor"):
        SlotBuffer("cpu").accumulate_update(0, 1, torch.ones(3).to(dtype), torch.ones(3).to(dtype))


def test_wrong_use_is_said():
    with pytest.raises(UsageError, match=r"takes a torch.Tensor, got list: wrap it in torch.as_tensor"):
        summarize([1.0])
    with pytest.raises(UsageError, match="device meta has no values"):
        summarize(torch.ones(3, device="meta"))
    with pytest.raises(UsageError, match="this buffer is on cpu, the tensor on meta: use a buffer per device"):
        SlotBuffer("cpu").accumulate(0, torch.ones(3, device="meta"))
    with pytest.raises(UsageError, match="unknown backend 'cuda': it is auto, torch, numba, triton"):
        summarize(torch.ones(3), backend="cuda")


def test_numba_is_the_choice_on_the_cpu():
    assert backend_for("cpu") == "numba"
    assert backend_for("xla") == "torch"


@pytest.mark.parametrize(
    ("prelude", "environment", "reason"),
    [
        ("import sys; sys.modules['numba'] = None", {}, "numba cannot be used"),
        ("", {"NUMBA_DISABLE_JIT": "1"}, "numba cannot be used: NUMBA_DISABLE_JIT is set"),
        (
            "import numba.core.caching as c; c.FunctionCache._impl_class._locator_classes = []"
            "; c.CompileResultCacheImpl._locator_classes = []",
            {},
            "numba cannot be used: cannot cache function",
        ),
    ],
)
def test_without_numba_torch_takes_over_and_says_so(prelude, environment, reason):
    code = f"""{prelude}
import torch
from precscope.kernels import backend_for, summarize
assert backend_for("cpu").startswith("torch ({reason}"), backend_for("cpu")
assert summarize(torch.tensor([1.0, 0.0])).zeros == 1
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, **environment})


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_reducing_a_contiguous_tensor_runs_no_torch_operation():
    buffer = SlotBuffer("cpu", 1, backend="numba")
    x = torch.randn(100, requires_grad=True)
    with _Operations() as mode:
        buffer.accumulate(0, x)
    assert not mode.seen
    assert x.grad_fn is None and buffer.read().count[0] == 100


@pytest.fixture
def two_threads():
    """torch, and so the kernels, on two threads, whatever the environment says."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_large_tensors_use_the_threads_of_torch(two_threads, monkeypatch):
    if openmp.threads() == 1:
        pytest.skip("torch brings no OpenMP library that can be reached here")
    counts = []
    launch = openmp.run
    monkeypatch.setattr(openmp, "run", lambda *args: (counts.append(args[2]), launch(*args)))
    summarize(torch.ones(60_000), backend="numba")
    assert not counts
    summarize(torch.ones(1 << 18), backend="numba")
    assert counts == [2]


def test_two_threads_use_two_slots(two_threads):
    x = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
    buffer = SlotBuffer("cpu", 2, backend="numba")

    def work(slot: int) -> None:
        for _ in range(20):
            buffer.accumulate(slot, x)

    workers = [threading.Thread(target=work, args=(slot,)) for slot in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    once = expected(x)
    for slot in range(2):
        np.testing.assert_array_equal(buffer.read().counts[slot], 20 * once["counts"])


def _in_child(pipe, x) -> None:
    pipe.send(summarize(x, backend="numba").counts.tolist())
    pipe.close()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_can_reduce_what_its_parent_reduced_on_several_threads(two_threads):
    x = torch.randn(1 << 19, generator=torch.Generator().manual_seed(0))
    parent = summarize(x, backend="numba")
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_in_child, args=(send, x), daemon=True)
    child.start()
    assert receive.poll(60), "the child hangs"
    assert receive.recv() == parent.counts.tolist()
    child.join(60)
    assert child.exitcode == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", DTYPES)
def test_gpu_agrees_and_does_not_wait(backend, name):
    if backend == "triton":
        pytest.importorskip("triton")
    x = awkward(DTYPES[name], 1_000_003).cuda()
    buffer = SlotBuffer("cuda", 4, backend=backend)
    buffer.accumulate(3, x)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        buffer.accumulate(0, x)
        buffer.accumulate(2, x, multiplier=2.0**-16)
        buffer.accumulate_update(1, 3, x, x * 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    table = buffer.read()
    sums = 2.0**-18 if backend == "triton" else 1e-12  # triton.py promises 2^-21; a tenth of this is allowed to sum
    check(table.row(0), x, sums)
    check(table.row(2), x.double() * 2.0**-16, sums)
    assert backend_for("cuda") in ("triton", "torch") or kernels.backend_for("cuda").startswith("torch (triton")
