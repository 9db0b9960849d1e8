"""quantize: against its scalar twin, and what surrounds the arithmetic (chance, gradients, layout, errors, devices)."""

from __future__ import annotations

import itertools
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from precscope import rounding as rounding_module
from precscope.errors import FormatError, UsageError
from precscope.formats import FloatFormat, format_names, get_format
from precscope.reference import quantize_scalar
from precscope.rounding import quantize

PIECE = rounding_module._PIECE
PIECE_AND_A_BIT = PIECE + 77  # larger than what the torch operations work through at once


@pytest.fixture(params=["compiled", "torch operations"])
def each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test with both of the forms in which quantize is written."""
    if request.param == "torch operations":
        monkeypatch.setattr(rounding_module, "_compiled", lambda: None)
    else:
        assert rounding_module._compiled() is not None, "numba is part of the installation"


def bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same dtype, shape and values, signs of zeros included; NaN equals NaN."""
    same = (a == b) & (torch.signbit(a) == torch.signbit(b)) | (a.isnan() & b.isnan())
    return a.dtype == b.dtype and a.shape == b.shape and bool(same.all())


# --- the scalar twin --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "fmt", "want"),
    [
        (2049.0, "fp16", 2048.0),  # tie to even
        (2051.0, "fp16", 2052.0),
        (65519.99, "fp16", 65504.0),
        (65520.0, "fp16", math.inf),
        (-65520.0, "fp16", -math.inf),
        (2.0**-25, "fp16", 0.0),
        (2.0**-25 * 1.001, "fp16", 2.0**-24),
        (-(2.0**-26), "fp16", -0.0),
        (464.0, "e4m3", 448.0),
        (464.1, "e4m3", math.nan),
        (math.inf, "e4m3", math.nan),
        (-math.inf, "e5m2", -math.inf),
        (1e9, "e2m1", 6.0),
        (-math.inf, "e3m2", -28.0),
        (-1e-30, "e4m3fnuz", 0.0),
        (-0.0, "e5m2fnuz", 0.0),
        (-0.0, "e2m3", -0.0),
        (math.nan, "e2m1", math.nan),
    ],
)
def test_known_values(x: float, fmt: str, want: float) -> None:
    for got in (quantize_scalar(x, fmt), quantize(torch.tensor(x, dtype=torch.float64), fmt).item()):
        assert got == want or (math.isnan(got) and math.isnan(want))
        assert math.copysign(1, got) == math.copysign(1, want) or math.isnan(want)


def test_saturation_toward_zero_and_scale_by_hand() -> None:
    assert quantize_scalar(1e6, "fp16", saturate=True) == 65504.0
    assert quantize_scalar(-math.inf, "fp16", saturate=True) == -65504.0
    assert quantize_scalar(1e6, "fp16", rounding="toward_zero") == 65504.0
    assert quantize_scalar(math.inf, "fp16", rounding="toward_zero") == math.inf
    assert quantize_scalar(1.999, "e2m1", rounding="toward_zero") == 1.5
    assert quantize_scalar(2.0**-30, "fp16", scale_exponent=8) == 2.0**-30  # flushed without the scale
    assert quantize_scalar(2.0**-30, "fp16") == 0.0
    assert quantize_scalar(300.0, "fp16", scale_exponent=8) == math.inf


FLOATS = st.one_of(st.floats(), st.floats(width=32), st.floats(width=16), st.floats(-500, 500))


