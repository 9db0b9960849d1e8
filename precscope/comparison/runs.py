"""Run directories as a comparison reads them: one run, and a group: the run with its twins of other seeds.

runs/plan/                 the run itself, under its own seed
runs/plan/seeds/0001/ ...  the same configuration under other seeds, each an ordinary run directory
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RunDirectoryError, first_line
from ..events import NAME, read_events

if TYPE_CHECKING:
    import pandas as pd

NAN = float("nan")

_HARMLESS = frozenset(
    {"seed", "keep", "keep_best", "save_model", "sync_every", "flush_seconds", "checkpoint_every", "eval_every"}
)
"""Settings of the trainer that change none of its figures, the seed apart."""
STORAGE = ("params", "updates", "state")
"""Settings that say what is stored low: part of a run's precision, and not of its fp32 twin's."""
_COLUMNS = ("step", "loss", "time_ms", "skipped", "nonfinite")
"""Columns of train.parquet that a comparison reads."""
_LAST = 10
"""Steps whose mean is a run's final training loss."""


@dataclass(frozen=True, eq=False)
class Run:
    """One run directory. about: content of run.json, the trainer's result included. log: train.parquet, a row per
    optimizer step."""

    path: Path
    about: dict[str, Any]
    log: pd.DataFrame = field(repr=False)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def precision(self) -> str:
        return str(self.about.get("precision", "?"))

    @property
    def is_fp32(self) -> bool:
        """Whether it computed in fp32 and stored nothing in less."""
        stored = {self.settings.get("params"), self.settings.get("state")}
        return self.precision == "fp32" and stored <= {None, "fp32"}

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the trainer, {} where run.json has none (a run of another loop)."""
        found = self.about.get("train")
        return found if isinstance(found, dict) else {}

    @property
    def seed(self) -> int | None:
        seed = self.about.get("seed", self.settings.get("seed"))
        return seed if isinstance(seed, int) else None

    @property
    def steps(self) -> int:
        """Steps that were asked for; those that were logged where run.json does not tell."""
        steps = self.settings.get("steps")
        return steps if isinstance(steps, int) else len(self.log)

    @property
    def unfinished(self) -> str:
        """Why the run has no outcome yet ("running", "killed by ..."); "" where it has one."""
        status = self.about.get("status", "done")
        if status == "running":
            return f"not finished: {len(self.log)} of {self.steps} steps"
        if status == "failed" and not self.stopped:
            return f"ended by {str(self.about.get('error', 'an error')).partition(':')[0]}"
        return ""

    @property
    def stopped(self) -> bool:
        """Whether the trainer itself gave the run up: its loss or gradients were no longer finite."""
        return self.about.get("status") == "failed" and str(self.about.get("error", "")).startswith("TrainingError")

    @property
    def diverged(self) -> str:
        """How the run diverged ("stopped at step 41"), "" where it did not."""
        if self.stopped:
            return f"stopped at step {int(self.log.step.max())}" if len(self.log) else "stopped at once"
        if self.unfinished or not len(self.log):
            return ""
        if self.about.get("eval_loss") is not None:
            loss, what = self.eval_loss, "held-out loss"
        else:
            loss, what = self.train_loss, "final training loss"
        return "" if math.isfinite(loss) else f"{what} {loss}"

    @property
    def eval_loss(self) -> float:
        """Held-out loss at the end, NaN where none was measured (or where it is NaN: see `diverged`)."""
        return self.number("eval_loss")

    @cached_property
    def train_loss(self) -> float:
        """Mean loss of the last ten steps."""
        return float(self.log.loss.tail(_LAST).mean(skipna=False)) if len(self.log) else NAN

    @cached_property
    def step_time_ms(self) -> float:
        """Median ms per step, the first three left out, and those during which a recorder watched."""
        if not len(self.log):
            return NAN
        every = self.about.get("every")
        plain = self.log[self.log.step % every != 0] if every and every > 1 else self.log
        later = plain[plain.step >= plain.step.min() + 3] if len(plain) > 6 else plain
        return float(later.time_ms.median())

    @cached_property
    def events(self) -> dict[str, int]:
        """What the guard saw and did: lines of events.jsonl by kind and action, "overflow (promote)". Raises
        RunDirectoryError where a line is damaged."""
        if not (self.path / NAME).is_file():
            return {}
        counts = Counter(e.kind + ("" if e.action == "none" else f" ({e.action})") for e in read_events(self.path))
        return dict(counts)

    def number(self, key: str) -> float:
        """The figure `key` of run.json, NaN where it has none."""
        try:
            return float(self.about.get(key, NAN))
        except (TypeError, ValueError):
            return NAN

    @cached_property
    def plan(self) -> dict[str, Any] | None:
        """Content of `plan_file`, None where the run had no plan or it cannot be read."""
        if self.precision != "plan":
            return None
        try:
            return json.loads(self.plan_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    @property
    def plan_file(self) -> Path:
        """The plan that the run began with: a guard may have amended plan.json since."""
        start = self.path / "plan-start.json"
        return start if start.is_file() else self.path / "plan.json"


@dataclass(frozen=True, eq=False)
class Group:
    """A run and its twins of other seeds. seeds: seed -> run, the run's own included where it is known. notes: which
    twins were left out, and why."""

    run: Run
    seeds: dict[int, Run]
    notes: tuple[str, ...] = ()


def read_run(path: Path) -> Run:
    """Raises RunDirectoryError where `path` holds no training run, or a damaged one."""
    import pandas as pd

    file, log = path / "run.json", path / "train.parquet"
    if not file.is_file() or not log.is_file():
        raise RunDirectoryError(f"{path} holds no training run: make one with precscope train TASK --out {path}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunDirectoryError(f"{file} is not JSON ({error}): train again") from error
    if not isinstance(content, dict) or not isinstance(result := content.get("result", {}), dict):
        raise RunDirectoryError(f"{file} does not describe a run: train again")
    try:
        rows = pd.read_parquet(log)
    except Exception as error:  # pyarrow raises many kinds for a damaged file
        raise RunDirectoryError(f"{log} cannot be read ({first_line(error):.120}): train again") from error
    missing = [name for name in _COLUMNS if name not in rows]
    if missing:
        raise RunDirectoryError(f"{log} is not the log of a training run (no column {missing[0]!r}): train again")
    return Run(path, {**content, **result}, rows)


def read_group(path: str | Path) -> Group:
    """The run in `path` and the finished twins below `path`/seeds that were made with its configuration."""
    run = read_run(Path(path))
    seeds, notes = ({run.seed: run} if run.seed is not None else {}), []
    for folder in twin_directories(run.path):
        try:
            twin = read_run(folder)
        except RunDirectoryError as error:
            started = (folder / "run.json").is_file() and not (folder / "train.parquet").exists()
            notes.append(f"seeds/{folder.name} left out: {'killed before its first step' if started else error}")
            continue
        reason = twin.unfinished or changed(run, twin)
        if reason:
            notes.append(f"seeds/{folder.name} left out: {reason}")
        elif twin.seed is not None and twin.seed not in seeds:
            seeds[twin.seed] = twin
    return Group(run, dict(sorted(seeds.items())), tuple(notes))


def twin_directories(path: Path) -> list[Path]:
    """Directories below `path`/seeds, by seed."""
    folder = path / "seeds"
    found = [p for p in folder.iterdir() if re.fullmatch(r"\d{4,}", p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name))


def changed(run: Run, twin: Run, *, precision: str | None = None) -> str:
    """What differs between a run and a twin that should be the same but for its seed ("its lr was 0.001, ..."), ""
    where nothing does; with `precision` ("fp32"): the same but for its precision, which should be that one.

    A twin of a run that was made anew since counts as changed: code or data may have been others.
    """
    wanted = precision or run.precision
    if twin.precision != wanted:
        return f"its precision was {twin.precision}, not {wanted}"
    if precision is not None and twin.seed != run.seed:
        return f"its seed was {twin.seed}, the run's is {run.seed}"
    made_for = twin.about.get("twin_of_start")
    for key in ("model", "parameters", "device", *(("task",) if made_for is None else ())):
        if key in twin.about and twin.about[key] != run.about.get(key):
            return f"its {key} was {twin.about[key]}, the run's is {run.about.get(key)}"
    names = different_settings(run, twin)
    if precision is not None:
        names = [n for n in names if n not in STORAGE]
        if not twin.is_fp32:
            return "it stored parameters or optimizer state in less than fp32"
    if names:
        return f"its {names[0]} was {twin.settings.get(names[0])}, the run's is {run.settings.get(names[0])}"
    if precision is None and twin.plan != run.plan:
        return "its plan was another"
    if precision is None and len(twin.log) and first_scale(twin) != first_scale(run):
        return f"its first loss scale was {first_scale(twin):g}, the run's is {first_scale(run):g}"
    if made_for is not None and not run.about.get("resumed_from") and made_for != run.about.get("started"):
        return "the run was made anew since"
    return ""


def different_settings(run: Run, other: Run) -> list[str]:
    """Names of the trainer's settings that differ, without those that change no figure. A setting that one of the
    two does not know (an older run) counts as equal. What parameters are stored in is part of a plan, where both have
    one."""
    mine, theirs = run.settings, other.settings
    apart = _HARMLESS | ({"params"} if run.precision == other.precision == "plan" else set())
    return [name for name in mine if name in theirs and name not in apart and mine[name] != theirs[name]]


def first_scale(run: Run) -> float:
    """Loss scale of the first step, 1 where there is none."""
    return float(run.log.scale.iloc[0]) if len(run.log) and "scale" in run.log else 1.0
