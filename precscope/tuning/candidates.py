"""Precisions side by side: real training steps in each, in turns, on models that start equal.

Memory is that of one micro-batch: what stays (parameters, buffers, gradients, optimizer state) and what a forward pass
keeps for its backward, counted from the tensors themselves, so that the figure is the same on every machine and at
every try. Work space and fragmentation come on top: on a GPU what the allocator measured is taken instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from ..errors import TrainingError
from ..plans import PrecisionPlan
from ..tasks import TaskRef
from ..training import Trainer, train
from ..training.devices import own_device

ROUNDS, STEPS = 3, 8
_WARMUP = 3  # steps of each run whose time does not count (TrainResult.step_time_ms leaves them out)


@dataclass(frozen=True)
class Candidate:
    """One precision, trained for some steps with one micro-batch each.

    name: "fp32", "bf16" and "fp16" (plain autocast), or "plan". step_ms: median time of a step; (fastest_ms,
    slowest_ms): of the rounds' medians. fixed_bytes: parameters, buffers, gradients, optimizer state.
    activation_bytes: what the forward pass of one micro-batch keeps for the backward pass. skipped: steps of the last
    round that a loss scale made skip. safe: whether it may be chosen. note: why not, or what to know.
    """

    name: str
    step_ms: float
    fastest_ms: float
    slowest_ms: float
    fixed_bytes: int
    activation_bytes: int
    skipped: int = 0
    safe: bool = True
    note: str = ""

    @property
    def memory_bytes(self) -> int:
        """Of one micro-batch: fixed_bytes + activation_bytes."""
        return self.fixed_bytes + self.activation_bytes


def measure(
    ref: TaskRef,
    precisions: Mapping[str, PrecisionPlan | None],
    *,
    seed: int = 0,
    rounds: int = ROUNDS,
    steps: int = STEPS,
    note: Callable[[str], None] | None = None,
    **settings: Any,
) -> list[Candidate]:
    """Train each precision `rounds` times for `steps` steps, each time on a new model, every other round backwards.

    precisions: name -> its plan, or None for plain autocast in the format of that name. settings: as in `ps.train`.
    A precision that cannot train (TrainingError) is a candidate that is not safe, with the reason as its note.
    """
    times: dict[str, list[float]] = {name: [] for name in precisions}
    counted: dict[str, _Count] = {}
    skipped: dict[str, int] = {}
    failed: dict[str, str] = {}
    for round_ in range(rounds):
        names = list(precisions) if round_ % 2 == 0 else list(reversed(precisions))
        for name in (n for n in names if n not in failed):
            if round_ == 0 and note is not None:
                note(f"timing training steps in {name}")
            run = {"seed": seed, "schedule": "constant", **settings}
            try:
                if name not in counted:
                    counted[name] = _count(ref, name, precisions[name], run)
                result = _train(ref, name, precisions[name], {**run, "steps": steps})
            except TrainingError as error:
                failed[name] = str(error)
                continue
            times[name].append(result.step_time_ms)
            skipped[name] = result.skipped_steps
    return [_candidate(n, times[n], counted.get(n), skipped.get(n, 0), failed.get(n)) for n in precisions]


def _candidate(name: str, times: Sequence[float], count: _Count | None, skipped: int, failed: str | None) -> Candidate:
    nan = float("nan")
    return Candidate(
        name,
        median(times) if times else nan,
        min(times, default=nan),
        max(times, default=nan),
        count.fixed if count else 0,
        count.activations if count else 0,
        skipped,
        safe=failed is None,
        note=failed or "",
    )


def _train(ref: TaskRef, name: str, plan: PrecisionPlan | None, settings: dict[str, Any]) -> Any:
    task = ref.make(seed=settings["seed"])
    task.eval_batches = None  # training steps alone are timed
    return train(task, plan=plan, precision=None if plan is not None else name, **settings)


def _count(ref: TaskRef, name: str, plan: PrecisionPlan | None, settings: dict[str, Any]) -> _Count:
    """Memory of one training step."""
    found = _Count()
    result = _train(ref, name, plan, {**settings, "steps": 1, "recorder": found.watching, "nonfinite_limit": 2})
    if torch.cuda.is_available() and found.device == "cuda":
        found.activations = max(found.activations, result.peak_memory_bytes - found.fixed)
    return found


class _Count:
    """Counts bytes while a trainer trains; see the module's docstring."""

    fixed = activations = 0
    device = "cpu"

    @contextmanager
    def watching(self, trainer: Trainer) -> Iterator[_Count]:
        """The recorder of a run (see ps.train)."""
        self._trainer, self._saved = trainer, {}
        self.device = own_device(trainer.model).type
        stays = {_storage(p)[0] for p in trainer.model.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            place, size = _storage(tensor)
            if place not in stays:
                self._saved[place] = size
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield self

    def step(self) -> None:
        """After the optimizer's step."""
        model, optimizer = self._trainer.model, self._trainer.optimizer
        state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        grads = [p for p in model.parameters() if p.requires_grad]
        stays = [*model.parameters(), *model.buffers(), *grads, *state]
        self.fixed = sum(t.numel() * t.element_size() for t in stays)
        self.activations = max(self.activations, sum(self._saved.values()))
        self._saved.clear()


def _storage(tensor: torch.Tensor) -> tuple[int, int]:
    """(where a tensor's memory begins, its size in bytes): views share it."""
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except (RuntimeError, NotImplementedError):  # sparse tensors have none
        return id(tensor), tensor.numel() * tensor.element_size()
