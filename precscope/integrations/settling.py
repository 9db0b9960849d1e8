"""A plan on a model that may be trained or only used: PlanHandle.settle where it is trained."""

from __future__ import annotations

from typing import Any

import torch

from ..applying import PlanHandle


class Settling:
    """A plan in force. trained: whether the stored values of trainable parameters are the model by now, so that those
    which training left as they were do not go back to values that it never saw."""

    def __init__(self, handle: PlanHandle) -> None:
        self.handle, self.trained = handle, False

    def begin(self) -> None:
        """Training begins."""
        self.handle.settle()
        self.trained = True

    def before_step(self, optimizer: torch.optim.Optimizer, *args: Any) -> None:
        """`optimizer` is about to step, which trains the model where it holds parameters of it. As a hook, too."""
        if not self.trained:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if any(id(p) in held for p in self.handle.model.parameters()):
                self.begin()

    def remove(self) -> None:
        """Take the plan off."""
        if self.trained:
            self.handle.settle()  # what was unfrozen since
        self.handle.remove()
