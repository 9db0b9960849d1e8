"""The one-pass kernels in torch operations: readable, any device, no host synchronisation. The other backends must
agree with this one.

Values are widened to float64, which is exact and turns the subnormals of fp32 and narrower formats into normal
numbers; the exponent is then read from the bits (never by log2, which is wrong just below powers of two).

A row of accumulators is `WIDTH` int64 words, so that a table of rows is one tensor and reading it is one copy:

    0 .. BINS-1   counts per binade        BINS + 0..3   zeros, +inf, -inf, nan
    AMAX, AMIN    float64 bits of the extremes (positive floats order like their bits, so integer max and min do)
    SUM, SUMSQ    float64
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..histogram import BINS, EXP_HI, EXP_LO

ZEROS, POS_INF, NEG_INF, NAN = range(BINS, BINS + 4)
AMAX, AMIN, SUM, SUMSQ = range(BINS + 4, BINS + 8)
WIDTH = BINS + 8
INF_BITS = 0x7FF0_0000_0000_0000  # float64 bits of inf: the smallest magnitude of nothing

# Elements widened at a time. On the CPU few enough that torch keeps each operation on one thread: the result does not
# depend on the number of threads. Elsewhere it bounds the temporary memory to about 200 MB.
_PIECE_CPU, _PIECE = 1 << 15, 1 << 22


def new_rows(capacity: int, device: torch.device) -> Tensor:
    """`capacity` empty rows, int64 [capacity, WIDTH]."""
    rows = torch.zeros(capacity, WIDTH, dtype=torch.int64, device=device)
    rows[:, AMIN] = INF_BITS
    return rows


def flat(x: Tensor) -> Tensor:
    """The elements of x as one contiguous dimension, in any order; copies only where x has gaps or overlaps.

    The order of elements does not matter to statistics, so a transposed or channels-last tensor is read as it lies.
    """
    if x.is_contiguous():
        return x.view(-1)
    if fills_its_storage(x):
        return x.as_strided((x.numel(),), (1,))
    return x.contiguous().view(-1)


def fills_its_storage(x: Tensor) -> bool:
    """Whether the elements of x, in some order, lie side by side without gap or overlap (a permuted dense tensor)."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def accumulate(rows: Tensor, slot: int, x: Tensor, k: int = 0) -> None:
    """Add the statistics of x * 2^k to row `slot`. x: floating point, on the device of `rows`."""
    for piece in flat(x.detach()).split(_piece(x)):
        _accumulate(rows[slot], piece.double(), k)


def accumulate_many(rows: Tensor, slots: Sequence[int], tensors: Sequence[Tensor], ks: Sequence[int]) -> None:
    """`accumulate` of each tensor times 2^k to its slot, in order."""
    for slot, x, k in zip(slots, tensors, ks, strict=True):
        accumulate(rows, slot, x, k)


def accumulate_update(rows: Tensor, slot: int, ratio_slot: int, before: Tensor, after: Tensor) -> None:
    """Add the statistics of dw = after - before to row `slot`, and to row `ratio_slot` the histogram of
    floor(log2|dw|) - floor(log2|before|): dw == 0 counts as zero, before == 0 as +inf, non-finite as nan."""
    if before.stride() != after.stride() or not fills_its_storage(before):
        before, after = before.contiguous(), after.contiguous()
    wide = torch.float64 if torch.float64 in (before.dtype, after.dtype) else torch.float32
    before, after = flat(before.detach()), flat(after.detach())
    for w, new in zip(before.split(_piece(before)), after.split(_piece(after)), strict=True):
        w = w.to(wide)
        dw = (new.to(wide) - w).double()
        w = w.double()
        _accumulate(rows[slot], dw, 0)
        defined = torch.isfinite(dw) & torch.isfinite(w)
        column = (_binade(dw) - _binade(w)).clamp(EXP_LO, EXP_HI) - EXP_LO
        column = torch.where(w == 0, POS_INF, column)
        column = torch.where(dw == 0, ZEROS, column)
        _count(rows[ratio_slot], torch.where(defined, column, NAN))


def accumulate_weights(weights: Tensor, slot: int, y: Tensor, g: Tensor) -> None:
    """Add to row `slot` of `weights`, float64 [rows, BINS], the sum of g^2 over the elements of y in each binade.

    y, g: contiguous [n], both fp32 or both fp64, on the device of `weights`. Elements of y that are zero or not finite
    add nothing; a gradient that is not finite makes its bin inf or NaN.
    """
    row = weights[slot]
    for values, gradient in zip(y.split(_piece(y)), g.split(_piece(g)), strict=True):
        values, gradient = values.double(), gradient.double()
        kept = torch.isfinite(values) & (values != 0)
        column = _binade(values).clamp(EXP_LO, EXP_HI) - EXP_LO
        row.scatter_add_(0, column, torch.where(kept, gradient * gradient, 0.0))


def _piece(x: Tensor) -> int:
    return _PIECE_CPU if x.device.type == "cpu" else _PIECE


def _accumulate(row: Tensor, x: Tensor, k: int) -> None:
    """Add the statistics of x * 2^k, float64 [n], to `row`."""
    if x.numel() == 0:
        return
    zeros, above, below = (x == 0).sum(), (x == float("inf")).sum(), (x == -float("inf")).sum()
    # Count signs with exponent fields, then fold these 4096 counts into the row.
    fields = torch.zeros(4096, dtype=torch.int64, device=x.device)
    _count(fields, (x.view(torch.int64) >> 52) & 0xFFF)
    fields = fields[:2048] + fields[2048:]
    column = (torch.arange(2047, device=x.device) - 1023 + k).clamp(EXP_LO, EXP_HI) - EXP_LO
    fields[0] -= zeros
    row.scatter_add_(0, column, fields[:2047])
    row[ZEROS] += zeros
    row[POS_INF] += above
    row[NEG_INF] += below
    row[NAN] += fields[2047] - above - below

    kept = torch.where(torch.isfinite(x), x, 0.0) * 2.0**k
    magnitude = kept.abs()
    values = row.view(torch.float64)
    values[AMAX] = torch.maximum(values[AMAX], magnitude.amax())
    values[AMIN] = torch.minimum(values[AMIN], torch.where(magnitude > 0, magnitude, float("inf")).amin())
    values[SUM] += kept.sum()
    values[SUMSQ] += kept.square().sum()


def _binade(x: Tensor) -> Tensor:
    """floor(log2|x|) of float64 values, int64, from bits; -1023 for zeros and fp64 subnormals, 1024 for inf, nan."""
    return ((x.view(torch.int64) >> 52) & 0x7FF) - 1023


def _count(row: Tensor, column: Tensor) -> None:
    """Add 1 to row[c] for every c of `column` (int64 [n]); bincount would synchronise."""
    row.scatter_add_(0, column, torch.ones_like(column))
