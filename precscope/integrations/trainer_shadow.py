"""Shadow steps inside a Hugging Face Trainer: the micro-batches of a step, run once more in fp32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..batches import RandomStates, copy_containers
from ..errors import UsageError
from ..recording import Recorder
from .replacing import replaced

_Micro = tuple[tuple[Any, ...], dict[str, Any]]


class ShadowedTraining:
    """While entered, `trainer.training_step` also takes the shadow steps that `recorder` says are due.

    It keeps the micro-batches of such a step (references), and after the last one, whose backward has completed .grad
    and before it is clipped, runs them again. How a loss is made of a batch and divided is asked of the Trainer itself:
    its own training_step is run with an accelerator whose `backward` only takes the loss. Raises UsageError where that
    is not called once.
    """

    def __init__(self, trainer: Any, recorder: Recorder) -> None:
        self._trainer, self._recorder = trainer, recorder
        self._own: Callable[..., torch.Tensor] = trainer.training_step
        self._before = vars(trainer).get("training_step")
        self._kept: list[_Micro] = []
        self._states: list[RandomStates] = []
        self._loss: torch.Tensor | float = 0.0

    def __enter__(self) -> ShadowedTraining:
        self._trainer.training_step = self._training_step
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is None:
            vars(self._trainer).pop("training_step", None)
        else:
            self._trainer.training_step = self._before
        self._forget()

    def _training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the Trainer calls it: (model, inputs, num_items_in_batch) -> loss."""
        if not self._recorder.shadow_due:
            return self._own(*args, **kwargs)
        self._states.append(RandomStates.take(cuda=True))
        self._kept.append((copy_containers(args), copy_containers(kwargs)))
        loss = self._own(*args, **kwargs)
        self._loss = self._loss + loss.detach()
        if self._trainer.accelerator.sync_gradients:
            closures = [partial(self._loss_of, *micro) for micro in self._kept]
            total, states = self._loss, list(self._states)
            self._forget()
            self._recorder.shadow(closures, loss=total, random=states)
        return loss

    def _loss_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """The loss of a micro-batch as training_step hands it to backward."""
        taken: list[torch.Tensor] = []
        with replaced(self._trainer.accelerator, "backward", lambda loss, **kw: taken.append(loss)):
            self._own(*copy_containers(args), **copy_containers(kwargs))
        if len(taken) != 1:
            raise UsageError(
                "shadow_every needs a Trainer whose training_step calls accelerator.backward once, and that of "
                f"{type(self._trainer).__name__} calls it {len(taken)} times: leave shadow_every out"
            )
        return taken[0]

    def _forget(self) -> None:
        self._kept, self._states, self._loss = [], [], 0.0
