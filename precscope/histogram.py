"""Exponent histograms: how many values lie in each binade, and what that says about a format.

A histogram is an array [..., BINS] of counts. Bin i counts the finite non-zero values whose magnitude lies in the
binade [2^(EXP_LO + i), 2^(EXP_LO + i + 1)). Bin 0 also takes everything smaller and the last bin everything larger;
fp32 and narrower never need either. Zeros, infinities and NaN are counted elsewhere.

A format with p explicit significand bits and normal binades emin..emax treats all values of one binade alike: they
share one ulp, are subnormal together, are flushed together, overflow together (but for the top binade). So a question
about a format is a short table over the bins, `rounding_table`, and the answer for any number of tensors is the
product of their histograms with it. numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .formats import FloatFormat

EXP_LO, EXP_HI, BINS = -151, 128, 280
BINADES = np.arange(EXP_LO, EXP_HI + 1)
BINADES.setflags(write=False)

_CONTINUOUS = 200  # grid points per binade as a power of two: more than any format has, so "no grid at all"


@dataclass(frozen=True)
class RoundingTable:
    """What rounding to one format (nearest even, after multiplying by 2^k) does to the values of each bin.

    All fields float64 [BINS]. overflows: 1 where the whole binade lies beyond the largest finite value. top: 1 at the
    binade that holds the largest finite value. flushed, subnormal: share of the bin's values. error: mean squared
    rounding error of a value that stays in range (flushed ones included). flush_error: the part of `error` that comes
    from flushing. energy: mean square of a value. Errors and energies are in units before the scale, so that they
    compare with the recorded sum of squares. first_cell: how wide an interval the source rounded to the
    first point of the binade below the smallest subnormal, in steps of its grid: half a step above and, where the
    source is normal, a quarter below.
    """

    overflows: NDArray[np.float64]
    top: NDArray[np.float64]
    flushed: NDArray[np.float64]
    subnormal: NDArray[np.float64]
    error: NDArray[np.float64]
    flush_error: NDArray[np.float64]
    energy: NDArray[np.float64]
    first_cell: float


def mean_square(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean square of `points` equally spaced values 1, 1 + 1/n, ... of the binade [1, 2); 7/3 for a continuum."""
    return 7 / 3 - 1.5 / points + 1 / (6 * points * points)


@lru_cache(maxsize=1024)
def rounding_table(
    fmt: FloatFormat, *, scale_exponent: int = 0, source: FloatFormat | None = None, source_exponent: int = 0
) -> RoundingTable:
    """The table of `fmt` for values that are multiplied by 2^scale_exponent and then rounded to nearest even.

    source: the format the values had when they were recorded, None for a continuum; source_exponent: the power of
    two by which they were multiplied since. The formulas are for values spread evenly over their binade:

    - error ulp^2/12 where the source has no grid. A source grid of step s = ulp/2^j gives ulp^2/12 (1 + 2/4^j) for
      j >= 1 (the mean of the squared distances of a uniform grid from its nearest-even multiples of ulp) and no
      error at all for j <= 0: a bf16 tensor asked for fp32, or for bf16 itself.
    - flushed values are their own error: (7/3) 4^e, or `mean_square` of the source's grid points.
    - the binade just below the smallest subnormal [half, 1) ulp rounds up to it, except that its first point is a
      tie and is flushed; the squared error averages ulp^2/12 (1 + 3/N + 2/N^2) for N = 2^j.
    """
    k = scale_exponent
    binade = BINADES + k
    ulp = np.maximum(binade, fmt.emin) - fmt.precision
    if source is None:
        step = binade - _CONTINUOUS
    else:
        moved = source_exponent + k
        step = np.minimum(np.maximum(binade - moved, source.emin) - source.precision + moved, binade)
    points = np.exp2((binade - step).astype(float))  # of the source's grid, in one binade; at least 1

    in_range = binade <= fmt.emax
    lowest = fmt.emin - fmt.precision - 1
    below, lowest_binade = binade < lowest, binade == lowest

    finer = np.exp2(-np.maximum(ulp - step, 0).astype(float))  # 1/N = 2^-j
    uniform = np.where(finer < 1, (1 + 2 * finer**2) / 12, 0.0)
    uniform = np.where(lowest_binade, (1 + 3 * finer + 2 * finer**2) / 12, uniform)
    energy = ldexp(mean_square(points), 2 * BINADES)
    rounded = ldexp(uniform, 2 * np.minimum(ulp - k, BINADES + 1))  # beyond that, all is flushed
    lowest_tie = np.where(lowest_binade, 1 / points, 0.0)  # the share of that binade that lies at exactly half an ulp
    return RoundingTable(
        overflows=(~in_range).astype(float),
        top=(binade == fmt.emax).astype(float),
        flushed=np.where(below, 1.0, lowest_tie),
        subnormal=np.where((binade >= lowest) & (binade < fmt.emin), 1.0 - lowest_tie, 0.0),
        error=np.where(in_range, np.where(below, energy, rounded), 0.0),
        flush_error=np.where(below, energy, 0.0),
        energy=energy,
        first_cell=0.75 if source is not None and lowest - k - source_exponent >= source.emin else 1.0,
    )


