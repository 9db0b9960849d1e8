"""Op-level statistics: what was recorded of each op, and ops-NNNNNN.parquet, a part of the run directory.

A row is (step, op site): which op of which module, forward or backward, and the statistics of its result; the columns
of the stats parts, and `input_amax`. Parts are complete or absent, as those are. No torch: read anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .errors import RunDirectoryError, first_line
from .formats import FloatFormat, get_format
from .stats import StatsTable
from .store import arrow_array, expand, trim, write_part

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

SCHEMA = 1
_META = {b"precscope.schema": str(SCHEMA).encode(), b"precscope.kind": b"ops"}
_INTEGERS = ("zeros", "pos_inf", "neg_inf", "nan")
_FLOATS = ("amax", "amin_nonzero", "sum", "sumsq")


class OpSite(NamedTuple):
    """One op of a module.

    module: FQN, "" for the root and for code outside every module. phase: "forward" or "backward". op: its name,
    "exp", "bmm", "native_layer_norm[1]" for its second result. index: the how-manieth op of that name within one call
    of the module, from 0. dtype: format of the result, "fp32".
    """

    module: str
    phase: str
    op: str
    index: int  # type: ignore[assignment]  # tuple.index is not missed
    dtype: str

    def __str__(self) -> str:
        number = f"#{self.index}" if self.index else ""
        return f"{self.module or '(root)'}: {self.op}{number} ({self.phase}, {self.dtype})"


@dataclass(frozen=True)
class OpRecords:
    """What was recorded of S ops, a row each.

    sites: S of them. table: their statistics; gradients have the loss scale divided out. input_amax: float64 [S], the
    largest magnitude among those of the op's arguments that were results of recorded ops; NaN where none was.
    loss_scale: float64 [S], what the backward rows were divided by, 1 for others. steps: int64 [S].
    """

    sites: list[OpSite]
    table: StatsTable
    input_amax: np.ndarray
    loss_scale: np.ndarray
    steps: np.ndarray

    def __len__(self) -> int:
        return len(self.sites)

    def merged(self) -> OpRecords:
        """Rows of one site summed over the steps; steps are then -1."""
        keys: dict[OpSite, int] = {}
        index = np.asarray([keys.setdefault(s, len(keys)) for s in self.sites], np.int64)
        amax = np.full(len(keys), -np.inf)
        np.maximum.at(amax, index, np.where(np.isnan(self.input_amax), -np.inf, self.input_amax))
        scale = np.ones(len(keys))
        scale[index] = self.loss_scale
        return OpRecords(
            list(keys), self.table.group(index, len(keys)), np.where(np.isfinite(amax), amax, np.nan), scale,
            np.full(len(keys), -1, np.int64),
        )  # fmt: skip

    def ask(self, format: str | FloatFormat, *, scale_exponent: int = 0) -> pd.DataFrame:
        """What `format` would do to the result of every op, were it multiplied by 2^scale_exponent first.

        A row per site: module, phase, op, index, dtype, count, amax, amin_nonzero, input_amax (unscaled), zeros,
        nonfinite (shares of count, as recorded), and overflow_lo, overflow_hi, flushed, subnormal, sqnr_db: see
        Profile.ask. Raises FormatError for an unknown format.
        """
        import pandas as pd

        fmt, rows = get_format(format), self.merged()
        table = rows.table
        count = np.maximum(table.count, 1)
        columns: dict[str, Any] = {name: [getattr(s, name) for s in rows.sites] for name in OpSite._fields}
        columns |= {
            "count": table.count,
            "amax": table.amax,
            "amin_nonzero": np.where(np.isfinite(table.amin_nonzero), table.amin_nonzero, np.nan),
            "input_amax": rows.input_amax,
            "zeros": table.zeros / count,
            "nonfinite": table.nonfinite / count,
        }
        answers = table.ask(fmt, scale_exponent=scale_exponent)
        answers.pop("loss_noise")  # ops are not priced
        return pd.DataFrame(columns | answers)


def ops_schema() -> pa.Schema:
    """Arrow schema of ops-*.parquet (schema number in its metadata)."""
    import pyarrow as pa

    text = pa.dictionary(pa.int32(), pa.string())
    columns = [
        ("step", pa.int64()), ("module", text), ("phase", text), ("op", text), ("index", pa.int32()), ("dtype", text),
        ("source", text), ("source_exponent", pa.int32()), ("count", pa.int64()),
        *((name, pa.int64()) for name in _INTEGERS), *((name, pa.float64()) for name in _FLOATS),
        ("input_amax", pa.float64()), ("loss_scale", pa.float64()), ("hist_lo", pa.int16()),
        ("hist", pa.list_(pa.int64())),
    ]  # fmt: skip
    return pa.schema(columns, metadata=_META)


def write_ops(directory: str | Path, records: OpRecords) -> Path:
    """Write one part into the run directory, after those that are there; returns its path.

    Raises RunDirectoryError where it cannot be written.
    """
    import pyarrow as pa

    directory = Path(directory)
    numbers = [int(p.stem.partition("-")[2]) for p in directory.glob("ops-*.parquet")]
    path = directory / f"ops-{max(numbers, default=-1) + 1:06d}.parquet"
    table = records.table
    lo, hist = trim(table.counts)
    columns: dict[str, Any] = {name: [getattr(s, name) for s in records.sites] for name in OpSite._fields}
    columns |= {name: getattr(table, name) for name in (*_INTEGERS, *_FLOATS, "count", "source_exponent")}
    columns |= {
        "step": records.steps, "source": [str(s) for s in table.source], "input_amax": records.input_amax,
        "loss_scale": records.loss_scale, "hist_lo": lo, "hist": hist,
    }  # fmt: skip
    schema = ops_schema()
    arrays = [hist if f.name == "hist" else arrow_array(columns[f.name], f.type) for f in schema]
    write_part(path, pa.Table.from_arrays(arrays, schema=schema))
    return path


def load_ops(run_dir: str | Path, *, skip_damaged: bool = False) -> OpRecords:
    """All op rows of a run directory, those of other ranks included; none where it has no ops parts.

    skip_damaged: leave out truncated or foreign parts instead of raising RunDirectoryError.
    """
    parts = []
    path = Path(run_dir)
    for part in sorted(path.glob("ops-*.parquet")) + sorted(path.glob("rank-*/ops-*.parquet")):
        try:
            parts.append(_read_part(part))
        except RunDirectoryError:
            if not skip_damaged:
                raise
    return concat(parts)


def read_ops(run_dir: str | Path, *, skip_damaged: bool = False) -> tuple[list[OpSite], StatsTable]:
    """Sites and statistics, summed over the recorded steps. See `load_ops` for steps, input ranges and errors."""
    records = load_ops(run_dir, skip_damaged=skip_damaged).merged()
    return records.sites, records.table


def concat(records: Iterable[OpRecords]) -> OpRecords:
    """The rows of all, one after another."""
    parts: Sequence[OpRecords] = list(records)

    def joined(name: str, kind: Any) -> np.ndarray:
        return np.concatenate([np.zeros(0, kind), *(getattr(p, name) for p in parts)]).astype(kind)

    return OpRecords(
        [site for p in parts for site in p.sites], StatsTable.concat([p.table for p in parts]),
        joined("input_amax", np.float64), joined("loss_scale", np.float64), joined("steps", np.int64),
    )  # fmt: skip


def at_step(records: OpRecords, step: int) -> OpRecords:
    """The same rows, recorded at `step`."""
    return replace(records, steps=np.full(len(records), step, np.int64))


def _read_part(path: Path) -> OpRecords:
    import pyarrow as pa
    import pyarrow.parquet as pq

    advice = "move it away, or read with skip_damaged=True to use the rest"
    try:
        part = pq.read_table(path, partitioning=None)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise RunDirectoryError(f"{path} cannot be read ({first_line(error)}): {advice}") from error
    metadata = part.schema.metadata or {}
    if metadata.get(b"precscope.kind") != b"ops":
        raise RunDirectoryError(f"{path} was not written by precscope (no schema number in it): {advice}")
    number = int(metadata[b"precscope.schema"])
    if number > SCHEMA:
        raise RunDirectoryError(f"{path} has schema {number}, this precscope reads up to {SCHEMA}: upgrade precscope")
    missing = set(ops_schema().names) - set(part.column_names)
    if missing:
        raise RunDirectoryError(f"{path} lacks the columns {', '.join(sorted(missing))}: {advice}")
    column = {name: part.column(name).combine_chunks() for name in part.column_names}
    numbers = {n: column[n].to_numpy(zero_copy_only=False) for n in (*_INTEGERS, *_FLOATS, "input_amax", "loss_scale")}
    table = StatsTable(
        counts=expand(column["hist_lo"].to_numpy(zero_copy_only=False), column["hist"]),
        **{n: numbers[n] for n in (*_INTEGERS, *_FLOATS)},
        source=column["source"].to_pylist(),
        source_exponent=column["source_exponent"].to_numpy(zero_copy_only=False).astype(np.int64),
    )
    sites = [OpSite(*row) for row in zip(*(column[name].to_pylist() for name in OpSite._fields), strict=True)]
    return OpRecords(
        sites, table, numbers["input_amax"], numbers["loss_scale"],
        column["step"].to_numpy(zero_copy_only=False).astype(np.int64),
    )  # fmt: skip
