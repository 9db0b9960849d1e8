"""The scalars of every (step, site), read from the parts when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ..errors import RunDirectoryError
from ..sites import Site
from .arrays import plain
from .parts import of_steady_parts, read_part
from .schema import SCALARS, SITE
from .totals import sites_of

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

T = TypeVar("T")
HISTORY = ("step", *SITE, "source", *SCALARS)
_TEXT = ("module", "role", "tensor", "source")


def read_history(
    directories: Iterable[Path],
    kind: str,
    columns: Sequence[str],
    use: Callable[[Iterator[pa.Table]], T],
    *,
    last: int | None = None,
    least: int = 0,
    damaged: Collection[str] = (),
    skip_damaged: bool = False,
) -> T:
    """use(these columns of all parts of one kind, a table per part), once more where parts moved meanwhile.

    last: the largest step, later ones are left out (the run went on since). least: rows that there must be. damaged:
    paths of parts that are left out. Raises RunDirectoryError where parts are gone or damaged.
    """
    wanted = tuple(dict.fromkeys((*columns, "step")))

    def tables(parts: dict[Path, list[Path]]) -> Iterator[pa.Table]:
        rows = 0
        for path in (p for paths in parts.values() for p in paths if str(p) not in damaged):
            try:
                table = _until(read_part(path, kind=kind, columns=wanted), last)
            except RunDirectoryError:
                if not skip_damaged:
                    raise
                continue
            rows += table.num_rows
            yield table
        if rows < least and not skip_damaged:
            raise RunDirectoryError(
                f"{next(iter(parts), 'the run')} has lost rows since it was loaded ({least:,} then, {rows:,} now): "
                "load it again"
            )

    return of_steady_parts(directories, kind, lambda parts: use(tables(parts)))


def _until(table: pa.Table, last: int | None) -> pa.Table:
    import pyarrow.compute as pc

    if last is None or not table.num_rows or pc.max(table.column("step")).as_py() <= last:
        return table
    return table.filter(pc.less_equal(table.column("step"), last))


def joined(tables: Iterable[pa.Table], columns: Sequence[str], roles: Collection[str] | None) -> pd.DataFrame:
    """The rows of all tables whose role is one of `roles` (None: all), text as categories."""
    import pandas as pd
    import pyarrow as pa
    import pyarrow.compute as pc

    kept = []
    for table in tables:
        if roles is not None:
            table = table.filter(pc.is_in(table.column("role"), pa.array(list(roles), pa.string())))
        kept.append(table.select(columns))
    if not kept:
        return pd.DataFrame(columns=list(columns))
    table = pa.concat_tables(kept).unify_dictionaries()
    del kept, tables
    return table.to_pandas(split_blocks=True, self_destruct=True)


@dataclass(frozen=True)
class Peaks:
    """The largest magnitude of each (module, role, call) at each recorded step: 9 bytes for each.

    sites: S of them, tensor "", in the order of recording. steps: int64[T], ascending. amax: float64[S, T], NaN where
    the site was not recorded. broken: uint8[S, T], 0 where all values were finite, 1 where -inf (what masks write)
    alone was among them, 2 where +inf or NaN was.
    """

    sites: list[Site]
    steps: np.ndarray
    amax: np.ndarray
    broken: np.ndarray

    COLUMNS = ("step", *SITE, "amax", "pos_inf", "neg_inf", "nan")

    @classmethod
    def of(cls, tables: Iterable[pa.Table], sites: Iterable[Site], steps: Sequence[int]) -> Peaks:
        """tables: with COLUMNS; rows of other sites and steps are left out."""
        number: dict[Site, int] = {}
        for site in sites:
            number.setdefault(site._replace(tensor=""), len(number))
        at = np.asarray(sorted(steps), np.int64)
        amax = np.full((len(number), len(at)), -1.0)
        broken = np.zeros(amax.shape, np.uint8)
        for table in tables:
            if not table.num_rows or not amax.size:
                continue
            names, keys = sites_of(table)
            rows = np.asarray([number.get(s._replace(tensor=""), -1) for s in names], np.int64)[keys]
            column = {name: plain(table.column(name).combine_chunks()) for name in cls.COLUMNS if name not in _TEXT}
            place = np.minimum(np.searchsorted(at, column["step"]), len(at) - 1)
            keep = (rows >= 0) & (at[place] == column["step"])
            cell = (rows * len(at) + place)[keep]
            np.maximum.at(amax.reshape(-1), cell, column["amax"][keep])
            bad = np.where(column["pos_inf"] + column["nan"] > 0, 2, np.where(column["neg_inf"] > 0, 1, 0))
            np.maximum.at(broken.reshape(-1), cell, bad[keep].astype(np.uint8))
        amax[amax < 0] = np.nan
        return cls(list(number), at, amax, broken)


def as_arrow(frame: pd.DataFrame, columns: Sequence[str]) -> pa.Table:
    """These columns of a DataFrame as the parts have them, text in dictionaries; "" or 0 where it lacks one."""
    import pyarrow as pa

    arrays = []
    for name in columns:
        values = frame[name] if name in frame else np.zeros(len(frame), np.int64)
        if name in _TEXT:
            text = values.astype(object) if name in frame else np.full(len(frame), "", object)
            arrays.append(pa.array(text, pa.string()).dictionary_encode())
        else:
            arrays.append(pa.array(values))
    return pa.table(dict(zip(columns, arrays, strict=True)))
