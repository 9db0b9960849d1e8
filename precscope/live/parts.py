"""What a recorder has flushed to a run directory since one last looked. No torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import RunDirectoryError
from ..formats import FloatFormat
from ..sites import Role, Site
from ..stats import StatsTable
from ..store import Totals, list_parts, read_part

if TYPE_CHECKING:
    import pyarrow as pa

COUNTED = (Role.INPUT, Role.OUTPUT, Role.WEIGHT, Role.GRAD_INPUT, Role.GRAD_OUTPUT, Role.GRAD_WEIGHT)


@dataclass(frozen=True)
class Flushed:
    """Recorded steps that are new. sites: of module, role and call; table: their statistics, summed over `steps`, a row
    per site. reach: largest magnitude of each site as it was in the run, loss scale included, float64[sites]."""

    steps: tuple[int, ...]
    sites: list[Site]
    table: StatsTable
    reach: np.ndarray

    def nearest(self, format_of: Callable[[str], FloatFormat | None], n: int) -> list[tuple[float, Site, float, str]]:
        """(binades of head-room, site, largest magnitude, format) of the n sites nearest to the end of the format that
        their module computes in, nearest first. Modules without a format are left out, and so are sites that hold a
        value which another one holds exactly, too: it was handed on."""
        found: dict[tuple[float, str], tuple[float, Site, float, str]] = {}
        for site, reach in zip(self.sites, self.reach.tolist(), strict=True):
            fmt = format_of(site.module) if site.role in COUNTED else None
            if fmt is None or not reach > 0:
                continue
            key = reach, fmt.name
            if key not in found or _makes(site) > _makes(found[key][1]):
                found[key] = float(np.log2(fmt.max) - np.log2(reach)), site, reach, fmt.name
        return sorted(found.values(), key=lambda row: (row[0], str(row[1])))[:n]


class Parts:
    """Follows the parts of `directory`. Reading costs as much as was written, once per flush."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._number, self._step = 0, -1
        self._stamps: frozenset[str] = frozenset()

    def begin(self, step: int) -> None:
        """The run begins, or goes back to, `step`: what was recorded of it and of later steps is yet to come."""
        self._step, self._stamps = step - 1, frozenset()

    def look(self) -> Flushed | None:
        """What was flushed since the last look, None where nothing was. A part that cannot be read is left out: that is
        for those to say who read the run."""
        paths = list_parts(self.directory, "stats") if self.directory.is_dir() else []
        new = [p for p in paths if p.name not in self._stamps]
        if not new:
            return None
        self._stamps = frozenset(p.name for p in paths)
        tables = []
        for path in new:
            with contextlib.suppress(RunDirectoryError):
                table = read_part(path)
                later = np.flatnonzero(table.column("step").to_numpy() > self._step)
                if len(later):  # small parts are put together, and then hold what was seen before, too
                    tables.append(table if len(later) == table.num_rows else table.take(later))
        if not tables:
            return None
        made = flushed_of(tables)
        self._step = made.steps[-1]
        return made


def flushed_of(tables: list[pa.Table]) -> Flushed:
    totals, reached = Totals(), []
    for table in tables:
        keys = totals.keys_of(table)
        totals.add(table, keys)
        reached.append((keys, table.column("amax").to_numpy() * table.column("loss_scale").to_numpy()))
    reach = np.zeros(len(totals))
    for keys, values in reached:
        np.maximum.at(reach, keys, values)
    places: dict[Site, int] = {}
    to = np.asarray([places.setdefault(s._replace(tensor=""), len(places)) for s in totals.sites], np.int64)
    merged = np.zeros(len(places))
    np.maximum.at(merged, to, reach)
    return Flushed(tuple(sorted(totals.steps)), list(places), totals.table().group(to, len(places)), merged)


def _makes(site: Site) -> int:
    """Which of two sites with the same value is told: who makes it, rather than who takes it, the innermost first."""
    return 1000 * (site.role in (Role.OUTPUT, Role.WEIGHT, Role.GRAD_INPUT)) + site.module.count(".")
