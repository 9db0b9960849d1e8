"""Bit-exact rounding of tensors to any binary floating-point format, on any device.

The idea. Rounding to p significand bits is rounding to an integer once the value is divided by its own binade 2^e and
multiplied by 2^p; where e lies below the smallest normal binade of the format, that binade is used instead, and
subnormals need no case of their own. 2^e is the value's bit pattern with sign and significand masked off, so no
logarithm is taken. Every step but the rounding multiplies or divides by a power of two and is exact, save where a value
so far below the smallest subnormal that it counts as 0 anyway underflows.

Scale. Rounding with scale 2^k is rounding to a format whose exponents all lie k lower, so nothing is multiplied by the
scale and nothing can overflow on the way.

Speed. fp16 and bf16 in their plain form are torch's own casts, with two exceptions: from float64 (torch casts float64
to float16 through float32 and so rounds twice) and under torch.compile (which removes such pairs of casts). The rest is
written down twice. Compiled by numba it is one pass over the values: on the CPU, for nearest_even and toward_zero where
float32 is wide enough. As torch operations, each of them a pass, it runs everywhere; torch.compile fuses them, and on
the CPU they work through pieces that stay in cache. (In pieces they are as fast as the compiled form, but only while
nobody else wants the cores: threads wait for one another after each operation.)

The rules for NaN, inf, overflow, -0 and the three roundings are those of `reference`, the scalar twin.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from .errors import UsageError
from .formats import FloatFormat, get_format
from .reference import check_rounding, check_scale_exponent

_CONTAINERS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_CASTS = {get_format("fp16"): torch.float16, get_format("bf16"): torch.bfloat16}
_PIECE = 2**19  # elements: a few float32 buffers of that size stay in cache
_COMPILED_FROM = 2**12  # elements: below, calling compiled code and calling torch operations takes equally long
_PER_THREAD = 2**20  # elements that make a thread worth its start


def quantize(
    x: Tensor,
    fmt: str | FloatFormat,
    *,
    rounding: str = "nearest_even",
    saturate: bool = False,
    scale_exponent: int = 0,
    generator: torch.Generator | None = None,
    straight_through: bool = False,
) -> Tensor:
    """What each value of `x` becomes when it is stored in `fmt` with scale 2^`scale_exponent`: the value times 2^k,
    rounded to a value of `fmt`, times 2^-k. A new tensor with the shape, dtype and device of `x`.

    x: float64, float32, float16 or bfloat16, of any shape and stride, on any device.
    rounding: "nearest_even", "stochastic" (unbiased; exact to 2^-53 in probability) or "toward_zero".
    saturate: overflow, inf included, gives the largest finite value; otherwise inf, or NaN where the format has no inf,
        or still the largest finite value where it has neither (e3m2, e2m3, e2m1).
    generator: where "stochastic" draws from, on the device of x. The same seed, shape and layout give the same result.
    straight_through: the gradient passes unchanged. Otherwise the result is cut off from the graph.

    The result is exact, and x's dtype holds it, save at the top of its range: float16 65504 rounded to bf16 is 65536,
    which float16 can only store as inf. NaN stays NaN for every format.

    Raises FormatError for an unknown format; UsageError for another dtype, rounding, scale or device of the generator.
    """
    _check_tensor(x)
    if generator is not None and generator.device.type != x.device.type:
        raise UsageError(
            f"generator is on {generator.device.type}, x on {x.device.type}; "
            f"make it with torch.Generator(device={x.device.type!r})"
        )
    rounder = _rounder(get_format(fmt), check_rounding(rounding), bool(saturate), check_scale_exponent(scale_exponent))
    if straight_through:
        return _StraightThrough.apply(x, rounder, generator)
    return _round(x.detach(), rounder, generator)


def _check_tensor(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise UsageError(
            f"quantize was given a {type(x).__name__}; it takes a torch tensor "
            "(precscope.reference.quantize_scalar takes a float)"
        )
    if x.dtype not in _CONTAINERS or x.layout is not torch.strided:
        raise UsageError(
            f"quantize was given a tensor of {x.dtype}, layout {x.layout}; it takes dense tensors of "
            f"{', '.join(str(d) for d in _CONTAINERS)}: convert with .float() or .to_dense()"
        )


class _StraightThrough(torch.autograd.Function):
    """Rounds forward; backward is the identity."""

    @staticmethod
    def forward(x: Tensor, rounder: _Rounder, generator: torch.Generator | None) -> Tensor:
        return _round(x.detach(), rounder, generator)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """Nothing to keep."""

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


@dataclass(frozen=True)
class _Rounder:
    """One way of rounding. emin and max are those of the format shifted by the scale.

    on_overflow: inf, nan, or None for the largest finite value. cast: the torch dtype whose cast does the same, if any.
    """

    rounding: str
    precision: int
    emin: int
    max: float
    on_overflow: float | None
    signed_zero: bool
    cast: torch.dtype | None

    def working_dtype(self, container: torch.dtype) -> torch.dtype:
        """float32 where it holds every value of the container and of the shifted format, else float64."""
        fits = self.precision <= 23 and -126 <= self.emin <= 127 and self.max <= torch.finfo(torch.float32).max
        return torch.float32 if fits and container is not torch.float64 else torch.float64


def _rounder(fmt: FloatFormat, rounding: str, saturate: bool, scale_exponent: int) -> _Rounder:
    emin = fmt.emin - scale_exponent
    if fmt.precision == 52:
        emin = max(emin, -1022)  # float64 holds no value finer than its own subnormals: nothing to round there
    try:
        largest = math.ldexp(fmt.max, -scale_exponent)
    except OverflowError:
        largest = math.inf  # no float64 is beyond it
    if fmt.precision > 52 or not -1022 <= emin <= 1023 or (largest == math.inf and not fmt.has_inf):
        raise UsageError(
            f"{fmt} scaled by 2^{scale_exponent} reaches beyond float64, in which values are rounded; "
            "choose a scale_exponent nearer to 0"
        )
    on_overflow = None
    if not saturate and (fmt.has_inf or fmt.has_nan):
        on_overflow = math.inf if fmt.has_inf else math.nan
    plain = rounding == "nearest_even" and not saturate and scale_exponent == 0
    cast = _CASTS.get(fmt) if plain else None
    return _Rounder(rounding, fmt.precision, emin, largest, on_overflow, fmt.signed_zero, cast)


def _round(x: Tensor, rounder: _Rounder, generator: torch.Generator | None) -> Tensor:
    """Round `x`, which carries no graph, by the fastest way that its device, dtype and the rounding allow."""
    x = x.resolve_neg()
    compiling = torch.compiler.is_compiling()
    if x.numel() == 0:
        return torch.empty_like(x)
    # torch.compile takes float32 -> float16 -> float32 for a detour and drops the rounding with it.
    if rounder.cast is not None and x.dtype is not torch.float64 and not compiling:
        return x.to(rounder.cast, copy=True).to(x.dtype)
    # Loops over pieces and looks at values need real memory: not while torch.compile traces, not on fake tensors.
    if x.device.type != "cpu" or type(x) is not Tensor or compiling:
        return _round_piece(x, rounder, generator, look=False)
    working = rounder.working_dtype(x.dtype)
    if working is torch.float32 and rounder.rounding != "stochastic" and x.numel() >= _COMPILED_FROM:
        kernel = _compiled()
        if kernel is not None:
            wide = x.to(working)
            return _in_memory_order(wide, lambda values, out: _run(kernel, values, out, rounder)).to(x.dtype)
    if x.numel() <= _PIECE:
        return _round_piece(x, rounder, generator, look=True)

    def piece_by_piece(values: Tensor, out: Tensor) -> None:
        for piece, piece_out in zip(values.split(_PIECE), out.split(_PIECE), strict=True):
            piece_out.copy_(_round_piece(piece, rounder, generator, look=True))

    return _in_memory_order(x, piece_by_piece)


def _in_memory_order(x: Tensor, write: Callable[[Tensor, Tensor], None]) -> Tensor:
    """A tensor like `x`, filled by `write(values, out)`, which sees both as 1-D in their order in memory.

    A dense x keeps its strides, channels_last for one; others become contiguous.
    """
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    if x.is_contiguous() or not x.permute(order).is_contiguous():
        x = x.contiguous()
        out = torch.empty_like(x)
        write(x.view(-1), out.view(-1))
    else:
        out = torch.empty_like(x)
        write(x.permute(order).view(-1), out.permute(order).view(-1))
    return out


# --- one pass, compiled -----------------------------------------------------------------------------------------


_SIGNATURE = "void(float32[::1], uint32[::1], float32[::1], boolean, boolean, " + ", ".join(["float32"] * 6) + ")"


@cache
def _compiled() -> Callable[..., None] | None:
    """The kernel, compiled on first use and kept on disk; None where numba is missing or switched off."""
    try:
        import numba
        import numpy as np
    except ImportError:
        return None
    if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
        return None

    def kernel(x, bits, out, to_nearest, signed_zero, lowest, in_ulps, from_ulps, largest, beyond, infinite):
        for i in range(np.uint64(x.size)):  # unsigned, and without branches, so that it is vectorised
            value = x[i]
            binade = np.uint32(bits[i] & np.uint32(0x7F800000)).view(np.float32)
            binade = min(max(binade, lowest), np.float32(2.0**127))
            ulps = value / binade * in_ulps
            y = (np.rint(ulps) if to_nearest else np.trunc(ulps)) * from_ulps * binade
            limit = np.copysign(infinite if abs(value) == np.inf else beyond, value)
            y = limit if abs(y) > largest else y
            out[i] = y if signed_zero or y != 0 else np.float32(0)

    try:  # error_model: numpy's does not check each divisor for zero
        return numba.njit(_SIGNATURE, nogil=True, error_model="numpy", cache=True)(kernel)
    except RuntimeError:  # no directory to keep compiled code in
        return numba.njit(_SIGNATURE, nogil=True, error_model="numpy")(kernel)


def _run(kernel: Callable[..., None], x: Tensor, out: Tensor, rounder: _Rounder) -> None:
    """Round the 1-D float32 `x` into `out`, on as many threads as torch uses.

    Threads of its own, started anew: torch's cannot be reached from here, numba's end the process when two threads
    use them at once, and a pool would not survive a fork.
    """
    to_nearest = rounder.rounding == "nearest_even"
    p, infinite = rounder.precision, rounder.max if rounder.on_overflow is None else rounder.on_overflow
    beyond = infinite if to_nearest else rounder.max
    numbers = (2.0**rounder.emin, 2.0**p, 2.0**-p, rounder.max, beyond, infinite)
    values, bits, rounded = x.numpy(), x.view(torch.uint32).numpy(), out.numpy()

    def work(start: int, stop: int) -> None:
        part = slice(start, stop)
        kernel(values[part], bits[part], rounded[part], to_nearest, rounder.signed_zero, *numbers)

    size = x.numel()
    count = max(1, min(torch.get_num_threads(), size // _PER_THREAD))
    bounds = [size * i // count for i in range(count + 1)]
    others = [threading.Thread(target=work, args=pair) for pair in pairwise(bounds[1:])]
    for thread in others:
        thread.start()
    work(0, bounds[1])
    for thread in others:
        thread.join()


# --- torch operations, everywhere -------------------------------------------------------------------------------


def _round_piece(x: Tensor, rounder: _Rounder, generator: torch.Generator | None, *, look: bool) -> Tensor:
    """Round `x` into a new tensor. look: values may be read on the host, to skip the marking of overflow."""
    value = x.to(rounder.working_dtype(x.dtype))
    limited = value
    if rounder.on_overflow is None or rounder.rounding == "toward_zero":
        limited = value.clamp(-rounder.max, rounder.max)
    y = _round_to_grid(limited, rounder, generator)
    if rounder.on_overflow is not None:
        # Toward zero only inf itself is beyond; otherwise whatever was rounded to beyond max.
        beyond = (value, torch.finfo(value.dtype).max) if rounder.rounding == "toward_zero" else (y, rounder.max)
        mask = _beyond(*beyond, look=look)
        if mask is not None:
            y = torch.where(mask, value * rounder.on_overflow, y)  # inf with the sign of value, or NaN
    if not rounder.signed_zero:
        y = y.masked_fill_(y == 0, 0.0)
    return y.to(x.dtype)


def _round_to_grid(value: Tensor, rounder: _Rounder, generator: torch.Generator | None) -> Tensor:
    """`value` (float32 or float64) rounded to `precision` bits with gradual underflow; no upper limit."""
    bits, exponent_mask, top = (
        (torch.int32, 0x7F800000, 127) if value.dtype is torch.float32 else (torch.int64, 0x7FF << 52, 1023)
    )
    binade = (value.view(bits) & exponent_mask).view(value.dtype).clamp_(2.0**rounder.emin, 2.0**top)
    y = value.div(binade).mul_(2.0**rounder.precision)  # in ulps
    if rounder.rounding == "nearest_even":
        y.round_()
    elif rounder.rounding == "toward_zero":
        y.trunc_()
    else:
        toward_zero = y.trunc()
        covered = y.sub_(toward_zero).abs_()  # of the way to the neighbour away from zero, exact
        away = torch.rand(y.shape, dtype=torch.float64, device=y.device, generator=generator) < covered
        y = toward_zero.add_(torch.copysign(away.to(value.dtype), value))
    return y.mul_(2.0**-rounder.precision).mul_(binade)


def _beyond(values: Tensor, limit: float, *, look: bool) -> Tensor | None:
    """Where |values| > limit, or None where a look (one read, host only) finds nothing there; NaN is not beyond."""
    if look:
        least, most = torch.aminmax(values)
        if least.item() >= -limit and most.item() <= limit:
            return None
    return values.abs() > limit
