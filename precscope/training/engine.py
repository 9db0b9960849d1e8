"""Where and how many: the processes that train together. One process is the default, and does nothing special."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import UsageError
from .optim import total_norm

if TYPE_CHECKING:
    from .precision import Precision


class Engine:
    """One process. Subclasses change what several need.

    world: processes. rank: of this one. main: whether this one writes files. notes: what a reader should know.
    """

    world, rank, main = 1, 0, True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.notes: list[str] = []

    @staticmethod
    def from_environment(strategy: str | None, device: torch.device) -> Engine:
        """The engine for `strategy`; one process where the environment names no more. Raises UsageError."""
        if strategy is None and int(os.environ.get("WORLD_SIZE", "1")) <= 1:
            return Engine(device)
        raise UsageError(f"strategy {strategy!r} is not available")

    def wrap(self, model: nn.Module, precision: Precision) -> nn.Module:
        """What the loss function calls in place of `model`, on which the plan is already."""
        return model

    def micro_index(self, step: int, index: int, accumulate: int) -> int:
        """Which of the task's batches this process takes as micro-batch `index` of `step`."""
        return step * accumulate + index

    def accumulating(self, model: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch; `last`: of the last one of the step."""
        return nullcontext()

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Mean over the processes."""
        return value

    def any(self, flag: torch.Tensor) -> torch.Tensor:
        """Whether `flag` (bool scalar) holds on any process."""
        return flag

    def total_norm(self, grads: list[torch.Tensor]) -> torch.Tensor:
        """2-norm of all gradients together: float scalar."""
        return total_norm(grads)

    def model_state(self, model: nn.Module) -> dict[str, Any]:
        """model.state_dict(), whole."""
        return model.state_dict()

    def optimizer_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """optimizer.state_dict(), whole."""
        return optimizer.state_dict()

    def load_state(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, model_state: Any, optimizer_state: Any
    ) -> None:
        """Inverse of both."""
        model.load_state_dict(model_state)
        optimizer.load_state_dict(optimizer_state)

    def gather_objects(self, value: Any) -> list[Any]:
        """`value` of each process, by rank."""
        return [value]

    def barrier(self) -> None:
        """Wait for all processes."""

    def close(self) -> None:
        """Leave the process group, where this object made it."""

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
