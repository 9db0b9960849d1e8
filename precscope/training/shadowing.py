"""Shadow steps of the trainer: a step's micro-batches once more in fp32, where a recorder asks for it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..batches import RandomStates, copy_containers
from ..errors import RunDirectoryError, TrainingError, UsageError, one_line

if TYPE_CHECKING:
    from .engine import Engine
    from .loop import Trainer


class Recorder(Protocol):
    """What the loop asks of a recorder: to be told of the end of each optimizer step. Where it also has `shadow_due`
    and `shadow`, as ps.Recorder does, a step that is due is run once more in fp32 before the optimizer steps; where it
    has `index` and `go_back`, it is told when the run goes back to an earlier step."""

    def step(self) -> None: ...


class ShadowSteps:
    """The micro-batches of a step that is to be shadowed, kept with their random states until it is."""

    def __init__(self) -> None:
        self._kept: list[tuple[Any, RandomStates]] = []
        self._fails = False

    def due(self, watch: Any) -> bool:
        """Whether the present step is to be shadowed."""
        return not self._fails and getattr(watch, "shadow_due", False)

    def keep(self, batch: Any) -> None:
        """Remember a micro-batch that is about to be run."""
        self._kept.append((copy_containers(batch), RandomStates.take(cuda=True)))

    def run(self, watch: Any, loss_of: Callable[[Any], torch.Tensor], loss: torch.Tensor, engine: Engine) -> None:
        """The kept micro-batches once more in fp32, with the same random numbers. loss: of the running step.

        Where that fails (memory, or code that fp32 does not suit) on any process, all warn and train on without shadow
        steps. Raises TrainingError where it fails on some while the others wait for them in the midst of theirs.
        """
        kept, self._kept = self._kept, []
        count = len(kept)

        def closure(batch: Any) -> Callable[[], torch.Tensor]:
            def again() -> torch.Tensor:
                loss = loss_of(copy_containers(batch))  # it may be run twice, and may pop its labels
                return loss / count if count > 1 else loss

            return again

        failure: Exception | None = None
        try:
            watch.shadow([closure(batch) for batch, _ in kept], loss=loss, random=[state for _, state in kept])
        except RunDirectoryError:
            raise
        except Exception as error:
            failure = error
        said = f"running a step in fp32 raised {one_line(failure, limit=200)}" if failure is not None else ""
        try:
            self._fails = not engine.all_did(failure is None)
        except TrainingError as error:
            if failure is None:
                raise
            raise TrainingError(f"{said}, and not on all processes: train without shadow_every ({error})") from failure
        if failure is not None:
            warnings.warn(f"no shadow steps: {said}", RuntimeWarning, stacklevel=2)
        elif self._fails:
            warnings.warn("no shadow steps: they failed on another process", RuntimeWarning, stacklevel=2)


@contextmanager
def entered(recorder: Any, trainer: Trainer) -> Iterator[Recorder | None]:
    """The recorder of a run: as it is where it has step() (it may have watch(optimizer=, scaler=), to be told of them),
    else what the function makes of the trainer, entered."""
    if recorder is None or hasattr(recorder, "step"):
        if hasattr(recorder, "watch"):
            recorder.watch(optimizer=trainer.optimizer, scaler=trainer.scaler)
        yield recorder
        return
    with recorder(trainer) as watch:
        yield watch


def may_shadow(recorder: Any) -> bool:
    """Whether the recorder of a run, or what makes it, may ask for shadow steps."""
    return (
        recorder is not None and getattr(recorder, "shadow_every", None if hasattr(recorder, "step") else 1) is not None
    )


def shadow_recorder(
    every: int, out: str | Path | None, recorder: Any, *, resume: bool
) -> Callable[[Trainer], AbstractContextManager[Any]]:
    """A recorder of the steps 0, every, 2 every, ... that shadows each."""
    if not isinstance(every, int) or every < 1:
        raise UsageError(f"shadow_every must be an integer of at least 1, or None, not {every!r}")
    if out is None:
        raise UsageError("shadow_every needs out=, the run directory into which shadow steps are recorded")
    if recorder is not None:
        raise UsageError("give shadow_every to the recorder: ps.record(..., shadow_every=...)")

    def make(trainer: Trainer) -> AbstractContextManager[Any]:
        from ..recording import record

        return record(
            trainer.forward_model, out, optimizer=trainer.optimizer, scaler=trainer.scaler, every=every,
            shadow_every=every, exist="append", first_step=trainer.first_step if resume else 0,
        )  # fmt: skip

    return make
