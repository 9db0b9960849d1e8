"""What tasks that sort things into classes share: their loss, and the share that is right."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...batches import preserved_rng
from ...errors import TaskError
from ...tasks import Task
from ..devices import to_device
from ..evaluation import in_mode


def classification_loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Mean cross-entropy (nats) of the class, int64 [B], which comes last in the batch."""
    *inputs, classes = batch
    return F.cross_entropy(model(*inputs), classes)


def accuracy(model: nn.Module, task: Task, *, limit: int | None = None) -> float:
    """Share of the task's held-out examples whose class gets the largest logit, from 0 to 1.

    model: the task's, or one like it; put a plan on it (`with ps.apply(plan, model)`), or call this under
    torch.autocast, to measure that. Batches must end with the classes, int64 [B], and `task.forward` give logits
    [B, classes]: so do text, resnet and towers. limit: batches at most. Modes and random streams are put back.
    Raises TaskError where batches or outputs are something else.
    """
    right = total = 0
    with in_mode(model, training=False), preserved_rng(), torch.no_grad():
        for batch in task.evaluation(limit=limit):
            batch = to_device(batch, model)
            logits = task.forward(model, batch) if task.forward is not None else model(*batch[:-1])
            classes: Any = batch[-1] if isinstance(batch, tuple | list) else None
            if not _are_classes(classes, logits):
                raise TaskError(
                    f"{task.name} does not sort into classes: accuracy needs batches that end with classes (int64 [B]) "
                    "and a forward that gives logits [B, classes]"
                )
            right += int((logits.argmax(1) == classes).sum())
            total += len(classes)
    if not total:
        raise TaskError(f"{task.name} has no held-out batches to measure accuracy on")
    return right / total


def majority(task: Task, *, limit: int | None = None) -> float:
    """Share of the held-out examples that are of the most frequent class: what guessing it would reach."""
    classes = torch.cat([batch[-1] for batch in task.evaluation(limit=limit)])
    return float(classes.bincount().max() / len(classes))


def _are_classes(classes: object, logits: object) -> bool:
    return (
        isinstance(classes, Tensor) and isinstance(logits, Tensor) and classes.dtype == torch.int64
        and classes.ndim == 1 and logits.ndim == 2 and len(classes) == len(logits)
    )  # fmt: skip
