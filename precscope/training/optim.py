"""Optimizers of the trainer, and what the loop asks of gradients."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..batches import kind_of
from ..errors import PlanError, TaskError, UsageError
from .config import UPDATES
from .narrowing import check_state
from .parameters import LOW, LowPrecisionOptimizer

if TYPE_CHECKING:
    from ..plans import PrecisionPlan
    from ..tasks import Task
    from .config import TrainConfig


def make_optimizer(task: Task, config: TrainConfig, plan: PrecisionPlan | None = None) -> torch.optim.Optimizer:
    """The task's optimizer, made where it is a function; AdamW with decay on matrices only where the task has none.

    Within a LowPrecisionOptimizer where `config` or else `plan.optimizer` names updates or a state format. Call it when
    the plan is on the model. Raises TaskError where nothing is trainable, the function makes something else, or the
    optimizer needs a closure; UsageError and PlanError for updates and formats that do not exist.
    """
    optimizer = _own_optimizer(task, config)
    advice = plan.optimizer if plan is not None else {}
    updates, state = config.updates or advice.get("updates"), config.state or advice.get("state") or "fp32"
    if updates not in (None, *UPDATES):
        raise PlanError(f"the plan's optimizer.updates must be one of {', '.join(UPDATES)}, not {updates!r:.40}")
    check_state(state)
    if isinstance(optimizer, LowPrecisionOptimizer) or (updates is None and state == "fp32"):
        return optimizer
    stored_low = any(p.dtype in LOW for group in optimizer.param_groups for p in group["params"])
    if not stored_low and state == "fp32" and not (plan is not None and plan.phases):
        return optimizer  # all is fp32: nothing would be done differently
    # many micro-batches are summed in fp32 where autograd can do so: not into the buckets of several processes
    single = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    summed = "fp32" if config.accumulate > 1 and single else None
    return LowPrecisionOptimizer(
        optimizer, updates=updates or "nearest", state=state, gradients=summed, seed=config.seed
    )


def storage_plan(
    plan: PrecisionPlan | None, precision: str | None, config: TrainConfig, *, initial_scale: float | None = None
) -> tuple[PrecisionPlan | None, str | None]:
    """(plan, precision) to train with where `config.params` asks for low parameters: a plan that stores all of them so.

    Raises UsageError beside a plan, which says itself how each module's parameters are stored.
    """
    if plan is not None and "state" in plan.optimizer:
        check_state(plan.optimizer["state"])  # now: torchao must be there before a checkpoint is read
    if config.params in (None, "fp32"):
        return plan, precision
    if plan is not None:
        raise UsageError(
            f"give a plan or params={config.params!r}, not both: a plan says how the parameters of each module are "
            "stored (its entries' params)"
        )
    from ..plans import PrecisionPlan

    made = PrecisionPlan.uniform(precision or "fp32", params=config.params)
    return (made if initial_scale is None else made.replace(loss_scale={"initial": float(initial_scale)})), None


def set_lr(group: dict[str, Any], value: float) -> None:
    """Set a group's learning rate: in place where the optimizer keeps it as a tensor (torchao's do)."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(value)
    else:
        group["lr"] = value


def _own_optimizer(task: Task, config: TrainConfig) -> torch.optim.Optimizer:
    """The task's, or the trainer's own."""
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
        if all(type(grad) is torch.Tensor and grad.device == coefficient.device for grad in grads):
            torch._foreach_mul_(grads, coefficient)  # one call, as torch.nn.utils.clip_grad_norm_ does
            return
        for grad in grads:
            grad.mul_(coefficient.to(grad.device))
