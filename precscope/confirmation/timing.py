"""Two plans timed side by side on the model: what single modules measured alone promise need not come true together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from ..applying import apply
from ..attribution import unwrap
from ..batches import copy_containers
from ..plans import PrecisionPlan
from ..preservation import eager, preserved
from ..tasks import Task
from ..training.devices import own_device, to_device

_ROUNDS, _STEPS = 5, 2


def step_times(task: Task, batch: Any, plans: Sequence[PrecisionPlan]) -> list[float]:
    """Median seconds of a forward and backward pass with each plan, in turns within one run. Nothing is changed."""
    model = unwrap(task.model)
    device = own_device(model)
    batch = to_device(batch, device)
    times: list[list[float]] = [[] for _ in plans]
    with preserved(model), eager():
        model.train()
        for round_ in range(_ROUNDS):
            order = range(len(plans)) if round_ % 2 == 0 else reversed(range(len(plans)))
            for index in order:
                torch.clear_autocast_cache()
                with apply(plans[index], model) as handle:
                    for step in range(_STEPS + 1):
                        start = _now(device)
                        with handle.autocast(device.type):
                            loss = task.checked_loss(copy_containers(batch))
                        loss.backward()
                        if step:  # the first one warms up
                            times[index].append(_now(device) - start)
                        for parameter in model.parameters():
                            parameter.grad = None
    return [median(t) for t in times]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
