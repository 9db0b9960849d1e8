"""How a task's model is called on a batch.

A task says it with `forward`. Where it does not, the loss function knows: it is run once, and the arguments that it
calls the model with are taken from there. Where it calls the model not exactly once, the model gets the batch itself,
model(*batch).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ..errors import TaskError, one_line
from ..preservation import eager
from ..tasks import Task

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Call:
    """One run of the model on one batch. function: data -> output. data: what it takes. how: in words."""

    function: Callable[[Any], Any]
    data: Any
    how: str

    def fresh(self) -> Any:
        """The data with tensors of its own: a model may write to its inputs."""
        return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, self.data)


def find_call(task: Task, batch: Any) -> Call:
    """How `task` runs its model on `batch`; see the module's docstring. Runs the loss once where there is no `forward`.

    Raises TaskError where neither forward nor loss tells, and the batch itself cannot be passed on.
    """
    model = task.model
    if task.forward is not None:
        forward = task.forward
        return Call(lambda data: forward(model, data), batch, "task.forward(model, batch)")
    found, why = _from_loss(task, batch)
    if found is not None:
        return Call(lambda data: model(*data[0], **data[1]), found, "the model as the task's loss calls it")
    if isinstance(batch, Mapping):
        return Call(lambda data: model(**data), batch, f"model(**batch): {why}")
    if isinstance(batch, tuple | list):
        return Call(lambda data: model(*data), batch, f"model(*batch): {why}")
    if isinstance(batch, torch.Tensor):
        return Call(lambda data: model(data), batch, f"model(batch): {why}")
    raise TaskError(
        f"cannot tell how the model is called on a batch of type {type(batch).__name__} ({why}): "
        "give Task(forward=lambda model, batch: ...)"
    )


@contextmanager
def called_with(model: nn.Module) -> Iterator[list[Arguments]]:
    """Collects the arguments of each outermost call of `model` while inside."""
    calls: list[Arguments] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, dict(kwargs)))

    handle = model.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
    try:
        with eager():
            yield calls
    finally:
        handle.remove()


def _from_loss(task: Task, batch: Any) -> tuple[Arguments | None, str]:
    """What the loss calls the model with; else None and why."""
    data = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, batch)
    with called_with(task.model) as calls:
        try:
            task.loss(task.model, data)
        except Exception as error:  # the user's loss, which inference can do without
            return None, f"the loss cannot be run without gradients ({one_line(error)})"
    if len(calls) != 1:
        return None, f"the loss calls the model {len(calls)} times"
    return calls[0], ""
