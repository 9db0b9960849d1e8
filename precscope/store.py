"""A run directory: open formats, whole parts, no pickle.

    run.json                 what ran; written first, updated at the end ("status": running, done or failed)
    stats-000001.parquet     a row per (step, site): scalars, and the exponent histogram trimmed to its filled binades
    shadow-000001.parquet    the same for one shadow step in fp32, with gradient-weighted histograms (`weights`)
    truth-000001.parquet     the gradients of a shadow step against the run's own: a row per parameter
    graph.json               modules, parameters, FLOPs, producer -> consumer edges
    cost.parquet             measured times per module and format
    train.parquet            a row per training step

Every part is written beside its final name and renamed over it, so a part is either complete or absent: a process
killed at any moment leaves a directory that loads, with all that was flushed. Each file carries a schema number.
Several processes merge their statistics, and rank 0 writes. What was not merged (a process that failed, merge=False)
rank k > 0 writes below `rank-0000k/`; histograms add up, so a reader merges them.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import RunDirectoryError, UsageError
from .histogram import BINS, EXP_LO
from .sites import Site
from .stats import StatsTable

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA = 1

CHANGES = ("bf16", "fp16", "e4m3", "e5m2")
"""Formats to which shadow steps really round parameters: columns change_bf16, ... of shadow parts."""
TRUTH_COLUMNS = ("step", "parameter", "module", "cosine", "rel_error", "grad_norm_fp32", "loss_low", "loss_fp32")


def prepare_directory(out: str | Path, *, exist: str = "error", ranks: int = 1) -> Path:
    """Make the run directory `out` and prove that it can be written to.

    exist: what to do with a run that is already there: "error" refuses, "overwrite" removes precscope's own files from
    it (and nothing else), "append" keeps them and adds to them. ranks: how many processes write to it now: what an
    earlier run of more left is removed with it.
    Raises RunDirectoryError where it cannot be made or written, UsageError where a run is there and exist="error".
    """
    if exist not in ("error", "overwrite", "append"):
        raise UsageError(f"exist must be 'error', 'overwrite' or 'append', not {exist!r}")
    path = Path(out)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise RunDirectoryError(
            f"cannot write to {path} ({error.strerror or error}): choose another directory with out= (--out)"
        ) from error
    if (path / "run.json").exists():
        if exist == "error":
            raise UsageError(
                f"{path} already holds a run: choose another directory, or pass exist='overwrite' (--overwrite)"
            )
        if exist == "overwrite":
            _remove_run(path, ranks)
    return path


def rank_name(rank: int) -> str:
    """Name of the directory, below the run's, into which process `rank` > 0 writes."""
    return f"rank-{rank:05d}"


def _remove_run(path: Path, ranks: int) -> None:
    patterns = (
        "stats-*.parquet", "ops-*.parquet", "shadow-*.parquet", "truth-*.parquet", "train.parquet", "cost.parquet",
        "graph.json", "plan.json", "plan-*.json", "checkpoints/step-*.pt", "checkpoints/best-*.pt",
        "checkpoints/best.json", "events.jsonl", "failing-*.pt", "model.safetensors", "run.json",
    )  # fmt: skip
    stale = [p for p in path.glob("rank-*") if p.name >= rank_name(ranks)]
    for directory in (path, *stale):
        for pattern in patterns:
            for file in directory.glob(pattern):
                file.unlink(missing_ok=True)


def drop_all_steps(directory: Path, first: int, *, below: bool = True) -> None:
    """`drop_steps` in a run directory and, with `below`, in those of further processes."""
    for path in [directory, *(sorted(directory.glob("rank-*")) if below else [])]:
        drop_steps(path, first)


