"""One run against the baseline: may they be paired, by how much do they differ, and what follows from it.

A pair is two runs of the same task, steps and seed: they start from the same parameters and read the same batches, so
that what both owe to chance cancels in their difference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import PurePath

import numpy as np

from .curves import common_losses, end_of
from .equivalence import Difference, Ratio, paired, ratio, unpaired
from .runs import NAN, Group, Run, different_settings

_SAME_START = 0.05  # runs made by hand whose first losses are further apart than this did not start alike


@dataclass(frozen=True)
class Against:
    """One run against the baseline.

    why_unpaired: "" for pairs. seeds: those compared. kind: "equivalent", "worse", "better", "undecided",
    "one seed" (see Difference.kind), "diverged", "baseline diverged", "unfinished" or "incomparable" (another model).
    measure: "held-out loss", or "training loss" (mean of the last ten steps) where there is no held-out one. loss: of
    that, over the seeds where both ended well; None where there is no such seed. curve: of the training loss over its
    last tenth, step by step on the same batches; None where unpaired. speed: baseline's median step time over the
    run's. memory: the run's peak over the baseline's. diverged, baseline_diverged: seed -> what happened. skipped,
    nonfinite: steps of all seeds compared, run's and baseline's. events: what the guard saw in them, by kind. notes:
    what a reader should know of the pairs.
    """

    run: str
    baseline: str
    why_unpaired: str
    seeds: tuple[int, ...]
    kind: str
    measure: str = ""
    loss: Difference | None = None
    curve: Difference | None = None
    speed: Ratio = field(default_factory=lambda: Ratio(NAN, (NAN, NAN), 0))
    memory: float = NAN
    diverged: dict[int, str] = field(default_factory=dict)
    baseline_diverged: dict[int, str] = field(default_factory=dict)
    steps: int = 0
    skipped: tuple[int, int] = (0, 0)
    nonfinite: tuple[int, int] = (0, 0)
    events: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the run holds the baseline's loss: shown equivalent or better over seeds; with one seed, a difference
        that is no worse than the margin."""
        if self.kind == "one seed":
            return self.loss is not None and self.loss.mean <= self.loss.bound
        return self.kind in ("equivalent", "better")

    @property
    def verdict(self) -> str:
        """In words: "equivalent within 2%", "different: worse by 3.1%", ..."""
        from .wording import verdict

        return verdict(self)


def compare_groups(
    group: Group, base: Group, *, margin: float, confidence: float, names: tuple[str, str] | None = None
) -> Against:
    """`group` against `base`, both with their seeds. names: of the two, by default those of their directories."""
    name, base_name = names or (group.run.name, base.run.name)
    apart = _incomparable(group.run, base.run)
    if apart:
        return Against(name, base_name, why_unpaired=apart, seeds=(), kind="incomparable")
    why = _why_unpaired(group, base)
    if why:
        mine, theirs = _all(group), _all(base)
    else:
        common = [s for s in group.seeds if s in base.seeds]
        mine, theirs = [group.seeds[s] for s in common], [base.seeds[s] for s in common]
    waiting = [f"{r.name} {r.unfinished}" for r in (group.run, base.run) if r.unfinished]
    diverged, base_diverged = _diverged(mine), _diverged(theirs)
    settings = [n for n in different_settings(group.run, base.run) if n not in ("steps", "accumulate")]
    notes = [*(f"{g.run.name}: {n}" for g in (group, base) for n in g.notes), *waiting]
    if not why and not (group.run.about.get("task_ref") and base.run.about.get("task_ref")):
        notes.append("made by hand: that the data are the same is taken from the seeds and the first losses")
    if settings:
        notes.append("settings differ too: " + ", ".join(_both(n, group.run, base.run) for n in settings))
    good = _good(mine, theirs, pairs=not why)
    levels = {"margin": margin, "confidence": confidence}
    measure, loss = _loss(*good, pairs=not why, **levels)
    return Against(
        name,
        base_name,
        why_unpaired=why,
        seeds=tuple(r.seed for r in mine if r.seed is not None),
        kind=_kind(loss, waiting, diverged, base_diverged),
        measure=measure,
        loss=loss,
        curve=None if why else _curve(*good, **levels),
        speed=_speed(mine, theirs, pairs=not why, confidence=confidence),
        memory=_over(group.run.number("peak_memory_bytes"), base.run.number("peak_memory_bytes")),
        diverged=diverged,
        baseline_diverged=base_diverged,
        steps=sum(len(r.log) for r in mine),
        skipped=(_count(mine, "skipped"), _count(theirs, "skipped")),
        nonfinite=(_count(mine, "nonfinite"), _count(theirs, "nonfinite")),
        events=_events(mine),
        notes=tuple(notes),
    )