def ldexp(x: ArrayLike, exponent: ArrayLike) -> NDArray[np.float64]:
    """x * 2^exponent, elementwise and exact; numpy's own takes no 64-bit exponents on every system."""
    return np.ldexp(x, np.asarray(exponent).astype(np.intc))


def shift_bins(counts: NDArray, k: int) -> NDArray:
    """The histogram [..., BINS] of the values times 2^k. What leaves the range gathers in the first or last bin."""
    if k == 0:
        return counts.copy()
    out = np.zeros_like(counts)
    lost = min(abs(k), BINS - 1)
    if k > 0:
        out[..., lost:] = counts[..., : BINS - lost]
        out[..., -1] += counts[..., BINS - lost :].sum(axis=-1)
    else:
        out[..., : BINS - lost] = counts[..., lost:]
        out[..., 0] += counts[..., :lost].sum(axis=-1)
    return out


def answer(
    counts: NDArray[np.int64],
    fmt: FloatFormat,
    table: RoundingTable,
    *,
    scale_exponent: int,
    elements: NDArray[np.int64],
    amax: NDArray[np.float64],
    amin: NDArray[np.float64],
    sumsq: NDArray[np.float64],
    weights: NDArray[np.float64] | None = None,
) -> dict[str, NDArray[np.float64]]:
    """What rounding S tensors to `fmt` would do: the columns of stats.FormatAnswer, float64 [S].

    counts: [S, BINS] histograms, all of the one source and scale of `table`. elements: [S], how many values there
    are, zeros and non-finite ones included. amax, amin: [S], largest finite and smallest finite non-zero magnitude.
    sumsq: [S], over the finite values. weights: [S, BINS] or None, sums of squared loss gradients per bin.
    """
    bins = counts.astype(float)
    finite = bins.sum(axis=1)
    lo, hi = _overflow_bounds(bins, amax, amin, fmt, scale_exponent, table)
    ties = _more_ties(bins, fmt, scale_exponent, table)
    flushed, subnormal = bins @ table.flushed + ties, bins @ table.subnormal - ties
    signal, noise = _signal_and_noise(bins, sumsq, lo, hi, fmt, table)

    with np.errstate(invalid="ignore"):  # inf weights: a gradient that was not finite
        variance = np.full(len(counts), np.nan) if weights is None else weights @ table.error
    # All magnitudes equal (a norm's initial weight, a mask): nothing is left to estimate.
    alone = np.flatnonzero((amax == amin) & (finite > 0))
    if len(alone):
        lost, squared = _round_exactly(amax[alone], fmt, scale_exponent)
        in_range = np.where(hi[alone] == 0, finite[alone], 0.0)
        flushed[alone] = lost * in_range
        subnormal[alone] = ~lost * in_range * (np.frexp(amax[alone])[1] - 1 + scale_exponent < fmt.emin)
        signal[alone] = in_range * amax[alone] ** 2
        noise[alone] = in_range * squared
        if weights is not None:
            with np.errstate(invalid="ignore"):  # inf weights
                variance[alone] = np.where(in_range > 0, weights[alone].sum(axis=1) * squared, 0.0)

    with np.errstate(divide="ignore", invalid="ignore"):
        sqnr = 10 * np.log10(signal / noise)
    sqnr = np.where(noise > 0, sqnr, np.where((lo > 0) & (lo == finite), np.nan, np.inf))
    whole = np.maximum(elements, 1)
    return {
        "overflow_lo": lo / whole,
        "overflow_hi": hi / whole,
        "flushed": flushed / whole,
        "subnormal": subnormal / whole,
        "sqnr_db": sqnr,
        "loss_noise": np.sqrt(variance),
    }