@settings(max_examples=600, deadline=None)
@given(
    x=FLOATS,
    fmt=st.sampled_from(format_names()),
    rounding=st.sampled_from(["nearest_even", "toward_zero"]),
    saturate=st.booleans(),
    scale_exponent=st.one_of(st.just(0), st.integers(-20, 20), st.integers(-512, 512)),
)
@example(x=5e-324, fmt="fp64", rounding="nearest_even", saturate=False, scale_exponent=-1)
@example(x=1.7e308, fmt="fp64", rounding="toward_zero", saturate=False, scale_exponent=3)
@example(x=math.inf, fmt="e4m3", rounding="nearest_even", saturate=False, scale_exponent=-512)
def test_tensors_round_as_the_scalar_twin(
    x: float, fmt: str, rounding: str, saturate: bool, scale_exponent: int
) -> None:
    options = {"rounding": rounding, "saturate": saturate, "scale_exponent": scale_exponent}
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        held = torch.tensor(x, dtype=torch.float64).to(dtype)
        want = torch.tensor(quantize_scalar(held.item(), fmt, **options), dtype=torch.float64).to(dtype)
        got = quantize(held, fmt, **options)
        assert bits_equal(got, want), (dtype, held.item(), got.item(), want.item())


@settings(max_examples=200, deadline=None)
@given(x=FLOATS, fmt=st.sampled_from(format_names()), scale_exponent=st.integers(-20, 20))
def test_rounding_is_idempotent_odd_and_between_toward_zero_and_away(x: float, fmt: str, scale_exponent: int) -> None:
    def rounded(v: float, **options) -> float:
        return quantize_scalar(v, fmt, scale_exponent=scale_exponent, **options)

    once = rounded(x)
    if not math.isnan(once):
        assert rounded(once) == once
        assert rounded(-x) == -once
        assert abs(rounded(x, rounding="toward_zero")) <= abs(x)


class Replay:
    """Hands out given numbers, one at a time."""

    def __init__(self, draws: list[float]) -> None:
        self.draws = iter(draws)

    def random(self) -> float:
        return next(self.draws)


