"""Sums over steps, kept per site: what a recorder keeps while it writes, and a reader makes of parts.

Memory: 2.4 kB a site, however many steps are added; 2.3 kB more for a site with updates, and for one with weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from ..histogram import BINS
from ..sites import Role, Site
from ..stats import MIXED, NOTHING, StatsTable
from .arrays import plain
from .histograms import places
from .schema import CHANGES

if TYPE_CHECKING:
    import pyarrow as pa

_FAR = np.iinfo(np.int64).max
_SUMMED = ("zeros", "pos_inf", "neg_inf", "nan", "sum", "sumsq", "count")
_NEUTRAL = {
    "zeros": 0, "pos_inf": 0, "neg_inf": 0, "nan": 0, "sum": 0.0, "sumsq": 0.0, "count": 0, "rows": 0, "count_most": 0,
    "amax": 0.0, "amin_nonzero": np.inf, "exponent": _FAR, "filled_source": -1, "empty_source": -1, "ratio_row": -1,
}  # fmt: skip


class _Histograms:
    """Growing rows of bins."""

    def __init__(self, dtype: type) -> None:
        self.rows, self.used = np.zeros((0, BINS), dtype), 0

    def reserve(self, n: int) -> None:
        """Make room for n rows; an eighth more, so that sites that come one by one do not copy all each time."""
        if n > len(self.rows):
            grown = np.zeros((n if self.used == 0 else n + n // 8, BINS), self.rows.dtype)
            grown[: self.used] = self.rows[: self.used]
            self.rows = grown
        self.used = max(self.used, n)

    def add(self, keys: np.ndarray, lo: np.ndarray, lists: pa.ListArray) -> None:
        rows, bins, values = places(lo, lists)
        np.add.at(self.rows.reshape(-1), keys[rows] * BINS + bins, values)

    @property
    def table(self) -> np.ndarray:
        return self.rows[: self.used]


class Totals:
    """Statistics of sites, summed over the rows added so far.

    sites: Site -> its number, in the order of appearance. steps: those of the rows.
    """

    def __init__(self) -> None:
        self.sites: dict[Site, int] = {}
        self.steps: set[int] = set()
        self._column = {name: np.zeros(0, type(neutral)) for name, neutral in _NEUTRAL.items()}
        self._counts, self._ratios = _Histograms(np.int64), _Histograms(np.int64)
        self._ratio_counts = np.zeros((0, 2), np.int64)  # unchanged, from zero
        self._weights: _Histograms | None = None
        self._priced = np.zeros(0, bool)
        self._changes: dict[str, np.ndarray] = {}
        self._sources: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.sites)

    # adding

    def number(self, sites: Iterable[Site]) -> np.ndarray:
        """Numbers of the sites, int64; new ones get the next."""
        known = self.sites
        keys = np.asarray([known.setdefault(site, len(known)) for site in sites], np.int64)
        self._reserve()  # here: the rows may never come, where the disk is full
        return keys

    def keys_of(self, part: pa.Table) -> np.ndarray:
        """The site's number of each row of a table with the columns of a site."""
        names, keys = sites_of(part)
        return self.number(names)[keys]

    def add(self, part: pa.Table, keys: np.ndarray | None = None) -> None:
        """Add the rows of a part, or of an aggregate. keys: int64[rows], numbers of their sites, where known."""
        keys = self.keys_of(part) if keys is None else keys
        column = {name: part.column(name).combine_chunks() for name in part.column_names}
        own, filled = self._column, plain(column["count"]) > 0
        for name in _SUMMED:
            np.add.at(own[name], keys, plain(column[name]))
        np.maximum.at(own["amax"], keys, plain(column["amax"]))
        np.maximum.at(own["count_most"], keys, plain(column["count_most" if "count_most" in column else "count"]))
        np.minimum.at(own["amin_nonzero"], keys, plain(column["amin_nonzero"]))
        np.minimum.at(own["exponent"], keys[filled], _exponents(column)[filled])
        np.add.at(own["rows"], keys, plain(column["rows"]) if "rows" in column else 1)
        self._counts.add(keys, plain(column["hist_lo"]), column["hist"])
        self._add_sources(keys, filled, column["source"])
        self._add_ratios(keys, column)
        if "weights" in column:
            self._add_prices(keys, column)
        if "step" in column:
            self.steps.update(np.unique(plain(column["step"])).tolist())

    def _reserve(self) -> None:
        n, before = len(self.sites), len(self._priced)
        if n > before:
            for name, neutral in _NEUTRAL.items():
                self._column[name] = np.concatenate([self._column[name], np.full(n - before, neutral)])
            self._priced = np.concatenate([self._priced, np.zeros(n - before, bool)])
            for fmt, squares in self._changes.items():
                self._changes[fmt] = np.concatenate([squares, np.full(n - before, np.nan)])
        self._counts.reserve(n)
        if self._weights is not None:
            self._weights.reserve(n)

    def _add_sources(self, keys: np.ndarray, filled: np.ndarray, source: pa.DictionaryArray) -> None:
        """The format that a site's rows share, "mixed" where they differ; empty rows speak only among themselves."""
        names = source.dictionary.to_pylist()
        code = np.asarray([self._sources.setdefault(name, len(self._sources)) for name in names], np.int64)
        codes = code[plain(source.indices)]
        speaks = codes != self._sources.get(NOTHING, -1)
        mixed = self._sources.setdefault(MIXED, len(self._sources))
        for name, rows in (("filled_source", filled & speaks), ("empty_source", ~filled & speaks)):
            low, high = np.full(len(self), _FAR), self._column[name].copy()
            np.minimum.at(low, keys[rows], codes[rows])
            np.maximum.at(high, keys[rows], codes[rows])
            known = self._column[name]
            low = np.where(known >= 0, np.minimum(low, known), low)
            self._column[name] = np.where((high >= 0) & (low != high), mixed, high)

    def _add_ratios(self, keys: np.ndarray, column: dict[str, pa.Array]) -> None:
        rows = np.flatnonzero(plain(column["ratio_unchanged"].is_valid()))
        if not len(rows):
            return
        at = self._column["ratio_row"]
        new = np.unique(keys[rows])
        new = new[at[new] < 0]
        at[new] = self._ratios.used + np.arange(len(new))
        self._ratios.reserve(self._ratios.used + len(new))
        more = self._ratios.used - len(self._ratio_counts)
        self._ratio_counts = np.concatenate([self._ratio_counts, np.zeros((more, 2), np.int64)])
        keys = at[keys[rows]]
        self._ratios.add(keys, plain(column["ratio_lo"].take(rows)), column["ratio"].take(rows))
        for i, name in enumerate(("ratio_unchanged", "ratio_from_zero")):
            np.add.at(self._ratio_counts[:, i], keys, plain(column[name].take(rows)))

    def _add_prices(self, keys: np.ndarray, column: dict[str, pa.Array]) -> None:
        if self._weights is None:
            self._weights = _Histograms(np.float64)
            self._weights.reserve(len(self))
        self._priced[keys[plain(column["weights"].is_valid())]] = True
        self._weights.add(keys, plain(column["weights_lo"]), column["weights"])
        for fmt in CHANGES:
            squares = self._changes.setdefault(fmt, np.full(len(self), np.nan))
            rows = np.flatnonzero(plain(column[f"change_{fmt}"].is_valid()))
            at = keys[rows]
            squares[at] = np.where(np.isnan(squares[at]), 0.0, squares[at])
            np.add.at(squares, at, plain(column[f"change_{fmt}"].take(rows)) ** 2)

    # reading

    @property
    def rows(self) -> np.ndarray:
        """How many rows each site has: int64[S]."""
        return self._column["rows"]

    @property
    def most(self) -> np.ndarray:
        """The largest count of one row of each site: int64[S]."""
        return self._column["count_most"]

    def table(self, *, world: int = 0) -> StatsTable:
        """The sums, a row per site. world: processes by whose number gradients were divided after they were seen; that
        moves the grid of the format they had, as a loss scale does."""
        column, names = self._column, list(self._sources)
        source = np.where(column["count"] > 0, column["filled_source"], column["empty_source"])
        known = column["exponent"] != _FAR
        gradient = np.asarray([site.role.is_gradient for site in self.sites], bool)
        shift = (max(world, 1).bit_length() - 1) * gradient
        weights = None
        if self._weights is not None:
            weights = np.where(self._priced[:, None], self._weights.table, np.nan)
        return StatsTable(
            counts=self._counts.table,
            **{n: column[n] for n in ("zeros", "pos_inf", "neg_inf", "nan", "amax", "amin_nonzero", "sum", "sumsq")},
            source=[NOTHING if code < 0 else names[code] for code in source.tolist()],
            weights=weights,
            source_exponent=np.where(known, column["exponent"] - np.where(known, shift, 0), 0),
        )

    def ratios(self) -> dict[int, tuple[np.ndarray, int, int]]:
        """Number of a site -> (histogram of floor(log2|dw|) - floor(log2|w|) int64[BINS], unchanged, from zero)."""
        rows = self._column["ratio_row"]
        numbers = self._ratio_counts.tolist()
        return {int(site): (self._ratios.rows[rows[site]], *numbers[rows[site]]) for site in np.flatnonzero(rows >= 0)}

    def squared_changes(self) -> dict[str, np.ndarray]:
        """Format -> sum over steps of the squared change of the loss when the tensor is rounded, NaN where none was."""
        return {fmt: self._changes.get(fmt, np.full(len(self), np.nan)) for fmt in CHANGES}


