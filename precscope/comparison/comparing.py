"""`compare`: read the runs, train the seeds that are asked for, and set each run against the baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .equivalence import check_levels
from .pairing import compare_groups
from .result import Comparison, make_row
from .runs import Run, read_group, read_run

MARGIN, CONFIDENCE = 0.02, 0.95


def compare(
    runs: Sequence[str | Path],
    *,
    baseline: str | Path | None = None,
    seeds: int | None = None,
    task: Any = None,
    margin: float = MARGIN,
    confidence: float = CONFIDENCE,
    progress: Callable[[str], Any] | None = None,
    note: Callable[[str], None] | None = None,
) -> Comparison:
    """Compare the training runs in these directories.

    Runs of the same task, steps and seed are paired: they start alike and read the same batches. Every other run's loss
    is judged against the baseline's: equivalent within the margin, different, or undecided (see equivalence.py). Seeds
    that were trained before (below RUN/seeds) take part.

    baseline: the one that speed and loss are measured against; by default the first fp32 run, else the first. seeds:
    train what is missing to compare over so many seeds, the baseline's own and those after it: each run's configuration
    into RUN/seeds/0001, ... task: the function that makes the task ("file.py:make"), where the runs do not know it or
    it has moved. margin: largest difference that does not matter, as a share of the baseline's loss. confidence: of
    intervals and tests. progress: name of a run -> the trainer's progress callback; note: told of each seed.

    Raises UsageError where no run is given or one twice, where a run's task cannot be made again (seeds), or for a
    margin that says nothing; RunDirectoryError where a directory holds no training run.
    """
    if isinstance(runs, str | Path):
        runs = [runs]
    if not runs:
        raise UsageError("compare needs at least one run directory, for example runs/fp32 runs/plan")
    check_levels(margin, confidence)
    places = [Path(r).resolve() for r in runs]
    twice = [str(r) for r, place in zip(runs, places, strict=True) if places.count(place) > 1]
    if twice:
        raise UsageError(f"{twice[0]} is given twice: name each run once")
    read = [read_run(Path(r)) for r in runs]
    base = _baseline(read, baseline, runs)
    if seeds is not None:
        from .seeds import train_seeds

        train_seeds(read, base, seeds, task=task, progress=progress, note=note)
    groups = [read_group(run.path) for run in read]
    chosen = groups[read.index(base)]
    names = _names(read)
    pairs = [(g, (n, names[read.index(base)])) for g, n in zip(groups, names, strict=True) if g is not chosen]
    return Comparison(
        tuple(make_row(g.run, chosen.run, seeds=max(len(g.seeds), 1)) for g in groups),
        str(base.path),
        tuple(compare_groups(g, chosen, margin=margin, confidence=confidence, names=n) for g, n in pairs),
        margin,
        confidence,
        tuple(groups),
    )


def _names(runs: list[Run]) -> list[str]:
    """Directory names, or whole paths where two are the same."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def _baseline(read: list[Run], baseline: str | Path | None, runs: Sequence[str | Path]) -> Run:
    if baseline is None:
        return next((run for run in read if run.is_fp32), read[0])
    chosen = [run for run in read if run.path.resolve() == Path(baseline).resolve()]
    if not chosen:
        raise UsageError(f"baseline {baseline} is not among the runs {', '.join(map(str, runs))}")
    return chosen[0]
