"""A saved step run again, and whether it comes out the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..batches import preserved_rng, seed_everything
from ..errors import UsageError
from ..plans import PrecisionPlan
from ..tracing.saved import plain
from ..training.checkpoint import set_random_states
from ..training.devices import pick_device, to_device
from .saved import load_step, weights_of
from .step import AnyTask, StepTrace, as_task, run_traced

if TYPE_CHECKING:
    from ..tracing import Finding


@dataclass(frozen=True)
class Replay:
    """A saved step run again. reproducible: each run met the same first finding, that of the file, and ended in the
    same bits. why: what was equal or not, in words. saved: the key of the finding in the file, None where it has none.
    """

    runs: tuple[StepTrace, ...]
    reproducible: bool
    why: str
    saved: tuple[Any, ...] | None

    @property
    def first(self) -> Finding | None:
        """The first finding of the first run."""
        return self.runs[0].first

    def __str__(self) -> str:
        return f"{self.runs[0]}\n{'reproducible' if self.reproducible else 'not reproducible'}: {self.why}"


def replay(path: str | Path, task: AnyTask, *, times: int = 2, device: str | torch.device | None = None) -> Replay:
    """Run a saved step `times` times under the tracer, each time from its weights, random states and batch.

    Raises UsageError for fewer than 2 times, RunDirectoryError where the file is missing, damaged, foreign, of a newer
    schema, or made with another model.
    """
    if times < 2:
        raise UsageError(f"times must be 2 or more, not {times}: one run alone cannot show whether it reproduces")
    content = load_step(Path(path))
    task = as_task(task, seed=0)
    plan = PrecisionPlan.from_json(content["plan"]) if content["plan"] else None
    place = pick_device(task.model, device)
    task.model.to(place)
    kept = content["batch"]
    runs = []
    with preserved_rng(cuda=True), weights_of(task.model, content["model"], str(path), content["buffers"]):
        for number in range(times):
            if content["random"] is not None:
                set_random_states(content["random"])
            else:
                seed_everything(number)  # what was drawn is not known: draw differently each time
            batch = to_device(task.batch(content["step"]) if kept is None else plain(kept), place)
            runs.append(
                run_traced(
                    task, batch, content["precision"], plan, content["scale"], digest=True, modes=content["training"]
                )
            )
    saved = tuple(content["found"]) if content["found"] is not None else None
    return Replay(tuple(runs), *_verdict(runs, saved, content), saved)


def _verdict(runs: list[StepTrace], saved: tuple[Any, ...] | None, content: dict[str, Any]) -> tuple[bool, str]:
    """(reproducible, why)."""
    keys = {run.first.key if run.first is not None else None for run in runs}
    random = "" if content["random"] is not None else "; the file keeps no random states, so dropout draws anew"
    if len(keys) > 1:
        return False, f"the {len(runs)} runs differ in their first finding{random}"
    if len({run.digest for run in runs}) > 1:
        return False, f"the {len(runs)} runs differ in the bits of loss or gradients{random}"
    now = runs[0].first.place if runs[0].first is not None else "no finding"
    if saved is not None and keys != {saved}:
        before = f"{saved[0] or '(root)'}, {saved[3]} ({saved[2]})"
        return False, f"the {len(runs)} runs are equal, but the file says {before} and they say {now}"
    same = " and those of the saved run" if content["digest"] and content["digest"] == runs[0].digest else ""
    return True, f"{len(runs)} runs with the same first finding and the same bits{same}"
