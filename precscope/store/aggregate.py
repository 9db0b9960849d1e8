"""aggregate.parquet: the sums over the steps of some parts, a row per site, so that loading need not read these parts.

It says in its metadata which parts it covers, with the size and a checksum of the footer of each, and which steps are
in them. It holds nothing that the parts do not: where it is missing, damaged, of a newer schema, or where one of those
parts is not there as it was, it is not used, and the parts are read. Parts that it does not cover are added to it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..errors import RunDirectoryError
from .arrays import coded, numbers
from .files import replacing
from .histograms import trim
from .parts import list_parts, read_part
from .schema import SCHEMA, layout, stats_schema
from .totals import Totals

if TYPE_CHECKING:
    import pyarrow as pa

AGGREGATE = "aggregate.parquet"


class Fingerprint(NamedTuple):
    """How a part is known again. size_bytes: of the file. footer: CRC-32 of its footer, which holds where each column
    lies and the extremes of each."""

    name: str
    size_bytes: int
    footer: int

    @classmethod
    def of(cls, path: Path) -> Fingerprint:
        """Of the file at `path`. Raises OSError where it cannot be read."""
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(size - 8, 0))
            length = int.from_bytes(file.read(4), "little")  # Parquet ends with the footer, its length, "PAR1"
            file.seek(max(size - 8 - length, 0))
            return cls(path.name, size, zlib.crc32(file.read()))


def aggregate_schema() -> pa.Schema:
    """Columns of aggregate.parquet: those of a part that add up, `rows` (steps in which the site was recorded),
    `count_most` (elements in one row, the most) and `source_exponent` (see StatsTable)."""
    import pyarrow as pa

    fields = [f for f in stats_schema() if f.name not in ("step", "loss_scale")]
    return pa.schema([*fields, *(pa.field(name, pa.int64()) for name in ("rows", "count_most", "source_exponent"))])


def write_aggregate(directory: Path, totals: Totals, covered: Iterable[Fingerprint]) -> Path:
    """Write the sums over the parts `covered`. Raises RunDirectoryError where it cannot be written."""
    import pyarrow.parquet as pq

    path = directory / AGGREGATE
    content = {"parts": [list(part) for part in covered], "steps": _runs(sorted(totals.steps))}
    metadata = {"precscope.schema": str(SCHEMA), "precscope.kind": "aggregate", "precscope.covers": json.dumps(content)}
    table = aggregate_table(totals).replace_schema_metadata(metadata)
    with replacing(path) as temporary:
        pq.write_table(table, temporary, **layout(table.schema))
    return path


def aggregate_table(totals: Totals) -> pa.Table:
    """The sums, a row per site that has rows."""
    import pyarrow as pa

    table, rows = totals.table(), np.flatnonzero(totals.rows)
    kept, sites = table if len(rows) == len(table) else table.take(rows), list(totals.sites)
    sites = [sites[i] for i in rows]
    lo, hist = trim(kept.counts)
    ratios, none = totals.ratios(), (np.zeros(table.counts.shape[1], np.int64), 0, 0)
    found = [ratios.get(i, none) for i in rows.tolist()]
    unknown = np.asarray([i not in ratios for i in rows.tolist()], bool)
    ratio_lo, ratio = trim(np.stack([none[0], *(r[0] for r in found)])[1:], unknown=unknown)
    columns = {name: getattr(kept, name) for name in ("count", "zeros", "pos_inf", "neg_inf", "nan", "amax",
                                                     "amin_nonzero", "sum", "sumsq", "source_exponent")}  # fmt: skip
    columns |= {
        "module": [s.module for s in sites], "role": [s.role.value for s in sites], "call": [s.call for s in sites],
        "tensor": [s.tensor for s in sites], "source": list(kept.source), "rows": totals.rows[rows],
        "count_most": totals.most[rows],
        "hist_lo": lo, "hist": hist, "ratio_lo": numbers(ratio_lo, unknown=unknown), "ratio": ratio,
        "ratio_unchanged": numbers([r[1] for r in found], pa.int64(), unknown=unknown),
        "ratio_from_zero": numbers([r[2] for r in found], pa.int64(), unknown=unknown),
    }  # fmt: skip
    schema = aggregate_schema()
    columns |= {name: coded(columns[name]) for name in ("module", "role", "tensor", "source")}
    arrays = [c if isinstance(c := columns[f.name], pa.Array) else numbers(c, f.type) for f in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def read_aggregate(directory: Path, parts: Iterable[Path]) -> tuple[pa.Table, set[int], list[Fingerprint]] | None:
    """(rows, steps, parts that they cover); None where there is none that holds for `parts`, those that are there."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = directory / AGGREGATE
    try:
        with pq.ParquetFile(path) as file:
            metadata = file.schema_arrow.metadata or {}
            if metadata.get(b"precscope.kind") != b"aggregate" or int(metadata[b"precscope.schema"]) > SCHEMA:
                return None
            content = json.loads(metadata[b"precscope.covers"])
            covered = [Fingerprint(*part) for part in content["parts"]]
            if not {p.name for p in parts}.issuperset(p.name for p in covered):
                return None
            if any(Fingerprint.of(directory / p.name) != p for p in covered):
                return None
            schema = aggregate_schema()
            if any(f.name not in file.schema_arrow.names or file.schema_arrow.field(f.name) != f for f in schema):
                return None
            return file.read(columns=schema.names), _steps(content["steps"]), covered
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):
        return None


def load_totals(
    directory: Path,
    kind: str = "stats",
    *,
    parts: Iterable[Path] | None = None,
    into: Totals | None = None,
    damaged: list[str] | None = None,
) -> tuple[Totals, list[Fingerprint]]:
    """The sums over the parts of one directory (those of further ranks not included), and which parts these are.

    parts: those that are there, as `list_parts` found them; None lists them here. One list is used throughout: parts
    that are put together in between would count twice. into: Totals to add to. damaged: truncated and foreign parts
    are named here and left out; None raises RunDirectoryError.
    """
    totals = Totals() if into is None else into
    paths = list_parts(directory, kind) if parts is None else list(parts)
    held = read_aggregate(directory, paths) if kind == "stats" else None
    covered: list[Fingerprint] = []
    if held is not None:
        table, steps, covered = held
        totals.add(table)
        totals.steps |= steps
    names = {part.name for part in covered}
    for path in paths:
        if path.name in names:
            continue
        try:
            totals.add(read_part(path, kind=kind))
        except RunDirectoryError:
            if damaged is None:
                raise
            damaged.append(str(path))
        else:
            covered.append(Fingerprint.of(path))
    return totals, covered


def _runs(steps: list[int]) -> list[list[int]]:
    """Ascending integers as runs of equal distance: [first, distance, how many]."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and runs[-1][2] == 1:
            runs[-1][1:] = [step - runs[-1][0], 2]
        elif runs and step == runs[-1][0] + runs[-1][1] * runs[-1][2]:
            runs[-1][2] += 1
        else:
            runs.append([step, 0, 1])
    return runs


def _steps(runs: list[list[int]]) -> set[int]:
    return {first + distance * i for first, distance, n in runs for i in range(n)}