@pytest.mark.parametrize("fmt", format_names())
@pytest.mark.parametrize("saturate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_stochastic_rounding_equals_the_twin_draw_by_draw(fmt: str, saturate: bool, dtype: torch.dtype) -> None:
    """Both compare the same uniform number with the same distance: equal results, not only equal chances."""
    rng = np.random.default_rng(7)
    info = get_format(fmt)
    top = min(info.max, 1e30)
    exponents = rng.uniform(math.log2(info.smallest_subnormal) - 3 if info.emin > -200 else -200, math.log2(top), 1500)
    magnitudes = np.concatenate([2.0**exponents, rng.uniform(0.9 * top, 1.2 * top, 200), [0.0, np.inf, np.nan]])
    x = torch.from_numpy(np.concatenate([magnitudes, -magnitudes])).to(dtype)
    draws = torch.rand(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    got = quantize(x, fmt, rounding="stochastic", saturate=saturate, generator=torch.Generator().manual_seed(3))
    pairs = zip(x.tolist(), draws.tolist(), strict=True)
    want = [quantize_scalar(v, fmt, rounding="stochastic", saturate=saturate, random=Replay([u])) for v, u in pairs]
    assert bits_equal(got, torch.tensor(want, dtype=torch.float64).to(dtype))


# --- stochastic rounding ----------------------------------------------------------------------------------------

CHANCES = [
    ("fp16", 1 + 0.3 * 2.0**-10, 1.0, 1 + 2.0**-10, 0.3),
    ("bf16", -(1 + 2.0**-7 / 16), -1.0, -(1 + 2.0**-7), 1 / 16),
    ("fp16", 0.25 * 2.0**-24, 0.0, 2.0**-24, 0.25),  # below the smallest subnormal: nearest even always flushes it
    ("fp16", -5.75 * 2.0**-24, -5 * 2.0**-24, -6 * 2.0**-24, 0.75),
    ("e4m3", 17.0, 16.0, 18.0, 0.5),
    ("e5m2", 1.2, 1.0, 1.25, 0.8),
    ("e2m1", 3.25, 3.0, 4.0, 0.25),
    ("e4m3fnuz", 0.1 * 2.0**-10, 0.0, 2.0**-10, 0.1),
    ("fp16", 65504.0 + 8, 65504.0, math.inf, 0.25),
]


@pytest.mark.parametrize(("fmt", "x", "below", "above", "chance"), CHANCES)
def test_stochastic_takes_the_two_neighbours_with_the_right_chances(
    fmt: str, x: float, below: float, above: float, chance: float
) -> None:
    n = 2**17
    got = quantize(
        torch.full((n,), x, dtype=torch.float64),
        fmt,
        rounding="stochastic",
        generator=torch.Generator().manual_seed(11),
    )
    up = (got == above).sum().item()
    assert up + (got == below).sum().item() == n
    assert abs(up - n * chance) < 5 * math.sqrt(n * chance * (1 - chance))


def test_stochastic_is_unbiased_over_all_binades_of_fp16_and_e4m3() -> None:
    """Sum of errors in ulps: each has mean 0 and variance f(1-f) <= 1/4."""
    n = 2**18
    generator = torch.Generator().manual_seed(5)
    for fmt in ("fp16", "e4m3"):
        info = get_format(fmt)
        exponent = torch.rand(n, generator=generator) * (info.emax - info.emin + info.precision + 1)
        x = torch.exp2(exponent + (info.emin - info.precision - 1)).clamp_(max=info.max)
        ulp = torch.exp2((torch.frexp(x).exponent - 1).clamp(min=info.emin).double() - info.precision)
        error = (quantize(x, fmt, rounding="stochastic", generator=generator).double() - x.double()) / ulp
        assert error.abs().max() < 1
        assert abs(error.sum().item()) < 5 * math.sqrt(n / 4)


def test_stochastic_overflow_beyond_the_largest_value() -> None:
    n = 2**14
    between = torch.full((n,), 464.0)  # midway from 448 to 480, which e4m3 does not have
    generator = torch.Generator().manual_seed(2)
    got = quantize(between, "e4m3", rounding="stochastic", generator=generator)
    overflowed = got.isnan().sum().item()
    assert overflowed + (got == 448).sum().item() == n
    assert abs(overflowed - n / 2) < 5 * math.sqrt(n / 4)
    assert (quantize(between, "e4m3", rounding="stochastic", saturate=True) == 448).all()
    assert quantize(torch.tensor(480.0), "e4m3", rounding="stochastic").isnan()
    assert (quantize(torch.full((n,), 6.5), "e2m1", rounding="stochastic") == 6).all()


def test_the_seed_decides_the_stochastic_result() -> None:
    x = torch.randn(PIECE_AND_A_BIT, generator=torch.Generator().manual_seed(0))

    def draw(seed: int) -> torch.Tensor:
        return quantize(x, "bf16", rounding="stochastic", generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    torch.manual_seed(9)
    first = quantize(x, "bf16", rounding="stochastic")
    second = quantize(x, "bf16", rounding="stochastic")
    torch.manual_seed(9)
    assert torch.equal(quantize(x, "bf16", rounding="stochastic"), first)
    assert not torch.equal(first, second)


def test_deterministic_rounding_draws_nothing() -> None:
    state = torch.random.get_rng_state()
    quantize(torch.ones(5), "e4m3")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_twin_draws_from_the_source_given() -> None:
    values = [quantize_scalar(1.1, "e2m1", rounding="stochastic", random=random.Random(s)) for s in range(50)]
    again = [quantize_scalar(1.1, "e2m1", rounding="stochastic", random=random.Random(s)) for s in range(50)]
    assert values == again
    assert set(values) == {1.0, 1.5}


# --- tensors of every kind --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("fmt", ["fp16", "bf16", "e4m3", "tf32"])
@pytest.mark.parametrize("side", [8, 100, 800], ids=str)
def test_shapes_and_strides(fmt: str, side: int) -> None:
    assert side < 200 or side**2 > PIECE
    x = torch.randn(side, side, generator=torch.Generator().manual_seed(1)) * 300
    want = quantize(x.clone(), fmt)
    assert bits_equal(quantize(x.t(), fmt), want.t())
    assert bits_equal(quantize(x[:, ::3], fmt), want[:, ::3])
    assert bits_equal(quantize(x[:, None, 2].expand(side, side), fmt), want[:, None, 2].expand(side, side))
    assert bits_equal(quantize(x.flip(0).reshape(-1), fmt), want.flip(0).reshape(-1))
    assert quantize(x.t(), fmt).stride() == x.t().stride()


@pytest.mark.usefixtures("each_way")
def test_channels_last_stays_channels_last() -> None:
    for side in (4, 64, 260):
        assert side < 100 or 16 * side**2 > PIECE
        x = torch.randn(2, 8, side, side).contiguous(memory_format=torch.channels_last)
        y = quantize(x, "e5m2")
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert bits_equal(y, quantize(x.contiguous(), "e5m2"))


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fmt", ["fp16", "e4m3"])
def test_empty_and_scalar_tensors_of_every_dtype(fmt: str, dtype: torch.dtype) -> None:
    empty = quantize(torch.empty(0, 3, dtype=dtype), fmt)
    assert empty.shape == (0, 3)
    assert empty.dtype == dtype
    scalar = quantize(torch.tensor(1.06, dtype=dtype), fmt)
    assert scalar.shape == ()
    assert scalar.dtype == dtype
    assert scalar.item() == quantize_scalar(torch.tensor(1.06, dtype=dtype).item(), fmt)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("fmt", format_names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_input_is_neither_changed_nor_shared(fmt: str, dtype: torch.dtype) -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(1)).to(dtype) * 1000
    before = x.clone()
    y = quantize(x, fmt)
    y.zero_()
    assert torch.equal(x, before)


def test_the_number_of_threads_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(10_007, generator=torch.Generator().manual_seed(1)) * 100
    alone = quantize(x, "e4m3")
    monkeypatch.setattr(rounding_module, "_PER_THREAD", 1000)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            assert bits_equal(quantize(x, "e4m3"), alone)
    finally:
        torch.set_num_threads(before)


def test_without_numba_torch_operations_do_the_work() -> None:
    """In a process of its own, in which numba cannot be imported."""
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "import torch; from precscope.rounding import quantize, _compiled\n"
        "assert _compiled() is None\n"
        "assert (quantize(torch.full((5000,), 1.06), 'e4m3') == 1).all()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.usefixtures("each_way")
def test_overflow_in_one_piece_only() -> None:
    """The search for overflow, piece by piece, misses neither the first nor the last value."""
    x = torch.ones(2 * PIECE_AND_A_BIT)
    for position in (0, PIECE - 1, PIECE, x.numel() - 1):
        for value, fmt, want in ((-1e6, "e5m2", -math.inf), (1e6, "e4m3", math.nan), (math.nan, "e5m2", math.nan)):
            one = x.clone()
            one[position] = value
            got = quantize(one, fmt)
            assert bits_equal(got[position], torch.tensor(want))
            assert (got == 1).sum() == x.numel() - 1


def test_torch_dtypes_and_own_formats_are_formats() -> None:
    x = torch.tensor([1.1, 70000.0])
    assert quantize(x, torch.float16).tolist() == quantize(x, "half").tolist()
    own = FloatFormat("fp16", 8, 2, -6, 7, 224.0, has_inf=True)  # the name of another: its numbers count
    assert quantize(torch.tensor([1.1, 1.2, 239.0, 240.0]), own).tolist() == [1.0, 1.25, 224.0, math.inf]


@pytest.mark.parametrize(("dtype", "scale_exponent"), [(torch.float16, -9), (torch.bfloat16, -120)], ids=str)
def test_a_value_beyond_the_container_is_its_inf(dtype: torch.dtype, scale_exponent: int) -> None:
    """e4m3 with this scale reaches beyond the container, whose largest value rounds to the next power of two."""
    largest = torch.tensor(torch.finfo(dtype).max, dtype=dtype)
    assert quantize(largest, "e4m3", scale_exponent=scale_exponent) == math.inf
    assert quantize(largest, "e4m3", scale_exponent=scale_exponent, rounding="toward_zero") < largest
    assert quantize(-torch.full_like(largest, math.inf), "e4m3", scale_exponent=scale_exponent).isnan()
    assert quantize(torch.tensor(65504.0, dtype=torch.float16), "bf16").isinf()


def test_values_that_double_rounding_would_get_wrong() -> None:
    """Just above a tie of fp16, by less than a float32 ulp: through float32 it would become the tie, and go down."""
    x = torch.tensor(2049 * (1 + 2.0**-40), dtype=torch.float64)
    assert quantize(x, "fp16").item() == 2050
    assert quantize(-x, "fp16").item() == -2050


# --- gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"saturate": True}, {"rounding": "stochastic"}], ids=str)
@pytest.mark.parametrize("fmt", ["fp16", "e4m3"])
def test_straight_through_passes_the_gradient_unchanged(fmt: str, options: dict) -> None:
    x = torch.tensor([[0.1, 1e6], [-3.3, 1e-30]], requires_grad=True)
    torch.manual_seed(0)
    y = quantize(x, fmt, straight_through=True, **options)
    torch.manual_seed(0)
    assert bits_equal(y.detach(), quantize(x.detach(), fmt, **options))
    weight = torch.tensor([[1.7, -2.0], [0.3, 1e-9]])
    (gradient,) = torch.autograd.grad(y, x, grad_outputs=weight)
    assert torch.equal(gradient, weight)


def test_straight_through_result_can_be_changed_in_place_and_differentiated_twice() -> None:
    x = torch.tensor([1.06, 2.2], requires_grad=True)
    y = quantize(x, "e4m3", straight_through=True)
    y.mul_(3)
    first = torch.autograd.grad((y**2).sum(), x, create_graph=True)[0]
    assert torch.equal(first, 6 * 3 * quantize(x.detach(), "e4m3"))
    assert torch.equal(torch.autograd.grad(first.sum(), x)[0], torch.full((2,), 18.0))


def test_without_straight_through_the_result_leaves_the_graph() -> None:
    x = torch.ones(3, requires_grad=True)
    assert not quantize(x, "fp16").requires_grad
    assert not quantize(torch.nn.Parameter(torch.ones(3)), "e4m3").requires_grad


# --- wrong use --------------------------------------------------------------------------------------------------


def test_unknown_format() -> None:
    for call in (lambda: quantize(torch.ones(1), "fp17"), lambda: quantize_scalar(1.0, "fp17")):
        with pytest.raises(FormatError, match=r"unknown format 'fp17' \(did you mean .*fp16"):
            call()


@pytest.mark.parametrize("rounding", ["up", "Nearest_Even", None, ["nearest_even"]])
def test_unknown_rounding(rounding: object) -> None:
    for call in (
        lambda: quantize(torch.ones(1), "fp16", rounding=rounding),
        lambda: quantize_scalar(1.0, "fp16", rounding=rounding),
    ):
        with pytest.raises(UsageError, match=r"rounding was .*one of 'nearest_even', 'stochastic', 'toward_zero'"):
            call()


@pytest.mark.parametrize("scale_exponent", [0.5, 8.0, "8", None, 513, -1000])
def test_wrong_scale(scale_exponent: object) -> None:
    for call in (
        lambda: quantize(torch.ones(1), "fp16", scale_exponent=scale_exponent),
        lambda: quantize_scalar(1.0, "fp16", scale_exponent=scale_exponent),
    ):
        with pytest.raises(UsageError, match=r"scale_exponent was .* integer between -512 and 512"):
            call()
    assert quantize(torch.ones(1), "fp16", scale_exponent=np.int64(3)).item() == 1


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(2, dtype=torch.int64),
        torch.ones(2, dtype=torch.complex64),
        torch.ones(2, dtype=torch.bool),
        torch.ones(2).to(torch.float8_e4m3fn),
    ],
    ids=lambda x: str(x.dtype),
)
def test_wrong_dtype(x: torch.Tensor) -> None:
    with pytest.raises(UsageError, match=rf"tensor of {x.dtype}.*takes dense tensors of torch.float64, torch.float32"):
        quantize(x, "fp16")


def test_wrong_kinds_of_tensor() -> None:
    with pytest.raises(UsageError, match=r"given a list; it takes a torch tensor"):
        quantize([1.0], "fp16")
    with pytest.raises(UsageError, match=r"layout torch.sparse_coo.*\.to_dense\(\)"):
        quantize(torch.eye(2).to_sparse(), "fp16")


def test_a_format_that_float64_cannot_round_to_is_refused() -> None:
    deep = FloatFormat("deep", 40, 20, -1022, 1023, 1e300, has_inf=True)
    assert quantize(torch.tensor(1.0, dtype=torch.float64), deep).item() == 1.0
    with pytest.raises(UsageError, match=r"deep scaled by 2\^3 reaches beyond float64.*nearer to 0"):
        quantize(torch.tensor(1.0), deep, scale_exponent=3)


def test_generator_on_another_device() -> None:
    with pytest.raises(
        UsageError, match=r"generator is on cpu, x on meta; make it with torch.Generator\(device='meta'\)"
    ):
        quantize(torch.ones(2, device="meta"), "fp16", rounding="stochastic", generator=torch.Generator())


# --- devices, tracing and compilation ---------------------------------------------------------------------------


def test_meta_and_fake_tensors_keep_shape_and_dtype() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    y = quantize(torch.empty(3, 4, device="meta", dtype=torch.bfloat16), "e4m3")
    assert (y.shape, y.dtype, y.device.type) == ((3, 4), torch.bfloat16, "meta")
    with FakeTensorMode():
        for n in (5, PIECE_AND_A_BIT):
            assert quantize(torch.empty(n), "e4m3").shape == (n,)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("fmt", ["fp16", "bf16", "tf32", "e4m3", "e4m3fnuz"])
def test_compiled_equals_eager(fmt: str) -> None:
    """torch.compile drops float32 -> float16 -> float32; quantize must round all the same."""
    torch._dynamo.reset()
    x = torch.cat([torch.randn(1000) * 100, torch.tensor([0.0, -0.0, -1e-30, 1e9, math.inf, math.nan])])
    compiled = torch.compile(lambda v: quantize(v, fmt, straight_through=True) * 1, fullgraph=True)
    assert bits_equal(compiled(x), quantize(x, fmt))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fmt", format_names())
def test_cuda_equals_cpu(fmt: str) -> None:
    rng = np.random.default_rng(1)
    spread = torch.from_numpy(rng.integers(0, 2**32, 2**20, dtype=np.uint32).view(np.int32)).view(torch.float32)
    dense = torch.randn(2**18) * 2.0 ** torch.randint(-30, 20, (2**18,))
    values = torch.cat([spread, dense, torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])])
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        x = values.to(dtype)
        for rounding, saturate, k in itertools.product(("nearest_even", "toward_zero"), (False, True), (0, 7, -140)):
            options = {"rounding": rounding, "saturate": saturate, "scale_exponent": k}
            assert bits_equal(quantize(x.cuda(), fmt, **options).cpu(), quantize(x, fmt, **options)), (dtype, options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_stochastic_is_seeded_and_takes_the_two_neighbours() -> None:
    x = torch.full((2**20,), 1.2, device="cuda")
    first, second = (
        quantize(x, "e5m2", rounding="stochastic", generator=torch.Generator(device="cuda").manual_seed(4))
        for _ in range(2)
    )
    assert torch.equal(first, second)
    up = (first == 1.25).sum().item()
    assert up + (first == 1.0).sum().item() == x.numel()
    chance = (np.float32(1.2).item() - 1) / 0.25
    assert abs(up - x.numel() * chance) < 5 * math.sqrt(x.numel() * chance * (1 - chance))
