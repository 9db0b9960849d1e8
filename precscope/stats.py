"""What one pass over a tensor keeps, how such records add up, and what they answer about any format.

`TensorStats` is the record of one tensor (or of many, merged); `StatsTable` holds the records of S tensors as columns
and answers for all of them at once. Both are exact: counts are integers, extremes are values that occurred, only
`sum` and `sumsq` carry float64 rounding. Records merge by adding counts and sums and keeping extremes, so statistics
of steps, micro-batches and ranks combine into those of the whole. numpy only.

    stats = ps.summarize(x)
    print(stats.ask("fp16", scale_exponent=8))
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import UsageError
from .formats import FloatFormat, get_format
from .histogram import BINADES, BINS, EXP_HI, EXP_LO, answer, ldexp, rounding_table, shift_bins

__all__ = ["BINS", "EXP_HI", "EXP_LO", "MIXED", "NOTHING", "FormatAnswer", "StatsTable", "TensorStats"]

MIXED = "mixed"  # source of values that came in more than one format
NOTHING = "none"  # source of a record that has seen no tensor
_CHUNK = 4096  # rows answered at a time: bounds the float64 copy of the histograms to 9 MB


@dataclass(frozen=True)
class FormatAnswer:
    """What happens to a tensor in a format: the first four are shares of all its elements.

    overflow_lo, overflow_hi: bounds on the share of finite elements that round beyond the largest finite value.
    flushed: non-zero elements that round to zero. subnormal: elements that are subnormal there (they lose bits).
    sqnr_db: signal to quantisation noise of the elements that stay in range, in dB; inf where nothing is lost, NaN
    where everything overflows. loss_noise: standard deviation of the change of the loss, NaN where not priced.
    """

    overflow_lo: float
    overflow_hi: float
    flushed: float
    subnormal: float
    sqnr_db: float
    loss_noise: float

    def __str__(self) -> str:
        over = f"{self.overflow_lo:.3%}"
        if self.overflow_hi != self.overflow_lo:
            over += f" to {self.overflow_hi:.3%}"
        text = (
            f"overflow {over}, flushed {self.flushed:.3%}, subnormal {self.subnormal:.3%}, SQNR {self.sqnr_db:.1f} dB"
        )
        return text if np.isnan(self.loss_noise) else f"{text}, loss noise {self.loss_noise:.3g}"


@dataclass
class StatsTable:
    """Statistics of S tensors, a row each (struct of arrays).

    counts: int64 [S, BINS], finite non-zero values per binade (see histogram.py). zeros, pos_inf, neg_inf, nan: int64
    [S]. amax: float64 [S], largest finite magnitude, 0.0 if there is none. amin_nonzero: float64 [S], smallest finite
    non-zero magnitude, inf if there is none. sum, sumsq: float64 [S] over the finite values. source: object [S],
    name of the format the tensor had when it was seen, "mixed" if several, "none" if nothing was seen. weights:
    float64 [S, BINS] or None, the gradient-weighted histogram: sum of (dL/dy)^2 over the elements y of a binade; a row
    of NaN where no gradient is known, which adds nothing when rows are merged.
    source_exponent: int64 [S], power of two by which the values were multiplied since they had their source format
    (a divided-out loss scale of 2^16 leaves -16); it places the source's subnormals.
    """

    counts: NDArray[np.int64]
    zeros: NDArray[np.int64]
    pos_inf: NDArray[np.int64]
    neg_inf: NDArray[np.int64]
    nan: NDArray[np.int64]
    amax: NDArray[np.float64]
    amin_nonzero: NDArray[np.float64]
    sum: NDArray[np.float64]
    sumsq: NDArray[np.float64]
    source: NDArray[np.object_]  # any sequence of str is converted
    weights: NDArray[np.float64] | None = None
    source_exponent: NDArray[np.int64] = field(default=None)  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        names = np.empty(len(self.counts), dtype=object)
        names[:] = list(self.source)
        self.source = names
        if self.source_exponent is None:
            self.source_exponent = np.zeros(len(self.counts), dtype=np.int64)

    @classmethod
    def empty(cls, n: int) -> StatsTable:
        """n rows that have seen nothing: neutral under merging."""
        ints, floats = (lambda: np.zeros(n, np.int64)), (lambda: np.zeros(n))
        return cls(
            counts=np.zeros((n, BINS), np.int64),
            zeros=ints(), pos_inf=ints(), neg_inf=ints(), nan=ints(),
            amax=floats(), amin_nonzero=np.full(n, np.inf), sum=floats(), sumsq=floats(),
            source=np.full(n, NOTHING, dtype=object),
        )  # fmt: skip

    @classmethod
    def concat(cls, tables: Iterable[StatsTable]) -> StatsTable:
        """The rows of all tables, one after another. Rows without weights get NaN where others have some."""
        tables = list(tables)
        if not tables:
            return cls.empty(0)
        columns: dict[str, Any] = {f.name: [getattr(t, f.name) for t in tables] for f in fields(cls)}
        if all(w is None for w in columns["weights"]):
            del columns["weights"]
        else:
            columns["weights"] = [np.full(t.counts.shape, np.nan) if t.weights is None else t.weights for t in tables]
        return cls(**{name: np.concatenate(parts) for name, parts in columns.items()})

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def count(self) -> NDArray[np.int64]:
        """All elements: int64 [S]."""
        return self.counts.sum(axis=1) + self.zeros + self.pos_inf + self.neg_inf + self.nan

    @property
    def nonfinite(self) -> NDArray[np.int64]:
        """Infinities and NaN: int64 [S]."""
        return self.pos_inf + self.neg_inf + self.nan

    def row(self, index: int) -> TensorStats:
        """One row as a TensorStats."""
        return TensorStats.from_table(self, index)

    def take(self, index: ArrayLike) -> StatsTable:
        """The rows at `index` (integers or a mask), in that order; a copy."""
        index = np.asarray(index)
        index = index if index.dtype == bool else index.astype(np.int64)
        columns = ((f.name, getattr(self, f.name)) for f in fields(self))
        rows: dict[str, Any] = {name: None if column is None else column[index] for name, column in columns}
        return StatsTable(**rows)

    def shift(self, k: int | ArrayLike) -> StatsTable:
        """The statistics of the values times 2^k (one k, or int [S]): exact, no rounding to the source format.

        Used to divide out a loss scale. What leaves the histogram's range gathers in its first or last bin, so that
        shifting back is not always the identity. weights move with their binade and keep their values.
        """
        ks = np.broadcast_to(np.asarray(k, dtype=np.int64), (len(self),))
        counts, weights = self.counts.copy(), None if self.weights is None else self.weights.copy()
        for value in np.unique(ks[ks != 0]):
            rows = np.flatnonzero(ks == value)
            counts[rows] = shift_bins(self.counts[rows], int(value))
            if weights is not None:
                unknown = np.isnan(weights[rows]).all(axis=1, keepdims=True)
                weights[rows] = np.where(unknown, np.nan, shift_bins(weights[rows], int(value)))
        with np.errstate(over="ignore", under="ignore"):
            return replace(
                self,
                counts=counts, weights=weights,
                zeros=self.zeros.copy(), pos_inf=self.pos_inf.copy(), neg_inf=self.neg_inf.copy(), nan=self.nan.copy(),
                amax=ldexp(self.amax, ks), amin_nonzero=ldexp(self.amin_nonzero, ks),
                sum=ldexp(self.sum, ks), sumsq=ldexp(self.sumsq, 2 * ks),
                source_exponent=self.source_exponent + ks,
            )  # fmt: skip

    def group(self, keys: ArrayLike, n: int) -> StatsTable:
        """Merge rows by key: row j of the result merges the rows whose key is j, 0 <= j < n.

        Counts and sums add, extremes are kept, the source becomes "mixed" where non-empty rows differ, groups without
        rows are empty. Sums are added in row order.
        """
        keys = np.asarray(keys, dtype=np.int64)
        if keys.shape != (len(self),) or (len(keys) and not (keys.min() >= 0 and keys.max() < n)):
            raise UsageError(f"group: {len(self)} rows need as many keys in 0..{n - 1}, got an array of {keys.shape}")
        out = StatsTable.empty(n)
        if self.weights is not None:
            out.weights = np.full((n, BINS), np.nan)
        if not len(keys):
            return out
        order = np.argsort(keys, kind="stable")
        present, starts = np.unique(keys[order], return_index=True)
        for name in ("counts", "zeros", "pos_inf", "neg_inf", "nan", "sum", "sumsq", "weights"):
            column = getattr(self, name)
            if name == "weights" and column is not None:
                out.weights[present] = _sum_priced(column[order], starts)  # type: ignore[index]
            elif column is not None:
                getattr(out, name)[present] = np.add.reduceat(column[order], starts, axis=0)
        out.amax[present] = np.maximum.reduceat(self.amax[order], starts)
        out.amin_nonzero[present] = np.minimum.reduceat(self.amin_nonzero[order], starts)
        out.source[present] = _common_source(self.source[order], self.count[order] > 0, starts)
        far = np.iinfo(np.int64).max  # the finest grid of the group: the smallest exponent among non-empty rows
        exponent = np.where(self.count > 0, self.source_exponent, far)[order]
        exponent = np.minimum.reduceat(exponent, starts)
        out.source_exponent[present] = np.where(exponent == far, 0, exponent)
        return out

    def ask(self, fmt: str | FloatFormat, *, scale_exponent: int | ArrayLike = 0) -> dict[str, NDArray[np.float64]]:
        """What rounding the values times 2^scale_exponent to `fmt` would do: the fields of FormatAnswer, float64 [S].

        scale_exponent: one for all rows, or int [S]. Rows without elements give shares of 0 and an SQNR of inf.
        """
        fmt = get_format(fmt)
        scale = np.broadcast_to(np.asarray(scale_exponent, dtype=np.int64), (len(self),))
        out = {f.name: np.full(len(self), np.nan) for f in fields(FormatAnswer)}
        elements = self.count
        kinds = np.empty(len(self), dtype=object)
        kinds[:] = list(zip(self.source, self.source_exponent.tolist(), scale.tolist(), strict=True))
        names, inverse = _factorize(kinds)
        for number, (source, source_exponent, k) in enumerate(names):
            grid = None if source in (MIXED, NOTHING) else get_format(source)
            table = rounding_table(fmt, scale_exponent=k, source=grid, source_exponent=source_exponent)
            rows = np.flatnonzero(inverse == number)
            for start in range(0, len(rows), _CHUNK):
                part = rows[start : start + _CHUNK]
                columns = answer(
                    self.counts[part], fmt, table, scale_exponent=k,
                    elements=elements[part], amax=self.amax[part], amin=self.amin_nonzero[part], sumsq=self.sumsq[part],
                    weights=None if self.weights is None else self.weights[part],
                )  # fmt: skip
                for name, values in columns.items():
                    out[name][part] = values
        return out


@dataclass(frozen=True, eq=False)
class TensorStats:
    """Statistics of one tensor: the fields of StatsTable for a single row, as numbers and one array [BINS].

    Mergeable: `s + t` are the statistics of the two tensors together.
    """

    counts: NDArray[np.int64]
    zeros: int = 0
    pos_inf: int = 0
    neg_inf: int = 0
    nan: int = 0
    amax: float = 0.0
    amin_nonzero: float = float("inf")
    sum: float = 0.0
    sumsq: float = 0.0
    source: str = NOTHING
    weights: NDArray[np.float64] | None = None
    source_exponent: int = 0

    @classmethod
    def empty(cls) -> TensorStats:
        """The statistics of nothing: s + TensorStats.empty() equals s."""
        return cls(counts=np.zeros(BINS, np.int64))

    @classmethod
    def from_table(cls, table: StatsTable, index: int) -> TensorStats:
        """Row `index` of a table."""
        columns = ((f.name, getattr(table, f.name)) for f in fields(table))
        row: dict[str, Any] = {name: None if column is None else column[index] for name, column in columns}
        for name, value in row.items():
            if isinstance(value, np.ndarray):
                row[name] = value.copy()
            elif isinstance(value, np.generic):
                row[name] = value.item()
        return cls(**row)

    def table(self) -> StatsTable:
        """These statistics as a StatsTable of one row."""
        columns = ((f.name, getattr(self, f.name)) for f in fields(self))
        rows: dict[str, Any] = {name: None if value is None else np.array([value]) for name, value in columns}
        return StatsTable(**rows)

    def __add__(self, other: TensorStats) -> TensorStats:
        if not isinstance(other, TensorStats):
            return NotImplemented
        return StatsTable.concat([self.table(), other.table()]).group([0, 0], 1).row(0)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorStats):
            return NotImplemented
        return all(np.array_equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    def shift(self, k: int) -> TensorStats:
        """The statistics of the values times 2^k; see StatsTable.shift."""
        return self.table().shift(k).row(0)

    def ask(self, fmt: str | FloatFormat, *, scale_exponent: int = 0) -> FormatAnswer:
        """What rounding the values times 2^scale_exponent to `fmt` would do."""
        columns = self.table().ask(fmt, scale_exponent=scale_exponent)
        return FormatAnswer(**{name: float(column[0]) for name, column in columns.items()})

    @property
    def count(self) -> int:
        """All elements, zeros and non-finite ones included."""
        return int(self.counts.sum()) + self.zeros + self.nonfinite

    @property
    def nonfinite(self) -> int:
        """Infinities and NaN."""
        return self.pos_inf + self.neg_inf + self.nan

    @property
    def mean(self) -> float:
        """Mean of the finite values; NaN if there is none."""
        finite = self.count - self.nonfinite
        return self.sum / finite if finite else float("nan")

    @property
    def rms(self) -> float:
        """Root mean square of the finite values; NaN if there is none."""
        finite = self.count - self.nonfinite
        return (self.sumsq / finite) ** 0.5 if finite else float("nan")

    @property
    def binades(self) -> tuple[int, int] | None:
        """Exponents of the lowest and the highest populated binade, or None."""
        populated = BINADES[self.counts > 0]
        return (int(populated[0]), int(populated[-1])) if len(populated) else None

    def __str__(self) -> str:
        text = f"{self.count:,} values ({self.source})"
        if self.binades:
            lo, hi = self.binades
            text += f": amax {self.amax:.4g}, smallest non-zero {self.amin_nonzero:.4g}, rms {self.rms:.4g}, "
            text += f"binades 2^{lo} to 2^{hi}"
        special = {"zeros": self.zeros, "+inf": self.pos_inf, "-inf": self.neg_inf, "nan": self.nan}
        return "; ".join([text, *(f"{number:,} {name}" for name, number in special.items() if number)])


def _sum_priced(weights: NDArray[np.float64], starts: NDArray) -> NDArray[np.float64]:
    """Sums of runs of rows of weights; rows of NaN count only where a run has no others."""
    unknown = np.isnan(weights).all(axis=1)
    sums = np.add.reduceat(np.where(unknown[:, None], 0.0, weights), starts, axis=0)
    sums[np.logical_and.reduceat(unknown, starts)] = np.nan
    return sums


def _factorize(names: NDArray[np.object_]) -> tuple[list, NDArray[np.int64]]:
    """Distinct entries in order of appearance, and for each row the number of its entry."""
    seen: dict = {}
    inverse = np.fromiter((seen.setdefault(name, len(seen)) for name in names), dtype=np.int64, count=len(names))
    return list(seen), inverse


def _common_source(source: NDArray[np.object_], filled: NDArray[np.bool_], starts: NDArray) -> list[str]:
    """For each run of rows: the source they share. Empty rows speak only where no row of the run is filled."""
    names, code = _factorize(source)
    speaks = filled | ~np.repeat(np.logical_or.reduceat(filled, starts), np.diff([*starts, len(source)]))
    speaks &= source != NOTHING
    low = np.minimum.reduceat(np.where(speaks, code, len(names)), starts)
    high = np.maximum.reduceat(np.where(speaks, code, -1), starts)
    return [NOTHING if h < 0 else names[l] if l == h else MIXED for l, h in zip(low, high, strict=True)]
