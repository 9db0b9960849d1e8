"""`verify`: train a run's fp32 twin and say whether the run holds its loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .comparing import CONFIDENCE, MARGIN, compare
from .equivalence import check_levels
from .result import Comparison
from .runs import read_run
from .seeds import check_can_be_made_again, check_may_be_replaced, train_twin


def verify(
    run: str | Path,
    *,
    out: str | Path | None = None,
    seeds: int | None = None,
    task: Any = None,
    margin: float = MARGIN,
    confidence: float = CONFIDENCE,
    progress: Callable[[str], Any] | None = None,
    note: Callable[[str], None] | None = None,
) -> Comparison:
    """Train what `run` trained once more in fp32, with the same seed and data, and compare: `.passed` says whether the
    run's loss is within the margin of fp32's, or better.

    out: directory of the twin, by default the run's with -fp32 behind its name; a twin that is there and finished is
    reused. seeds: of both, as in `compare`; with one there is no interval. task, margin, confidence, progress, note: as
    in `compare`.
    Raises UsageError where `run` is an fp32 run itself, where its task cannot be made again, and where `out` holds
    another run; RunDirectoryError where there is no run.
    """
    path = Path(run)
    check_levels(margin, confidence)
    mine = read_run(path)
    if mine.is_fp32:
        raise UsageError(f"{path} ran in fp32, its twin would be itself: verify a run in another precision")
    check_can_be_made_again(mine, task)
    assert mine.seed is not None
    twin = Path(out) if out is not None else path.with_name(path.name + "-fp32")
    check_may_be_replaced(mine, twin, precision="fp32")
    train_twin(mine, twin, seed=mine.seed, precision="fp32", task=task, progress=progress, note=note)
    return compare(
        [twin, path], baseline=twin, seeds=seeds, task=task, margin=margin, confidence=confidence, progress=progress,
        note=note,
    )  # fmt: skip