def _more_ties(
    counts: NDArray[np.float64], fmt: FloatFormat, k: int, table: RoundingTable
) -> NDArray[np.float64] | float:
    """How many values more than one in N lie at exactly half of the smallest subnormal and are flushed there.

    The table spreads values evenly over the N points of their binade. Where the source's grid is coarse it matters
    that small values are usually more frequent: here the density falls like x^-a, with r = 2^(1-a) the ratio of
    neighbouring bins. The first of N points then has a share of 1 / (N (r - 1) / log2 r + (1 - r/2) / 2) of the
    binade (Euler-Maclaurin), times the width of the interval that the source rounded to it.
    """
    column = fmt.emin - fmt.precision - 1 - k - EXP_LO
    if not 0 < column < BINS - 1 or table.flushed[column] < 1e-6:
        return 0.0
    points = 1 / table.flushed[column]
    ratio = np.sqrt((counts[:, column + 1] + 1) / (counts[:, column - 1] + 1)).clip(1 / 16, 16)
    ratio = np.where(np.abs(ratio - 1) < 1e-6, 1 + 1e-6, ratio)  # the limit: a = 1
    first = 1 / (points * (ratio - 1) / np.log2(ratio) + (1 - ratio / 2) / 2)
    return counts[:, column] * (np.minimum(first * table.first_cell, 1.0) - 1 / points)


