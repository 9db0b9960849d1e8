"""The run directory as a whole: made, overwritten, gone on with from an earlier step."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ..errors import RunDirectoryError, UsageError
from .aggregate import AGGREGATE
from .files import remove
from .parts import is_by_site, last_step, list_parts, read_part, write_part

_HALF_WRITTEN = (".*.parquet.*.tmp", ".*.json.*.tmp")  # see `replacing`: what a killed process leaves


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
        "aggregate.parquet", "stats-*.parquet", "ops-*.parquet", "shadow-*.parquet", "truth-*.parquet", "train.parquet",
        "cost.parquet", "graph.json", "plan.json", "plan-*.json", "checkpoints/step-*.pt", "checkpoints/best-*.pt",
        "checkpoints/best.json", "events.jsonl", "failing-*.pt", "model.safetensors", *_HALF_WRITTEN, "run.json",
    )  # fmt: skip
    stale = [p for p in path.glob("rank-*") if p.name >= rank_name(ranks)]
    for directory in (path, *stale):
        for pattern in patterns:
            for file in directory.glob(pattern):
                remove(file)


def drop_all_steps(directory: Path, first: int, *, below: bool = True) -> None:
    """`drop_steps` in a run directory and, with `below`, in those of further processes."""
    for path in [directory, *(sorted(directory.glob("rank-*")) if below else [])]:
        drop_steps(path, first)


def drop_steps(directory: Path, first: int) -> None:
    """Take the rows of steps from `first` on out of the parts in `directory`: a resumed run records them again.

    Raises RunDirectoryError where a part cannot be read or written.
    """
    import pyarrow.compute as pc

    _remove_left(directory)
    for kind in ("stats", "shadow", "truth", "ops"):
        for path in list_parts(directory, kind):
            if last_step(path, kind=kind) < first:
                continue
            if kind == "stats":
                remove(directory / AGGREGATE)
            table = read_part(path, kind=kind)
            kept = table.filter(pc.less(table.column("step"), first))
            if kept.num_rows:
                write_part(path, kept, by_site=is_by_site(path))
            else:
                remove(path)


def _remove_left(directory: Path) -> None:
    """Remove what a killed process left: half-written parts, and parts that another one holds. These would come back
    with that one gone."""
    alive = set(list_parts(directory, "stats"))
    for path in directory.glob("stats-*.parquet"):
        if path not in alive:
            remove(path)
    for pattern in (".stats-*.tmp", ".shadow-*.tmp", f".{AGGREGATE}.*.tmp"):
        for path in directory.glob(pattern):
            remove(path)