def _incomparable(run: Run, base: Run) -> str:
    for key in ("model", "parameters"):
        mine, theirs = run.about.get(key), base.about.get(key)
        if mine is not None and theirs is not None and mine != theirs:
            word = "model" if key == "model" else "number of parameters"
            return f"another {word} ({mine} against {theirs})"
    return ""


def _why_unpaired(group: Group, base: Group) -> str:
    """Why runs of one model are no pairs: other data, other steps, no seed in common; "" where they are."""
    run, other = group.run, base.run
    mine, theirs = run.about.get("task_ref"), other.about.get("task_ref")
    if mine and theirs and _bare(mine) != _bare(theirs):
        return f"another task ({mine} against {theirs})"
    for name in ("steps", "accumulate"):
        a, b = run.settings.get(name), other.settings.get(name)
        if a is not None and b is not None and a != b:
            return f"another number of {'steps' if name == 'steps' else 'micro-batches per step'} ({a} against {b})"
    if not set(group.seeds) & set(base.seeds):
        known = [", ".join(map(str, g.seeds)) or "unknown" for g in (group, base)]
        return f"no seed in common ({known[0]} against {known[1]})"
    if not (mine and theirs) and run.seed == other.seed and len(run.log) and len(other.log):
        a, b = float(run.log.loss.iloc[0]), float(other.log.loss.iloc[0])
        if math.isfinite(a) and math.isfinite(b) and abs(a - b) > _SAME_START * abs(b):
            return f"not the same start or data: the first losses are {a:.4g} and {b:.4g}"
    return ""


def _bare(reference: str) -> str:
    """A task's reference without its folders: the same file is named from several places."""
    return PurePath(reference.replace("\\", "/")).name


def _all(group: Group) -> list[Run]:
    return list(group.seeds.values()) or [group.run]


def _diverged(runs: list[Run]) -> dict[int, str]:
    return {(-1 if r.seed is None else r.seed): r.diverged for r in runs if r.diverged}


def _good(mine: list[Run], theirs: list[Run], *, pairs: bool) -> tuple[list[Run], list[Run]]:
    """The runs that ended well; of pairs, those where both did."""

    def well(run: Run) -> bool:
        return bool(len(run.log)) and not run.diverged and not run.unfinished

    if pairs:
        kept = [(a, b) for a, b in zip(mine, theirs, strict=True) if well(a) and well(b)]
        return [a for a, _ in kept], [b for _, b in kept]
    return [r for r in mine if well(r)], [r for r in theirs if well(r)]


def _loss(
    mine: list[Run], theirs: list[Run], *, pairs: bool, margin: float, confidence: float
) -> tuple[str, Difference | None]:
    if not mine or not theirs:
        return "", None
    held_out = all(math.isfinite(r.eval_loss) for r in (*mine, *theirs))
    losses = [[r.eval_loss if held_out else r.train_loss for r in runs] for runs in (mine, theirs)]
    judge = paired if pairs else unpaired
    return "held-out loss" if held_out else "training loss", judge(*losses, margin=margin, confidence=confidence)


def _curve(mine: list[Run], theirs: list[Run], *, margin: float, confidence: float) -> Difference | None:
    """The paired difference of the training losses at the end, None where there is no pair or a step is not finite."""
    if not mine:
        return None
    ends = end_of(common_losses([*mine, *theirs])[1])
    if not np.isfinite(ends).all():
        return None
    return paired(ends[: len(mine)], ends[len(mine) :], margin=margin, confidence=confidence)


def _kind(loss: Difference | None, waiting: list[str], diverged: dict[int, str], base_diverged: dict[int, str]) -> str:
    if diverged or base_diverged:
        return "diverged" if diverged else "baseline diverged"
    if loss is None or waiting:
        return "unfinished"
    return loss.kind


def _speed(mine: list[Run], theirs: list[Run], *, pairs: bool, confidence: float) -> Ratio:
    if pairs:
        return ratio(
            [_over(b.step_time_ms, a.step_time_ms) for a, b in zip(mine, theirs, strict=True)], confidence=confidence
        )
    medians = [float(np.median([r.step_time_ms for r in runs])) for runs in (mine, theirs)]
    return ratio([_over(medians[1], medians[0])], confidence=confidence)


def _over(a: float, b: float) -> float:
    return a / b if b else NAN


def _count(runs: list[Run], column: str) -> int:
    return sum(int(r.log[column].sum()) for r in runs if len(r.log))


def _events(runs: list[Run]) -> dict[str, int]:
    total: dict[str, int] = {}
    for run in runs:
        for kind, count in run.events.items():
            total[kind] = total.get(kind, 0) + count
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def _both(name: str, run: Run, base: Run) -> str:
    return f"{name} {run.settings.get(name)} against {base.settings.get(name)}"
