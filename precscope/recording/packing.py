"""Rows of statistics as dense arrays that an all_reduce merges, and back.

Each process lays its rows out in the order that all have agreed on; where it has nothing to add, the neutral element
stands. What `StatsTable.group` does to rows of one process (counts and sums add, extremes are kept, a source that is
not everywhere the same is "mixed") a SUM and a MAX then do to those of all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ..formats import format_names
from ..histogram import BINS
from ..sites import Role, Site
from ..stats import MIXED, NOTHING, StatsTable
from ..store import CHANGES
from .observations import Rows

_SOURCES = (NOTHING, MIXED, *format_names())
_INTEGERS = ("zeros", "pos_inf", "neg_inf", "nan")
_ABSENT = -1e9  # below every code and exponent: the neutral element of MAX
_AMAX, _AMIN, _HIGH, _LOW, _EMPTY_HIGH, _EMPTY_LOW, _EXPONENT, _SCALE = range(8)

Key = tuple[int, Site]


@dataclass
class Dense:
    """counts: int64 [n, BINS + 4], to be summed. ratios: int64 [u, BINS + 3], of the u update rows, to be summed.
    sums: float64 [n, 2], [n, 2 + BINS + 1 + C] where there are weights or CHANGES (C = 5), to be summed. tops: float64
    [n, 8], of which the largest stays; what is to be smallest is there with its sign turned.
    """

    counts: torch.Tensor
    ratios: torch.Tensor
    sums: torch.Tensor
    tops: torch.Tensor

    def add_zeros(self, elements: dict[int, int]) -> None:
        """Count more elements as zeros: row -> how many."""
        for row, number in elements.items():
            self.counts[row, BINS] += number

    def to_sum(self) -> Iterator[torch.Tensor]:
        """The arrays to be summed over processes, in place; an empty one is so on all of them."""
        yield from (x for x in (self.counts, self.ratios, self.sums) if x.numel())


def pack(rows: Rows, index: np.ndarray, counted: np.ndarray, keys: list[Key], *, priced: bool) -> Dense:
    """index: int64, where each of `rows` stands in `keys`. counted: bool[len(keys)], which of them this process adds
    to. priced: whether any process has weights."""
    own = np.flatnonzero(counted[index])
    at, n = index[own], len(keys)
    table = rows.table.take(own)
    counts = np.zeros((n, BINS + 4), np.int64)
    counts[at, :BINS] = table.counts
    for column, name in enumerate(_INTEGERS):
        counts[at, BINS + column] = getattr(table, name)
    sums = np.zeros((n, 2 + (BINS + 2 + len(CHANGES) if priced else 0)))
    sums[at, 0], sums[at, 1] = table.sum, table.sumsq
    if priced:
        _pack_prices(sums, rows, own, at, table)
    return Dense(*map(torch.from_numpy, (counts, _pack_ratios(rows, own, at, keys), sums, _tops(rows, own, at, n))))


def _pack_prices(sums: np.ndarray, rows: Rows, own: np.ndarray, at: np.ndarray, table: StatsTable) -> None:
    """Columns 2...: weights and whether they are known, changes and whether they are known."""
    if table.weights is not None:
        known = ~np.isnan(table.weights).all(1)
        sums[at[known], 2 : 2 + BINS] = table.weights[known]
        sums[at, 2 + BINS] = known
    for row, place in zip(own.tolist(), at.tolist(), strict=True):
        if row in rows.changes:
            sums[place, 3 + BINS :] = [1.0, *rows.changes[row]]


def _pack_ratios(rows: Rows, own: np.ndarray, at: np.ndarray, keys: list[Key]) -> np.ndarray:
    where = {place: u for u, place in enumerate(_updates(keys))}
    ratios = np.zeros((len(where), BINS + 3), np.int64)
    for row, place in zip(own.tolist(), at.tolist(), strict=True):
        if row in rows.ratios:
            histogram, unchanged, from_zero = rows.ratios[row]
            ratios[where[place], :BINS] = histogram
            ratios[where[place], BINS:] = unchanged, from_zero, 1
    return ratios


def _updates(keys: list[Key]) -> list[int]:
    return [i for i, (_, site) in enumerate(keys) if site.role is Role.UPDATE]


def _tops(rows: Rows, own: np.ndarray, at: np.ndarray, n: int) -> np.ndarray:
    table = rows.table.take(own)
    tops = np.full((n, 8), _ABSENT)
    tops[at, _AMAX], tops[at, _AMIN] = table.amax, -table.amin_nonzero
    tops[:, _AMIN][~np.isin(np.arange(n), at)] = -np.inf
    code = np.asarray([_SOURCES.index(s) if s in _SOURCES else 1 for s in table.source], float)
    filled, speaks = table.count > 0, code != 0
    for high, low, chosen in ((_HIGH, _LOW, filled & speaks), (_EMPTY_HIGH, _EMPTY_LOW, ~filled & speaks)):
        tops[at[chosen], high], tops[at[chosen], low] = code[chosen], -code[chosen]
    tops[at[filled], _EXPONENT] = -table.source_exponent[filled]
    tops[at, _SCALE] = rows.loss_scale[own]
    return tops


def unpack(dense: Dense, keys: list[Key], *, priced: bool) -> Rows:
    """The rows of all processes."""
    counts, ratios, sums, tops = (x.numpy() for x in (dense.counts, dense.ratios, dense.sums, dense.tops))
    table = StatsTable(
        counts=counts[:, :BINS].copy(),
        **{name: counts[:, BINS + column].copy() for column, name in enumerate(_INTEGERS)},
        amax=np.maximum(tops[:, _AMAX], 0.0), amin_nonzero=-tops[:, _AMIN], sum=sums[:, 0], sumsq=sums[:, 1],
        source=_sources(tops),  # type: ignore[arg-type]
        weights=np.where(sums[:, 2 + BINS, None] > 0, sums[:, 2 : 2 + BINS], np.nan) if priced else None,
        source_exponent=np.where(tops[:, _EXPONENT] > _ABSENT, -tops[:, _EXPONENT], 0).astype(np.int64),
    )  # fmt: skip
    changes = {}
    if priced:
        changes = {int(i): sums[i, 4 + BINS :].tolist() for i in np.flatnonzero(sums[:, 3 + BINS])}
    found = {
        place: (row[:BINS], int(row[BINS]), int(row[BINS + 1]))
        for place, row in zip(_updates(keys), ratios, strict=True)
        if row[BINS + 2]
    }
    scale = np.where(tops[:, _SCALE] > 0, tops[:, _SCALE], 1.0)
    steps = np.asarray([step for step, _ in keys], np.int64)
    return Rows(steps, [site for _, site in keys], table, scale, found, changes, np.zeros(len(keys), bool))


def _sources(tops: np.ndarray) -> list[str]:
    """What filled rows agree on; where no row is filled, what empty ones do."""
    filled = tops[:, _HIGH] > _ABSENT
    high = np.where(filled, tops[:, _HIGH], tops[:, _EMPTY_HIGH])
    low = -np.where(filled, tops[:, _LOW], tops[:, _EMPTY_LOW])
    return [NOTHING if h == _ABSENT else _SOURCES[int(h)] if h == l else MIXED for h, l in zip(high, low, strict=True)]