def sites_of(part: pa.Table) -> tuple[list[Site], np.ndarray]:
    """(sites, in the order of their first rows; int64[rows], which of them each row is of)."""
    parts, codes = [], []
    for name in ("module", "role", "tensor"):
        column = part.column(name).combine_chunks()
        parts.append(column.dictionary.to_pylist())
        codes.append(plain(column.indices).astype(np.int64))
    calls, call = np.unique(plain(part.column("call").combine_chunks()), return_inverse=True)
    modules, roles, tensors = parts
    roles = [Role(r) for r in roles]
    mixed = ((codes[0] * max(len(roles), 1) + codes[1]) * max(len(tensors), 1) + codes[2]) * max(len(calls), 1) + call
    _, first, inverse = np.unique(mixed, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    rows = first[order]
    found = zip(codes[0][rows].tolist(), codes[1][rows].tolist(), call[rows].tolist(), codes[2][rows].tolist(),
                strict=True)  # fmt: skip
    return [Site(modules[m], roles[r], int(calls[c]), tensors[t]) for m, r, c, t in found], place[inverse]


def _exponents(column: dict[str, pa.Array]) -> np.ndarray:
    """By which powers of two values were multiplied since they were seen: what was divided out of gradients."""
    if "source_exponent" in column:
        return plain(column["source_exponent"])
    return 1 - np.frexp(plain(column["loss_scale"]))[1].astype(np.int64)
