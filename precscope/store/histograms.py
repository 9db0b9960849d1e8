"""Histograms as lists of their filled binades, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..histogram import BINS, EXP_LO
from .arrays import flags, numbers, plain

if TYPE_CHECKING:
    import pyarrow as pa


def trim(counts: np.ndarray, *, unknown: np.ndarray | None = None) -> tuple[np.ndarray, pa.Array]:
    """Histograms int64 or float64 [S, BINS] as (first filled binade int16[S], Arrow list[S] up to the last filled one).

    unknown: bool[S], rows whose list is null.
    """
    import pyarrow as pa

    seen = np.flatnonzero(counts.any(0))  # a third of the bins or fewer: the rest need not be looked at again
    begin, end = (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, 1)
    counts = counts[:, begin:end]
    filled = counts != 0
    if unknown is not None:
        filled &= ~unknown[:, None]
    some = filled.any(1)
    first = np.where(some, filled.argmax(1), 0)
    last = np.where(some, end - begin - filled[:, ::-1].argmax(1), 0)
    column = np.arange(end - begin, dtype=np.int16)
    values = counts[(column >= first[:, None]) & (column < last[:, None])]
    offsets = np.concatenate([[0], np.cumsum(last - first)]).astype(np.int32)
    mask = None if unknown is None else flags(unknown)
    lists = pa.ListArray.from_arrays(numbers(offsets), numbers(values), mask=mask)
    return (np.where(some, first + begin, 0) + EXP_LO).astype(np.int16), lists


def places(lo: np.ndarray, lists: pa.ListArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each list element its row, its bin and its value: three arrays of equal length. lo: first binades int16[S],
    NaN or anything else where the list is null or empty."""
    offsets = plain(lists.offsets)
    lengths = np.diff(offsets)
    values = plain(lists.values)[offsets[0] : offsets[-1]]
    rows = np.repeat(np.arange(len(lists)), lengths)
    start = np.nan_to_num(np.asarray(lo, dtype=np.float64)).astype(np.int64) - EXP_LO
    return rows, np.arange(len(values)) + np.repeat(start - (offsets[:-1] - offsets[0]), lengths), values


def expand(lo: np.ndarray, lists: pa.ListArray, dtype: type = np.int64) -> np.ndarray:
    """Inverse of the trimming: `dtype` [S, BINS] from first binades int16[S] and Arrow lists. Null rows are empty."""
    out = np.zeros((len(lists), BINS), dtype)
    rows, bins, values = places(lo, lists)
    out[rows, bins] = values
    return out