def drop_steps(directory: Path, first: int) -> None:
    """Take the rows of steps from `first` on out of the parts in `directory`: a resumed run records them again.

    Raises RunDirectoryError where a part cannot be read or written.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    parts = [
        (path, kind)
        for kind in ("stats", "shadow", "truth", "ops")
        for path in sorted(directory.glob(f"{kind}-*.parquet"))
    ]
    for path, kind in parts:
        table = read_part(path, kind=kind)
        kept = table.filter(pc.less(table.column("step"), first))
        if not kept.num_rows:
            path.unlink()
        elif kept.num_rows < table.num_rows:
            with replacing(path) as temporary:
                pq.write_table(kept, temporary, compression="zstd")


@contextlib.contextmanager
def replacing(path: Path):
    """Yield a temporary name beside `path`; rename it over `path` on success, remove it on failure.

    Raises RunDirectoryError on any OSError (a full disk, a directory that vanished), leaving `path` as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunDirectoryError(
            f"cannot write {path} ({error.strerror or error}): free space or choose another directory; "
            "everything written before is intact"
        ) from error
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` atomically as JSON. Values JSON cannot hold (inf, NaN) are written as strings."""
    with replacing(path) as temporary:
        temporary.write_text(json_text(content, indent=1) + "\n", encoding="utf-8")


def json_text(content: Any, *, indent: int | None = None) -> str:
    """`content` as JSON: numpy's numbers as Python's, inf and NaN and what else JSON cannot hold as strings."""
    return json.dumps(_plain(content), indent=indent, allow_nan=False)


def update_json(path: Path, content: dict[str, Any]) -> None:
    """Merge `content` into the JSON object at `path` (its top-level keys win) and write it atomically."""
    old: dict[str, Any] = {}
    if path.exists():
        with contextlib.suppress(ValueError, OSError):
            old = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**old, **content})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    if isinstance(value, str | int | float | bool | type(None)):
        return value
    return str(value)


def part_schema(kind: str) -> pa.Schema:
    """Arrow schema of parts of one kind: "stats", "shadow" (the same and `weights`) or "truth"; the schema number is in
    its metadata."""
    import pyarrow as pa

    metadata = {b"precscope.schema": str(SCHEMA).encode(), b"precscope.kind": kind.encode()}
    if kind == "truth":
        types = {"step": pa.int64(), "parameter": pa.string(), "module": pa.string()}
        return pa.schema([(name, types.get(name, pa.float64())) for name in TRUTH_COLUMNS], metadata=metadata)
    schema = stats_schema()
    if kind == "shadow":
        more = {"weights_lo": pa.int16(), "weights": pa.list_(pa.float64())}
        for name, kind_of in (more | {f"change_{f}": pa.float64() for f in CHANGES}).items():
            schema = schema.append(pa.field(name, kind_of))
    return schema.with_metadata(metadata)


def stats_schema() -> pa.Schema:
    """Columns of stats-*.parquet."""
    import pyarrow as pa

    integers = ("count", "zeros", "pos_inf", "neg_inf", "nan")
    floats = ("amax", "amin_nonzero", "sum", "sumsq", "loss_scale")
    text = pa.dictionary(pa.int32(), pa.string())
    return pa.schema(
        [
            ("step", pa.int64()),
            ("module", text),
            ("role", text),
            ("call", pa.int32()),
            ("tensor", text),
            ("source", text),
            *((name, pa.int64()) for name in integers),
            *((name, pa.float64()) for name in floats),
            ("hist_lo", pa.int16()),
            ("hist", pa.list_(pa.int64())),
            ("ratio_lo", pa.int16()),
            ("ratio", pa.list_(pa.int64())),
            ("ratio_unchanged", pa.int64()),
            ("ratio_from_zero", pa.int64()),
        ]
    )


class StatsWriter:
    """Writes stats-NNNNNN.parquet parts into a run directory, or those of kind "shadow".

    A row's `ratio` columns hold, for role "update", the histogram of floor(log2|dw|) - floor(log2|w|). `weights`, in
    shadow parts, is the gradient-weighted histogram, null where no gradient arrived.
    """

    def __init__(self, directory: Path, *, kind: str = "stats") -> None:
        import pyarrow.parquet  # noqa: F401  # takes half a second, better now than in the middle of a run

        self.directory, self.kind = directory, kind
        taken = [int(p.stem.split("-")[1]) for p in directory.glob(f"{kind}-*.parquet")]
        self._next = max(taken, default=0) + 1

    def write(
        self,
        steps: np.ndarray,
        sites: list[Site],
        table: StatsTable,
        loss_scale: np.ndarray,
        ratios: dict[int, tuple[np.ndarray, int, int]],
        changes: Mapping[int, Sequence[float]] = {},
    ) -> Path | None:
        """Write one part of len(sites) rows; None where there is nothing to write.

        steps: int64[S]. table: the statistics, loss scale already divided out. loss_scale: float64[S], 1 where none.
        ratios: row -> (histogram int64[BINS], elements that did not change, elements that left zero). changes: row ->
        first-order change of the loss when the tensor is rounded to each of CHANGES (kind "shadow").
        """
        if not sites:
            return None
        import pyarrow as pa
        import pyarrow.parquet as pq

        lo, hist = trim(table.counts)
        ratio_rows = [ratios.get(i) for i in range(len(sites))]
        trimmed = [_trim_one(r[0]) if r else None for r in ratio_rows]
        columns: dict[str, Any] = {
            "step": steps,
            "module": [s.module for s in sites],
            "role": [s.role.value for s in sites],
            "call": [s.call for s in sites],
            "tensor": [s.tensor for s in sites],
            "source": [str(s) for s in table.source],
            "count": table.count,
            "zeros": table.zeros,
            "pos_inf": table.pos_inf,
            "neg_inf": table.neg_inf,
            "nan": table.nan,
            "amax": table.amax,
            "amin_nonzero": table.amin_nonzero,
            "sum": table.sum,
            "sumsq": table.sumsq,
            "loss_scale": loss_scale,
            "hist_lo": lo,
            "hist": hist,
            "ratio_lo": [t[0] if t else None for t in trimmed],
            "ratio": [t[1] if t else None for t in trimmed],
            "ratio_unchanged": [r[1] if r else None for r in ratio_rows],
            "ratio_from_zero": [r[2] if r else None for r in ratio_rows],
        }
        if self.kind == "shadow":
            columns["weights_lo"], columns["weights"] = _trim_weights(table.weights, len(sites))
            for number, fmt in enumerate(CHANGES):
                columns[f"change_{fmt}"] = [changes[i][number] if i in changes else None for i in range(len(sites))]
        schema = part_schema(self.kind)
        arrays = [
            columns[f.name] if isinstance(columns[f.name], pa.Array) else arrow_array(columns[f.name], f.type)
            for f in schema
        ]
        path = self.directory / f"{self.kind}-{self._next:06d}.parquet"
        with replacing(path) as temporary:
            pq.write_table(pa.Table.from_arrays(arrays, schema=schema), temporary, compression="zstd")
        self._next += 1
        return path


def write_truth(directory: Path, columns: dict[str, Any]) -> Path:
    """Write truth-NNNNNN.parquet with the columns TRUTH_COLUMNS, lists of equal length."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    taken = [int(p.stem.split("-")[1]) for p in directory.glob("truth-*.parquet")]
    path = directory / f"truth-{max(taken, default=0) + 1:06d}.parquet"
    schema = part_schema("truth")
    table = pa.Table.from_arrays([arrow_array(columns[f.name], f.type) for f in schema], schema=schema)
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    return path


def arrow_array(values: Any, kind: pa.DataType) -> pa.Array:
    """`values` as an Arrow array of that type; text in dictionaries where the type says so."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return pa.array(values, pa.string()).dictionary_encode()
    return pa.array(values, kind)


def trim(counts: np.ndarray) -> tuple[np.ndarray, pa.Array]:
    """Histograms int64[S, BINS] as (first filled binade int16[S], Arrow list<int64>[S] up to the last filled one)."""
    import pyarrow as pa

    filled = counts != 0
    first = np.where(filled.any(1), filled.argmax(1), 0)
    last = np.where(filled.any(1), BINS - filled[:, ::-1].argmax(1), 0)
    column = np.arange(BINS)
    values = counts[(column >= first[:, None]) & (column < last[:, None])]
    offsets = np.concatenate([[0], np.cumsum(last - first)]).astype(np.int32)
    return (first + EXP_LO).astype(np.int16), pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, pa.int64()))


def _trim_weights(weights: np.ndarray | None, n: int) -> tuple[pa.Array, pa.Array]:
    """Weights float64[n, BINS] as (first filled binade, Arrow list<float64>), both null in rows of NaN."""
    import pyarrow as pa

    weights = np.full((n, BINS), np.nan) if weights is None else weights
    unknown = np.isnan(weights).all(1)
    lo, filled = [], []
    for row in np.where(unknown[:, None], 0.0, weights):
        at = np.flatnonzero(row)
        lo.append(int(at[0]) + EXP_LO if len(at) else EXP_LO)
        filled.append(row[at[0] : at[-1] + 1] if len(at) else row[:0])
    offsets = np.concatenate([[0], np.cumsum([len(f) for f in filled])]).astype(np.int32)
    mask = pa.array(unknown)
    lists = pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(np.concatenate(filled) if filled else [], pa.float64()), mask=mask
    )
    return pa.array(lo, pa.int16(), mask=unknown), lists


def _trim_one(counts: np.ndarray) -> tuple[int, list[int]]:
    filled = np.flatnonzero(counts)
    if not len(filled):
        return EXP_LO, []
    return int(filled[0]) + EXP_LO, counts[filled[0] : filled[-1] + 1].tolist()


def expand(lo: np.ndarray, lists: pa.ListArray, dtype: type = np.int64) -> np.ndarray:
    """Inverse of the trimming: `dtype` [S, BINS] from first binades int16[S] and Arrow lists. Null rows are empty."""
    out = np.zeros((len(lists), BINS), dtype)
    offsets = lists.offsets.to_numpy()
    lengths = np.diff(offsets)
    values = lists.values.to_numpy(zero_copy_only=False)[offsets[0] : offsets[-1]]
    rows = np.repeat(np.arange(len(lists)), lengths)
    within = np.arange(len(values)) - np.repeat(offsets[:-1] - offsets[0], lengths)
    start = np.nan_to_num(np.asarray(lo, dtype=np.float64)).astype(np.int64) - EXP_LO
    out[rows, np.repeat(start, lengths) + within] = values
    return out


def read_part(path: Path, *, kind: str = "stats") -> pa.Table:
    """Read one part: kind "stats", "shadow", "truth" or "ops" (whose columns opstore.py checks).

    Raises RunDirectoryError where it is truncated, foreign or of a newer schema.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    advice = "move it away, or load with skip_damaged=True (--skip-damaged) to use the rest"
    try:
        table = pq.read_table(path, partitioning=None)
    except (pa.ArrowException, OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunDirectoryError(f"{path} cannot be read ({first_line}): {advice}") from error
    metadata = table.schema.metadata or {}
    if metadata.get(b"precscope.kind") != kind.encode():
        raise RunDirectoryError(f"{path} was not written by precscope (no schema number in it): {advice}")
    number = int(metadata[b"precscope.schema"])
    if number > SCHEMA:
        raise RunDirectoryError(f"{path} has schema {number}, this precscope reads up to {SCHEMA}: upgrade precscope")
    missing = set() if kind == "ops" else set(part_schema(kind).names) - set(table.column_names)
    if missing:
        raise RunDirectoryError(f"{path} lacks the columns {', '.join(sorted(missing))}: {advice}")
    return table
