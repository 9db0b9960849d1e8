"""What a recorder writes its rows with.

A large model fills a part with the rows of one step, a small one with a few hundred rows. Both make many files, in
which nothing repeats. So small parts are put together once there are enough: rows by site, then by step, take a tenth
less, and a long run stays at a few hundred files. At these moments, and when it is closed, the writer also writes the
sums that it has kept (aggregate.py). A row is written twice, a few times more where parts have but a few rows. What is
put together at a time is bounded: by `_MERGED_ROWS`, or four rows of each site.

None of this may end a run: what cannot be read, written or removed on the way stays as it is, and loads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import RunDirectoryError
from ..histogram import BINS
from ..sites import Role, Site
from ..stats import StatsTable
from .aggregate import Fingerprint, load_totals, write_aggregate
from .arrays import coded, flags, numbers, plain, text
from .files import settle
from .histograms import trim
from .parts import next_number, part_numbers, part_path, read_part, write_part
from .schema import CHANGES, part_schema
from .totals import Totals

if TYPE_CHECKING:
    import pyarrow as pa

_MERGED_ROWS, _MERGED_PARTS = 32_768, 64
_ROLES = list(Role)


class StatsWriter:
    """Writes stats-NNNNNN.parquet parts into a run directory, or those of kind "shadow".

    A row's `ratio` columns hold, for role "update", the histogram of floor(log2|dw|) - floor(log2|w|). `weights`, in
    shadow parts, is the gradient-weighted histogram, null where no gradient arrived. `close` it at the end: a directory
    whose writer was not closed loads all the same, more slowly.
    """

    def __init__(self, directory: Path, *, kind: str = "stats") -> None:
        import pyarrow.parquet  # noqa: F401  # takes half a second, better now than in the middle of a run

        self.directory, self.kind = directory, kind
        self._next = next_number(directory, kind)
        self._names = _Names()
        self._totals, self._covered = Totals(), []
        self._summing = kind == "stats"
        self._small: list[tuple[Path, int]] = []
        self._behind = False  # whether there are rows that aggregate.parquet lacks
        if self._summing and self._next > 1:
            try:
                self._totals, self._covered = load_totals(directory)
            except (RunDirectoryError, OSError, ValueError):  # a damaged part: that is for the reader to say
                self._totals, self._covered, self._summing = Totals(), [], False

    def write(
        self,
        steps: np.ndarray,
        sites: list[Site],
        table: StatsTable,
        loss_scale: np.ndarray,
        ratios: dict[int, tuple[np.ndarray, int, int]],
        changes: Mapping[int, Sequence[float]] = {},
        tidy: bool = True,
    ) -> Path | None:
        """Write one part of len(sites) rows; None where there is nothing to write.

        steps: int64[S]. table: the statistics, loss scale already divided out. loss_scale: float64[S], 1 where none.
        ratios: row -> (histogram int64[BINS], elements that did not change, elements that left zero). changes: row ->
        first-order change of the loss when the tensor is rounded to each of CHANGES (kind "shadow"). tidy: put small
        parts together where it is time; False leaves that to a call of `tidy`, when the caller has let go of `table`.
        """
        if not sites:
            return None
        keys = self._totals.number(sites)
        part = self._part(steps, keys, table, loss_scale, ratios, changes)
        path = part_path(self.directory, self.kind, self._next)
        write_part(path, part)
        self._next += 1
        if self.kind == "stats":
            self._small.append((path, len(sites)))
        if self._summing:
            self._totals.add(part, keys)
            self._behind = True
            self._cover(path)
        if tidy:
            self.tidy()
        return path

    def close(self) -> None:
        """Write the sums. They can be made again from the parts, so that a full disk is no error here."""
        if self._summing and self._behind:
            with contextlib.suppress(RunDirectoryError):
                write_aggregate(self.directory, self._totals, self._covered)
                self._behind = False

    def tidy(self) -> None:
        """Put small parts together where there are enough of them. One that cannot be read or written stays."""
        import pyarrow as pa

        rows = sum(n for _, n in self._small)
        enough = max(_MERGED_ROWS, 4 * len(self._totals))  # the sums are written each time, a row per site
        if len(self._small) < 2 or (rows < enough and len(self._small) < _MERGED_PARTS):
            return
        small, self._small = self._small, []
        with contextlib.suppress(RunDirectoryError, OSError, ValueError, pa.ArrowException):
            merged = self._merge([path for path, _ in small])
            if rows < enough:
                self._small = [(merged, rows)]

    # internals

    def _part(
        self,
        steps: np.ndarray,
        keys: np.ndarray,
        table: StatsTable,
        loss_scale: np.ndarray,
        ratios: dict[int, tuple[np.ndarray, int, int]],
        changes: Mapping[int, Sequence[float]],
    ) -> pa.Table:
        import pyarrow as pa

        columns: dict[str, Any] = {
            "step": steps, "source": coded([str(name) for name in table.source]),
            "count": table.count, "loss_scale": loss_scale,
            **self._names.columns(self._totals.sites, keys),
        }  # fmt: skip
        for name in ("zeros", "pos_inf", "neg_inf", "nan", "amax", "amin_nonzero", "sum", "sumsq"):
            columns[name] = getattr(table, name)
        columns["hist_lo"], columns["hist"] = trim(table.counts)
        columns |= _ratio_columns(ratios, len(keys))
        if self.kind == "shadow":
            columns |= _price_columns(table.weights, changes, len(keys))
        schema = part_schema(self.kind)
        arrays = [c if isinstance(c := columns[f.name], pa.Array) else numbers(c, f.type) for f in schema]
        return pa.Table.from_arrays(arrays, schema=schema)

    def _cover(self, path: Path, instead_of: Sequence[Path] = ()) -> None:
        """The sums cover the part at `path` from now on, and no longer those that it holds."""
        gone = {other.name for other in instead_of}
        try:
            self._covered = [part for part in self._covered if part.name not in gone] + [Fingerprint.of(path)]
        except OSError:  # removed or out of reach: no sums that say what they are of
            self._summing = False

    def _merge(self, paths: list[Path]) -> Path:
        import pyarrow as pa

        table = pa.concat_tables([read_part(path) for path in paths]).unify_dictionaries().combine_chunks()
        keys = self._totals.keys_of(table)
        table = table.take(numbers(np.lexsort((plain(table.column("step").combine_chunks()), keys))))
        spans = [part_numbers(path) for path in paths]
        merged = part_path(self.directory, self.kind, spans[0][0], spans[-1][1])  # type: ignore[index]
        write_part(merged, table, by_site=True)
        del table
        pa.default_memory_pool().release_unused()
        settle(self.directory)
        if self._summing:
            self._behind = True
            self._cover(merged, instead_of=paths)
            self.close()
        for path in paths:  # the merged one holds them, see list_parts; one that a reader has open on Windows stays
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        return merged


class _Names:
    """The columns that name a site, as codes that are looked up once per site and not once per row."""

    def __init__(self) -> None:
        self._modules: dict[str, int] = {}
        self._tensors: dict[str, int] = {}
        self._codes = np.zeros((0, 4), np.int32)  # module, role, call, tensor

    def columns(self, sites: Mapping[Site, int], keys: np.ndarray) -> dict[str, Any]:
        """For rows of the sites whose numbers are `keys`."""
        if len(sites) > len(self._codes):
            new = [
                (
                    self._modules.setdefault(s.module, len(self._modules)), _ROLES.index(s.role), s.call,
                    self._tensors.setdefault(s.tensor, len(self._tensors)),
                )
                for s in list(sites)[len(self._codes) :]
            ]  # fmt: skip
            self._codes = np.concatenate([self._codes, np.asarray(new, np.int32)])
        module, role, call, tensor = self._codes[keys].T

        return {
            "module": text(module, list(self._modules)), "role": text(role, [r.value for r in _ROLES]),
            "call": call, "tensor": text(tensor, list(self._tensors)),
        }  # fmt: skip


def _ratio_columns(ratios: dict[int, tuple[np.ndarray, int, int]], n: int) -> dict[str, Any]:
    """The four columns of n rows, null but in those of `ratios`."""
    import pyarrow as pa

    rows = sorted(ratios)
    counts, counted = np.zeros((len(rows), BINS), np.int64), np.zeros((n, 2), np.int64)
    for i, row in enumerate(rows):
        counts[i], *counted[row] = ratios[row]
    unknown = np.ones(n, bool)
    unknown[rows] = False
    few_lo, few = trim(counts)
    lo, lengths = np.zeros(n, np.int16), np.zeros(n, np.int64)
    lo[rows], lengths[rows] = few_lo, np.diff(plain(few.offsets))
    offsets = numbers(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    return {
        "ratio_lo": numbers(lo, unknown=unknown),
        "ratio": pa.ListArray.from_arrays(offsets, few.values, mask=flags(unknown)),
        "ratio_unchanged": numbers(counted[:, 0], unknown=unknown),
        "ratio_from_zero": numbers(counted[:, 1], unknown=unknown),
    }


def _price_columns(weights: np.ndarray | None, changes: Mapping[int, Sequence[float]], n: int) -> dict[str, Any]:
    """The columns that shadow parts have beside the others; weights float64[n, BINS], rows of NaN become null."""
    weights = np.full((n, BINS), np.nan) if weights is None else weights
    unknown = np.isnan(weights).all(1)
    lo, lists = trim(weights, unknown=unknown)
    table = np.zeros((n, len(CHANGES)))
    for row, values in changes.items():
        table[row] = values
    unchanged = np.ones(n, bool)
    unchanged[list(changes)] = False
    columns = {f"change_{fmt}": numbers(table[:, i], unknown=unchanged) for i, fmt in enumerate(CHANGES)}
    return {"weights_lo": numbers(lo, unknown=unknown), "weights": lists, **columns}
