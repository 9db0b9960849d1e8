"""The one-pass kernels on the GPU, in Triton.

Each program walks over blocks of the tensor and keeps a histogram, extremes and sums in registers; at its end it adds
them to the row with one vector of atomics. Exponents are read from the bits. Nothing waits for the device.

With TRITON_INTERPRET=1 in the environment before this module is imported, the same code runs on CPU tensors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..histogram import BINS, EXP_LO
from . import reference

INTERPRETED = triton.knobs.runtime.interpret

_BLOCK, _WARPS = 2048, 8  # 8 elements per thread: what is kept per element fits in registers
_PROGRAMS_PER_SM = 4
_HISTOGRAM = 512  # power of two above the columns of counts
_KIND = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


@triton.jit
def _widen(x, kind: tl.constexpr):
    """A block as fp32, or as fp64 if it is: exact. bf16 is the upper half of fp32, subnormals too."""
    if kind == 1:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif kind == 2:
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def _binade(x, kind: tl.constexpr):
    """floor(log2|x|) of a widened block, int32: 1024 for inf and nan, -2000 for zero, -1023 for fp64 subnormals."""
    if kind == 3:
        bits = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
        field = (bits >> 52).to(tl.int32)
        binade = tl.where(field == 2047, 1024, field - 1023)
    else:
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        field = bits >> 23
        # a subnormal is bits * 2^-149, and the integer converts to a normal fp32 value
        of_integer = (bits.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
        binade = tl.where(field == 0, of_integer - 149, field - 127)
        binade = tl.where(field == 255, 1024, binade)
    return tl.where(bits == 0, -2000, binade)


@triton.jit(do_not_specialize=["slot", "k"])
def _accumulate_kernel(
    rows, x_pointer, n, slot, k,
    kind: tl.constexpr, block: tl.constexpr, histogram: tl.constexpr, bins: tl.constexpr, exp_lo: tl.constexpr,
    width: tl.constexpr,
):  # fmt: skip
    counts = tl.zeros([histogram], dtype=tl.int32)
    largest = tl.zeros([block], dtype=tl.float64)
    smallest = tl.full([block], float("inf"), dtype=tl.float64)
    total = tl.zeros([block], dtype=tl.float64)
    squares = tl.zeros([block], dtype=tl.float64)
    start = tl.program_id(0).to(tl.int64) * block
    while start < n:
        offsets = start + tl.arange(0, block)
        inside = offsets < n
        x = _widen(tl.load(x_pointer + offsets, mask=inside, other=0.0), kind)
        binade = _binade(x, kind)
        zero, finite = binade == -2000, binade < 1024
        column = tl.minimum(tl.maximum(binade + k, exp_lo), exp_lo + bins - 1) - exp_lo
        column = tl.where(zero, bins, column)
        column = tl.where(finite, column, tl.where(x != x, bins + 3, tl.where(x > 0, bins + 1, bins + 2)))
        counts += tl.histogram(tl.where(inside, column, histogram - 1), histogram)
        kept = tl.where(finite, x.to(tl.float64), 0.0)
        magnitude = tl.abs(kept)
        largest = tl.maximum(largest, magnitude)
        smallest = tl.minimum(smallest, tl.where(finite & (zero == 0), magnitude, float("inf")))
        total += kept
        squares += kept * kept
        start += tl.num_programs(0).to(tl.int64) * block
    row = rows + slot.to(tl.int64) * width
    columns = tl.arange(0, histogram)
    tl.atomic_add(row + columns, counts.to(tl.int64), mask=(columns < bins + 4) & (counts > 0))
    scale = ((k.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)  # 2^k
    # positive floats order like their bits
    tl.atomic_max(row + bins + 4, (tl.max(largest) * scale).to(tl.int64, bitcast=True))
    tl.atomic_min(row + bins + 5, (tl.min(smallest) * scale).to(tl.int64, bitcast=True))
    numbers = row.to(tl.pointer_type(tl.float64), bitcast=True)
    tl.atomic_add(numbers + bins + 6, tl.sum(total) * scale)
    tl.atomic_add(numbers + bins + 7, tl.sum(squares) * scale * scale)


@triton.jit(do_not_specialize=["slot"])
def _ratio_kernel(
    rows, before_pointer, step_pointer, n, slot,
    kind: tl.constexpr, block: tl.constexpr, histogram: tl.constexpr, bins: tl.constexpr, exp_lo: tl.constexpr,
    width: tl.constexpr,
):  # fmt: skip
    counts = tl.zeros([histogram], dtype=tl.int32)
    start = tl.program_id(0).to(tl.int64) * block
    while start < n:
        offsets = start + tl.arange(0, block)
        inside = offsets < n
        weight = _binade(tl.load(before_pointer + offsets, mask=inside, other=0.0), kind)
        step = _binade(tl.load(step_pointer + offsets, mask=inside, other=0.0), kind)
        column = tl.minimum(tl.maximum(step - weight, exp_lo), exp_lo + bins - 1) - exp_lo
        column = tl.where(weight == -2000, bins + 1, column)
        column = tl.where(step == -2000, bins, column)
        column = tl.where((weight == 1024) | (step == 1024), bins + 3, column)
        counts += tl.histogram(tl.where(inside, column, histogram - 1), histogram)
        start += tl.num_programs(0).to(tl.int64) * block
    columns = tl.arange(0, histogram)
    row = rows + slot.to(tl.int64) * width
    tl.atomic_add(row + columns, counts.to(tl.int64), mask=(columns < bins + 4) & (counts > 0))


@triton.jit(do_not_specialize=["slot"])
def _weights_kernel(
    weights, y_pointer, g_pointer, n, slot,
    kind: tl.constexpr, block: tl.constexpr, histogram: tl.constexpr, bins: tl.constexpr, exp_lo: tl.constexpr,
    width: tl.constexpr,
):  # fmt: skip
    """A block of activations fills some twenty binades: one masked sum for each, none for the others."""
    columns = tl.arange(0, histogram)
    sums = tl.zeros([histogram], dtype=tl.float64)
    start = tl.program_id(0).to(tl.int64) * block
    while start < n:
        offsets = start + tl.arange(0, block)
        inside = offsets < n
        binade = _binade(tl.load(y_pointer + offsets, mask=inside, other=0.0), kind)
        g = tl.load(g_pointer + offsets, mask=inside, other=0.0).to(tl.float64)
        kept = inside & (binade > -2000) & (binade < 1024)
        column = tl.minimum(tl.maximum(binade, exp_lo), exp_lo + bins - 1) - exp_lo
        column = tl.where(kept, column, -1)
        at = tl.min(tl.where(kept, column, histogram))
        last = tl.max(column)
        while at <= last:
            sums += tl.where(columns == at, tl.sum(tl.where(column == at, g * g, 0.0)), 0.0)
            at += 1
        start += tl.num_programs(0).to(tl.int64) * block
    row = weights + slot.to(tl.int64) * bins
    tl.atomic_add(row + columns, sums, mask=(columns < bins) & (sums != 0.0))


def accumulate_weights(weights: Tensor, slot: int, y: Tensor, g: Tensor) -> None:
    """Like reference.accumulate_weights."""
    if y.numel():
        with _on(y.device):
            _weights_kernel[_grid(y)](weights, y, g, y.numel(), slot, kind=_KIND[y.dtype], **_CONSTANTS, **_OPTIONS)


def accumulate(rows: Tensor, slot: int, x: Tensor, k: int = 0) -> None:
    """Add the statistics of x * 2^k to row `slot`. x: fp32, bf16, fp16 or fp64, on the device of `rows`."""
    x = reference.flat(x.detach())
    if x.numel():
        with _on(x.device):
            _accumulate_kernel[_grid(x)](rows, x, x.numel(), slot, k, kind=_KIND[x.dtype], **_CONSTANTS, **_OPTIONS)


def accumulate_update(rows: Tensor, slot: int, ratio_slot: int, before: Tensor, after: Tensor) -> None:
    """Like reference.accumulate_update, in two passes: the difference is formed by torch."""
    if before.stride() != after.stride():
        before, after = before.contiguous(), after.contiguous()
    wide = torch.float64 if torch.float64 in (before.dtype, after.dtype) else torch.float32
    before = reference.flat(before.detach()).to(wide)
    step = reference.flat(after.detach()).to(wide) - before
    accumulate(rows, slot, step)
    if step.numel():
        with _on(step.device):
            _ratio_kernel[_grid(step)](
                rows, before, step, step.numel(), ratio_slot, kind=_KIND[wide], **_CONSTANTS, **_OPTIONS
            )


_OPTIONS = {"num_warps": _WARPS, "enable_fp_fusion": True}
_CONSTANTS = {"block": _BLOCK, "histogram": _HISTOGRAM, "bins": BINS, "exp_lo": EXP_LO, "width": reference.WIDTH}


def _grid(x: Tensor) -> tuple[int]:
    """As many programs as the device holds at once, or one per block where there are fewer."""
    blocks = triton.cdiv(x.numel(), _BLOCK)
    if x.device.type != "cuda":
        return (min(blocks, 4),)
    return (min(blocks, _PROGRAMS_PER_SM * torch.cuda.get_device_properties(x.device).multi_processor_count),)


def _on(device: torch.device) -> torch.cuda.device:
    """Launches go to the current device: make it the tensor's. Does nothing on the CPU."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
