"""The held-out loss, and what else leaves a model's mode as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..batches import preserved_rng
from ..errors import TaskError
from ..tasks import Task
from .devices import to_device
from .precision import Precision


def evaluate(task: Task, *, precision: Precision, limit: int | None = None, model: nn.Module | None = None) -> float:
    """Mean loss of the task's model over its held-out batches, in `precision` (a plan must be applied already).

    model: a wrapper of the model to call in its place.

    Raises TaskError where there are none. Modes and random streams are put back.
    """
    losses = []
    with in_mode(task.model, training=False), preserved_rng(), torch.no_grad():
        for batch in task.evaluation(limit=limit):
            with precision.forward_context():
                loss = task.checked_loss(to_device(batch, precision.device), needs_grad=False, model=model)
            losses.append(loss.double())
    if not losses:
        raise TaskError("eval_batches is empty: give at least one held-out batch, or None")
    return float(torch.stack(losses).mean())


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """The model in training or evaluation mode; each module's own mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
