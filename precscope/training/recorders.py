"""A recorder for a training run that is not shadowed: ranges of every N-th step, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    from .loop import Trainer


def recording_every(
    every: int, out: str | Path, *, shadow_every: int | None = None, resume: bool = False
) -> Callable[[Trainer], AbstractContextManager[Any]]:
    """What `ps.train` takes as recorder to record the steps 0, every, 2 every, ... into `out`, its run directory.

    shadow_every: also run every so manieth step in fp32, as far as it is recorded. resume: as for `ps.train`. The run's
    numbers are the same bit for bit. Raises UsageError for numbers below 1.
    """
    for name, value in (("every", every), ("shadow_every", shadow_every)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UsageError(f"{name} must be a number of steps of at least 1, not {value!r}")

    def make(trainer: Trainer) -> AbstractContextManager[Any]:
        from ..recording import record

        return record(
            trainer.forward_model, out, optimizer=trainer.optimizer, scaler=trainer.scaler, every=every,
            shadow_every=shadow_every, exist="append", first_step=trainer.first_step if resume else 0,
        )  # fmt: skip

    make.shadow_every = shadow_every  # type: ignore[attr-defined]  # the trainer asks whether steps may be shadowed
    return make
