"""Swallowed updates: parameters stored in 16 bits that do not move although their gradient says so.

A run that stores its parameters low has in its records only the updates that were not swallowed. So for a few steps now
and then the optimizer's step is watched itself: what share of the gradient, sum of |g| over all elements, belongs to
elements that the step left as they were? That is the share of the progress that storage loses, to first order, where
updates are of one size (Adam) or proportional to the gradient (SGD), as advice/storage.py predicts it from records of
an fp32 run. Rounding that is right on average or carries the rest over (parameters.py) leaves elements as they are,
too, and loses nothing: nothing is watched then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...attribution import unwrap
from ..parameters import LOW, LowPrecisionOptimizer
from ..shards import local
from .config import GuardConfig

if TYPE_CHECKING:
    from ..loop import Trainer

_STEPS = 5  # watched in a row
_FADED = 0.05  # of the largest lr * sum |g| of the run: less is no progress to lose


@dataclass(frozen=True)
class Lost:
    """share: of the model's progress. modules: those that lose it, the worst first, each with its own share of the
    whole model's progress. lr: learning rate."""

    share: float
    modules: tuple[tuple[str, float], ...]
    lr: float

    @property
    def text(self) -> str:
        """In words."""
        worst = ", ".join(f"{name or '(root)'} {share:.0%}" for name, share in self.modules[:3])
        more = f" and {len(self.modules) - 3} more" if len(self.modules) > 3 else ""
        return (
            f"{self.share:.0%} of the model's progress is swallowed: at lr {self.lr:.3g} updates are below half an ulp "
            f"of parameters stored in 16 bits ({worst}{more})"
        )


class StorageWatch:
    """Watches a few steps of the optimizer in every `config.storage_every`."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self._largest = 0.0
        self._handles: list[Any] = []
        self._before: dict[torch.Tensor, torch.Tensor] = {}
        self._sums: dict[torch.Tensor, torch.Tensor] = {}  # parameter -> [lost, whole] of |g|, float64 on its device

    def after(self, trainer: Trainer) -> Lost | None:
        """To be called between steps, all of them in the time of watching: what was lost, where a watch ends."""
        position = (trainer.next_step - self.config.settle_steps) % self.config.storage_every
        if trainer.next_step < self.config.settle_steps or not _may_lose(trainer):
            self._detach()
            return None
        if position == 0:
            self._sums.clear()
        if position < _STEPS and not self._handles:
            self._attach(trainer)
        if position < _STEPS or not self._handles:
            return None
        self._detach()
        return self._lost(trainer)

    def close(self, trainer: Trainer) -> bool:
        """Whether each step is to be read."""
        position = (trainer.next_step - self.config.settle_steps) % self.config.storage_every
        near = position < _STEPS + 1 or position >= self.config.storage_every - self.config.look_every
        return near and _may_lose(trainer)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint. A watch that a kill cuts short is not taken up again."""
        return {"largest": self._largest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict."""
        self._largest = state["largest"]

    def _attach(self, trainer: Trainer) -> None:
        self._handles = [
            trainer.optimizer.register_step_pre_hook(self._pre), trainer.optimizer.register_step_post_hook(self._post)
        ]  # fmt: skip
        trainer.on_leaving(self._detach)  # no hook may outlive the run, whatever ends it

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._before.clear()

    def _pre(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        held = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        self._before = {p: local(p).clone() for p in held if p.dtype in LOW}

    @torch.no_grad()
    def _post(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                gradient = local(p.grad)
                size = (gradient.to_dense() if gradient.layout is not torch.strided else gradient).abs().double()
                before = self._before.get(p)
                lost = size[local(p) == before].sum() if before is not None else torch.zeros_like(size.sum())
                self._sums[p] = self._sums.get(p, 0) + torch.stack([lost, size.sum()])
        self._before.clear()

    def _lost(self, trainer: Trainer) -> Lost | None:
        owners: dict[torch.Tensor, str] = {
            p: name.rpartition(".")[0] for name, p in unwrap(trainer.model).named_parameters()
        }
        known = [(owners.get(p, ""), pair.tolist()) for p, pair in self._sums.items()]
        parts = [pair for found in trainer.engine.gather_objects(known) for pair in found]
        whole = sum(pair[1] for _, pair in parts)
        lr = float(trainer.optimizer.param_groups[0]["lr"])
        self._largest = max(self._largest, lr * whole)
        if not whole > 0 or lr * whole < _FADED * self._largest:
            return None
        shares: dict[str, float] = {}
        for name, (lost, _) in parts:
            shares[name] = shares.get(name, 0.0) + lost / whole
        ranked = sorted(((n, s) for n, s in shares.items() if s > 0), key=lambda pair: -pair[1])
        total, left, worst = sum(shares.values()), sum(shares.values()), []
        if total <= self.config.swallowed:
            return None
        for name, share in ranked:
            if left <= self.config.swallowed / 10:
                break
            worst.append((name, share))
            left -= share
        return Lost(total, tuple(worst), lr)


def _may_lose(trainer: Trainer) -> bool:
    """Whether parameters are stored low, and rounded to nearest."""
    optimizer = trainer.optimizer
    if isinstance(optimizer, LowPrecisionOptimizer) and optimizer.updates != "nearest":
        return False
    return any(p.dtype in LOW for group in optimizer.param_groups for p in group["params"])
