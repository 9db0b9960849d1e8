"""A short training from where the model stands, put back afterwards: the same batches in fp32 and with the plan."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..attribution import unwrap
from ..batches import copy_containers, preserved_rng
from ..plans import PrecisionPlan
from ..preservation import eager, preserved
from ..tasks import Task
from ..training.config import TrainConfig
from ..training.devices import own_device, to_device
from ..training.optim import gradients, make_optimizer, total_norm
from ..training.precision import Precision, make_precision
from .states import attributes_kept


@dataclass(frozen=True)
class Trial:
    """losses: one per step. skipped: steps that the loss scaler refused. error: what was raised, "" if nothing."""

    losses: tuple[float, ...]
    skipped: int = 0
    error: str = ""

    @property
    def finite(self) -> bool:
        return not self.error and all(loss - loss == 0 for loss in self.losses)

    @property
    def last(self) -> float:
        """Mean loss of the last quarter of the steps."""
        tail = self.losses[-max(1, len(self.losses) // 4) :]
        return sum(tail) / len(tail) if tail else float("nan")


@contextmanager
def state_kept(task: Task) -> Iterator[None]:
    """Parameters, buffers, gradients, modes, generators and the state of an optimizer that the task holds are as
    before afterwards. What else a user's code changes (an EMA copy outside the model) is its own."""
    model = unwrap(task.model)
    values = {p: p.detach().clone() for p in model.parameters()}
    with preserved(model), optimizer_kept(task):
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in values.items():
                    parameter.data = value if parameter.dtype is not value.dtype else parameter.data.copy_(value)


@contextmanager
def optimizer_kept(task: Task) -> Iterator[None]:
    """Where the task holds an optimizer itself: its state and settings are as before afterwards, the same tensors with
    the same values. Two trials then start equal."""
    optimizer = task.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        yield
        return
    kept = {parameter: dict(state) for parameter, state in optimizer.state.items()}
    values = copy.deepcopy([list(state.values()) for state in kept.values()])
    settings = [{k: copy.deepcopy(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    try:
        yield
    finally:
        optimizer.state.clear()
        for (parameter, state), old in zip(kept.items(), values, strict=True):
            for (key, value), content in zip(state.items(), old, strict=True):
                same = isinstance(value, torch.Tensor) and value.shape == content.shape and not value.is_sparse
                state[key] = value.copy_(content) if same else content
            optimizer.state[parameter] = state
        for group, old_settings in zip(optimizer.param_groups, settings, strict=True):
            group.update(old_settings)


def run_trial(
    task: Task,
    batches: Sequence[Any],
    *,
    plan: PrecisionPlan | None = None,
    initial_scale: float | None = None,
    scaling: bool = True,
) -> Trial:
    """Train in place on `batches`, one step each, in fp32 or with `plan`. Call it inside `state_kept`.

    Two trials from one state of the generators draw the same dropout masks; they are put back.
    initial_scale: of the loss, for a plan with fp16 that names none. scaling: False trains without a loss scale.
    """
    model = unwrap(task.model)
    device = own_device(model)
    mode: Precision = make_precision(None, plan=plan, model=model, device=device, initial_scale=initial_scale)
    if not scaling:
        mode.scaler = None
    losses: list[float] = []
    skipped = 0
    model.train()
    try:
        with preserved_rng(cuda=True), eager(), attributes_kept(model), optimizer_kept(task), mode.applied(model):
            optimizer = make_optimizer(task, TrainConfig(steps=max(1, len(batches))), plan)
            optimizer.zero_grad(set_to_none=True)
            for batch in batches:
                torch.clear_autocast_cache()  # kept as long as any autocast is around, stale after a step
                with mode.forward_context():
                    loss = task.checked_loss(to_device(copy_containers(batch), device))
                mode.backward(loss)
                mode.unscale(optimizer)
                norm = total_norm(gradients(optimizer))
                skipped += bool(mode.step(optimizer, torch.isfinite(norm)))
                optimizer.zero_grad(set_to_none=True)
                losses.append(float(loss.detach()))
    except Exception as error:  # the user's code
        lines = str(error).strip().splitlines()
        return Trial(tuple(losses), skipped, f"{type(error).__name__}: {lines[0]:.160}" if lines else repr(error))
    return Trial(tuple(losses), skipped)