def _overflow_bounds(
    counts: NDArray[np.float64], amax: NDArray, amin: NDArray, fmt: FloatFormat, k: int, table: RoundingTable
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bounds on the number of overflowing values: what the bins say, settled by the extremes where they can."""
    finite = counts.sum(axis=1)
    surely = counts @ table.overflows
    at_most = surely + counts @ table.top
    # The end bins hold more than their binade: bin 0 reaches down to zero, the last one up to infinity.
    surely -= np.where(amin < 2.0**EXP_LO, counts[:, 0] * table.overflows[0], 0.0)
    at_most = np.where(amax >= 2.0 ** (EXP_HI + 1), np.maximum(at_most, counts[:, -1]), at_most)
    largest, smallest = _overflows(amax, fmt, k), _overflows(amin, fmt, k)
    lo = np.where(smallest, finite, np.where(largest, np.maximum(surely, 1), 0.0))
    hi = np.where(smallest, finite, np.where(largest, np.minimum(at_most, finite - 1), 0.0))
    return lo, hi


def _overflows(magnitude: NDArray[np.float64], fmt: FloatFormat, k: int) -> NDArray[np.bool_]:
    """Whether finite magnitudes times 2^k round beyond the largest finite value: fmt.overflows over an array."""
    with np.errstate(over="ignore", under="ignore"):
        scaled = ldexp(magnitude, k)
    beyond = scaled >= fmt.overflow_from if fmt.overflow_at_midpoint else scaled > fmt.overflow_from
    return beyond & np.isfinite(magnitude)


def _signal_and_noise(
    counts: NDArray[np.float64], sumsq: NDArray, lo: NDArray, hi: NDArray, fmt: FloatFormat, table: RoundingTable
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum of squares and error power of the values that stay in range, in units before the scale.

    Without overflow the recorded sum of squares is the signal. With it, what stays in range is estimated from the
    bins, values spread evenly over each (few large values can make up most of the recorded sum, so it says little
    about the rest); the top binade then ends where overflow begins.
    """
    top = min(fmt.overflow_from / 2.0**fmt.emax, 2.0) - 1.0  # share of the top binade that stays finite
    top_energy = top * (1 + (1 + top) + (1 + top) ** 2) / 7  # and of its energy
    cut = hi > 0
    in_top = counts * table.top
    kept = counts - counts * table.overflows
    energy = kept @ table.energy - np.where(cut, 1 - top_energy, 0.0) * (in_top @ table.energy)
    error = kept @ table.error - np.where(cut, 1 - top, 0.0) * (in_top @ table.error)
    usable = ~cut & np.isfinite(sumsq) & (sumsq > 0)  # squares of fp64 values can leave float64
    signal = np.where(usable, sumsq, energy)
    # Flushed values lose their energy: the more of all energy they hold, the better the recorded sum tells it.
    flush_error = counts @ table.flush_error
    share = np.divide(flush_error, energy, out=np.zeros_like(energy), where=energy > 0).clip(0, 1)
    told = np.divide(signal, energy, out=np.ones_like(energy), where=energy > 0)
    error += np.minimum(flush_error * (1 + share * (told - 1)), signal) - flush_error
    return signal, np.where(lo == counts.sum(axis=1), 0.0, np.maximum(error, 0.0))


def _round_exactly(magnitude: NDArray[np.float64], fmt: FloatFormat, k: int) -> tuple[NDArray, NDArray]:
    """Whether each magnitude times 2^k is flushed, and its squared rounding error in units before the scale."""
    _, exponent = np.frexp(magnitude)
    ulp = np.maximum(exponent - 1 + k, fmt.emin) - fmt.precision - k  # of the magnitude before the scale
    steps = ldexp(magnitude, -ulp)
    rounded = np.rint(steps)
    return rounded == 0, ldexp(steps - rounded, ulp) ** 2


def swallowed_share(
    differences: NDArray[np.int64],
    precision: int,
    *,
    unchanged: NDArray[np.int64] | int = 0,
    from_zero: NDArray[np.int64] | int = 0,
    uncertain: NDArray[np.float64] | float = 0.0,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bounds [lo, hi] on the share of weights w of `precision` bits that a non-zero update dw leaves as they are.

    differences: int64 [..., BINS], the histogram of floor(log2|dw|) - floor(log2|w|) in the bins of this module.
    unchanged: how many updates are exactly zero, from_zero: how many non-zero ones start at w == 0; both count in
    the total and as not swallowed. uncertain: share of the updates whose w is subnormal in the format (there the ulp
    is larger than the histogram knows) or is zero while dw may be flushed.

    For w in [2^e, 2^(e+1)) and dw in [2^d, 2^(d+1)), with p = precision, half an ulp is 2^(e-p-1), and 2^(e-p-2)
    towards zero when w is a power of two. Hence, rounding to nearest:

    - d - e <= -(p+3): |dw| is below even the smaller of the two: surely swallowed (lo counts these);
    - d - e == -(p+2): swallowed, unless w is a power of two and the step goes towards zero;
    - d - e == -(p+1): changes w, unless |dw| is exactly half an ulp and w is even (hi counts these and all below);
    - d - e >= -p: |dw| is at least an ulp: surely changes w.

    Both bounds hold whatever the values are, provided that w is representable in the format, is normal or zero (see
    `uncertain`), and that w + dw is computed in a format at least two bits wider. `swallowed_expected` gives the
    value to expect in between. Rows without updates give 0.
    """
    total = differences.sum(axis=-1) + np.asarray(unchanged) + np.asarray(from_zero)
    below = np.cumsum(differences, axis=-1)
    scale = 1.0 / np.maximum(total, 1)
    lo = below[..., _bin(-(precision + 3))] * scale
    hi = below[..., _bin(-(precision + 1))] * scale
    return lo, np.minimum(hi + uncertain, 1.0)


def swallowed_expected(
    differences: NDArray[np.int64],
    precision: int,
    *,
    unchanged: NDArray[np.int64] | int = 0,
    from_zero: NDArray[np.int64] | int = 0,
) -> NDArray[np.float64]:
    """The share to expect between the bounds of `swallowed_share`: updates with |dw| below half an ulp of w.

    Powers of two among the weights (one in 2^p) and exact ties are ignored.
    """
    total = differences.sum(axis=-1) + np.asarray(unchanged) + np.asarray(from_zero)
    return np.cumsum(differences, axis=-1)[..., _bin(-(precision + 2))] / np.maximum(total, 1)


def _bin(exponent: int) -> int:
    return min(max(exponent - EXP_LO, 0), BINS - 1)
