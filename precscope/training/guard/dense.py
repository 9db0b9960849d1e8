"""Every step recorded, for a few steps around an alarm: stats-*.parquet in the run directory."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ...errors import ModelError, RunDirectoryError
from ..log import write_run_json

if TYPE_CHECKING:
    from ..loop import Trainer


class DenseRecording:
    """begin, until: the steps that are recorded; until: the first that is not any more. A recorder that watches already
    records every step meanwhile; else one of our own is attached, and taken off when the run ends or changes
    precision."""

    def __init__(self) -> None:
        self.begin, self.until = 0, 0
        self._own: Any = None
        self._every: int | None = None
        self._failed = False

    def around(self, trainer: Trainer, step: int, steps: int) -> None:
        """Record `steps` steps before `step`, as far as they are still to come, and as many from it on."""
        if not steps or (trainer.out is None and trainer.watch is None) or self._failed:
            return
        self.begin, self.until = step - steps, step + steps
        self.go_on(trainer)

    def go_on(self, trainer: Trainer) -> None:
        """Attach where there are steps left to record; let go where there are none."""
        left = self.begin <= trainer.next_step < min(self.until, trainer.config.steps)
        if not left:
            self.stop(trainer)
        elif trainer.watch is None and trainer.out is not None:
            self._attach(trainer)
        elif self._own is None and self._every is None and hasattr(trainer.watch, "every"):
            self._every, trainer.watch.every = trainer.watch.every, 1

    def stop(self, trainer: Trainer) -> None:
        """Let go."""
        if self._every is not None and trainer.watch is not None:
            trainer.watch.every, self._every = self._every, None
        own, self._own = self._own, None
        if own is None:
            return
        if trainer.watch is own:
            trainer.watch = None
        told = _told(trainer)
        own.__exit__(None, None, None)
        if trainer.engine.main:  # the recorder has said that all is done
            write_run_json(trainer.out, told)

    def _attach(self, trainer: Trainer) -> None:
        from ...recording import record

        assert trainer.out is not None
        told = _told(trainer)
        try:
            recorder = record(
                trainer.forward_model, trainer.out, optimizer=trainer.optimizer, scaler=trainer.scaler, every=1,
                exist="append", first_step=trainer.next_step, info=told,
            )  # fmt: skip
            recorder.__enter__()
        except (ModelError, RunDirectoryError):
            self._failed = True
            return
        self._own = trainer.watch = recorder
        trainer.on_leaving(self.stop, trainer)  # no hook may outlive the run, whatever ends it


def _told(trainer: Trainer) -> dict[str, Any]:
    """What run.json says of the recording already: it stays."""
    assert trainer.out is not None
    with suppress(OSError, ValueError):
        content = json.loads((trainer.out / "run.json").read_text(encoding="utf-8"))
        return {key: content[key] for key in ("every", "status") if key in content}
    return {}
