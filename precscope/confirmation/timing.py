"""Two plans timed side by side on the model: what single modules measured alone promise need not come true together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Comparison:
    """Two plans timed in turn. ratio: time of the second over the first, median over rounds. noise: standard error of
    that median. ms: median of each."""

    ratio: float
    noise: float
    ms: tuple[float, float]

    @classmethod
    def of(cls, first: Sequence[float], second: Sequence[float]) -> Comparison:
        """From seconds of each round."""
        ratios = [b / a for a, b in zip(first, second, strict=True)]
        middle = median(ratios)
        deviation = 1.4826 * median(abs(r - middle) for r in ratios)  # of normal noise, from the median deviation
        noise = 1.2533 * deviation / len(ratios) ** 0.5  # of a median of n normal values
        return cls(middle, noise, (1e3 * median(first), 1e3 * median(second)))

    def gains(self, share: float) -> bool:
        """Whether the second is faster by `share`, with two standard errors to spare."""
        return self.ratio + 2 * self.noise < 1.0 - share

    def may_gain(self, share: float) -> bool:
        """Whether noise alone may hide that it is faster by `share`."""
        return self.ratio - 2 * self.noise < 1.0 - share


def step_times(task: Task, batch: Any, plans: Sequence[PrecisionPlan]) -> list[float]:
    """Median seconds of a forward and backward pass with each plan, in turns within one run. Nothing is changed."""
    rounds = _timed(task, batch, plans, _ROUNDS)
    return [median(t for steps in of_plan for t in steps) for of_plan in rounds]


def round_times(task: Task, batch: Any, plans: Sequence[PrecisionPlan], *, rounds: int) -> list[list[float]]:
    """Least seconds of a forward and backward pass, of each plan in each round: what other processes take of the
    machine only adds. Nothing is changed."""
    return [[min(steps) for steps in of_plan] for of_plan in _timed(task, batch, plans, rounds)]


def _timed(task: Task, batch: Any, plans: Sequence[PrecisionPlan], rounds: int) -> list[list[list[float]]]:
    """Seconds: [plan][round][step]. The order turns from round to round."""
    model = unwrap(task.model)
    device = own_device(model)
    batch = to_device(batch, device)
    times: list[list[list[float]]] = [[] for _ in plans]
    with preserved(model), eager():
        model.train()
        for round_ in range(rounds):
            for index in list(range(len(plans)))[:: 1 if round_ % 2 == 0 else -1]:
                times[index].append(_steps(task, batch, plans[index], device))
    return times


def _steps(task: Task, batch: Any, plan: PrecisionPlan, device: torch.device) -> list[float]:
    """Seconds of some steps; one more at first warms up."""
    model, times = unwrap(task.model), []
    torch.clear_autocast_cache()
    with apply(plan, model) as handle:
        for _ in range(_STEPS + 1):
            start = _now(device)
            with handle.autocast(device.type):
                loss = task.checked_loss(copy_containers(batch))
            loss.backward()
            times.append(_now(device) - start)
            for parameter in model.parameters():
                parameter.grad = None
    return times[1:]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
