"""Optimizers of the trainer, and what the loop asks of gradients."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..batches import kind_of
from ..errors import TaskError

if TYPE_CHECKING:
    from ..tasks import Task
    from .config import TrainConfig


def make_optimizer(task: Task, config: TrainConfig) -> torch.optim.Optimizer:
    """The task's optimizer, made where it is a function; AdamW with decay on matrices only where the task has none.

    Raises TaskError where nothing is trainable, the function makes something else, or the optimizer needs a closure.
    """
    model = task.model
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise TaskError(
            f"{type(model).__name__} has no trainable parameter (requires_grad=True): nothing to train; "
            "to record inference use precscope.profile(task, train=False)"
        )
    made = task.optimizer
    if made is None:
        return _adamw(trainable, config)
    if not isinstance(made, torch.optim.Optimizer):
        made = made(model.parameters() if _takes_parameters(made) else model)
    if not isinstance(made, torch.optim.Optimizer):
        raise TaskError(f"the task's optimizer function must return a torch.optim.Optimizer, not {kind_of(made)}")
    if isinstance(made, torch.optim.LBFGS):
        raise TaskError("LBFGS needs a closure, which the trainer does not give: use ps.record in a loop of your own")
    return made


def _adamw(trainable: list[nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=1e-3 if config.lr is None else config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in trainable),
    )


def _takes_parameters(function: Any) -> bool:
    """Whether an optimizer factory takes parameters (see Task.optimizer) and not the model."""
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, type):
        return issubclass(function, torch.optim.Optimizer)
    names = list(inspect.signature(function).parameters)
    return bool(names) and names[0] in ("params", "parameters")


def gradients(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Gradients of all parameters the optimizer holds; sparse ones as their coalesced values."""
    found = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            if parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()
                found.append(parameter.grad._values())
            else:
                found.append(parameter.grad)
    return found


def total_norm(grads: list[torch.Tensor]) -> torch.Tensor:
    """2-norm of all gradients together: float scalar; summed in fp32 where some are stored lower."""
    if any(g.dtype in (torch.float16, torch.bfloat16) for g in grads):  # a norm in fp16 ends at 65504
        return torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32).to(grads[0].device) for g in grads]).norm()
    return torch.nn.utils.get_total_norm(grads)


def clip(grads: list[torch.Tensor], norm: torch.Tensor, limit: float | None) -> None:
    """Scale `grads`, whose total 2-norm is `norm`, in place so that it is at most `limit` (None: leave them)."""
    if limit is not None:
        coefficient = torch.clamp(limit / (norm + 1e-6), max=1.0)
        for grad in grads:
            grad.mul_(coefficient.to(grad.device))
