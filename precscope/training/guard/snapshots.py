"""What a guard goes back to: checkpoints, or states kept in memory; steps that were left out, to be taken again; and
buffers that a failing step spoils."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ...attribution import unwrap
from ...errors import RunDirectoryError
from .. import checkpoint, persistence, phases

if TYPE_CHECKING:
    from ..loop import Trainer


_SMALL = 1 << 16  # elements of a buffer that is copied


class Snapshots:
    """States of the run. every: steps between those in memory, which are taken where the run writes no checkpoints.
    since: the step from which on they count."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.since = 0
        self._kept: deque[dict[str, Any]] = deque(maxlen=2)

    def changed(self, step: int) -> None:
        """The plan is another one from `step` on: what was before is not gone back to."""
        self.since = step
        self._kept.clear()

    def after(self, trainer: Trainer, step: int) -> None:
        """Keep the state after `step` steps where it is time to."""
        if trainer.out is not None and trainer.config.checkpoint_every and self._kept:
            return
        if not self._kept or step - self._kept[-1]["step"] >= self.every:
            self._kept.append(copied({**persistence.state_of(trainer), "guard": None, "step": step}))

    def before(self, trainer: Trainer, step: int) -> dict[str, Any] | None:
        """The newest state with at most `step` steps behind it, None where there is none."""
        found = [state for state in self._kept if state["step"] <= step]
        best = max(found, key=lambda state: state["step"], default=None)
        for path in checkpoint.checkpoints(trainer.out) if trainer.out is not None else []:
            try:
                state = checkpoint.load(path)
            except RunDirectoryError:
                continue  # damaged: the one before it
            if self.since <= state["step"] <= step and (best is None or state["step"] > best["step"]):
                best = state
        return copied({**best, "guard": None}) if best is not None else None

    def forget_after(self, step: int) -> None:
        """Drop the states with more than `step` steps behind them: they are of a course that was left."""
        self._kept = deque((s for s in self._kept if s["step"] <= step), maxlen=2)


class GoodBuffers:
    """Copies of the small floating buffers, running statistics above all, from the last good steps: a step whose
    update was not taken has still left its inf and NaN there. (Whether a buffer changes cannot be told beforehand:
    batch norm writes its own without a new version.)"""

    def __init__(self) -> None:
        self._copies: dict[str, torch.Tensor] = {}

    def keep(self, trainer: Trainer) -> None:
        """Copy them."""
        for name, buffer in self._buffers(trainer):
            copy = self._copies.get(name)
            if copy is None or copy.shape != buffer.shape or copy.device != buffer.device:
                self._copies[name] = buffer.detach().clone()
            else:
                copy.copy_(buffer.detach())

    @contextmanager
    def put_right(self, trainer: Trainer, *, stay: bool) -> Iterator[None]:
        """Those that are not finite any more, where the copy is, are as they were; after the block, too, if `stay`."""
        spoilt: list[tuple[torch.Tensor, torch.Tensor]] = []
        with torch.no_grad():
            for name, buffer in self._buffers(trainer):
                copy = self._copies.get(name)
                if copy is None or bool(torch.isfinite(buffer).all()) or not bool(torch.isfinite(copy).all()):
                    continue
                spoilt.append((buffer, buffer.detach().clone()))
                buffer.copy_(copy)
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, values in spoilt if not stay else []:
                    buffer.copy_(values)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"copies": copied(self._copies)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict."""
        self._copies = copied(state["copies"])

    def _buffers(self, trainer: Trainer) -> list[tuple[str, torch.Tensor]]:
        named = unwrap(trainer.model).named_buffers()
        return [(n, b) for n, b in named if b.is_floating_point() and b.device.type != "meta" and b.numel() <= _SMALL]


def copied(value: Any) -> Any:
    """`value` with tensors of its own."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return type(value)((k, copied(v)) for k, v in value.items())
    if type(value) in (list, tuple):
        return type(value)(map(copied, value))
    return value


def one_pass(trainer: Trainer) -> bool:
    """Whether the data come from a generator that cannot be read again."""
    return getattr(getattr(trainer.task, "_reader", None), "one_pass", False)


def take_again(trainer: Trainer, count: int) -> str:
    """Have the last `count` steps, all left out, taken again, where their data are still to be had and no phase began
    among them; in words, "" where none is."""
    first = trainer.next_step - count
    if trainer.plan is not None and trainer.plan.phases:
        first = max([first, *(s for s in phases.starts(trainer.plan) if s < trainer.next_step)])
    count = trainer.next_step - first
    if not count or one_pass(trainer):
        return ""
    trainer.repeat(first)
    return f"; {count} step{'s' if count > 1 else ''} left out, taken again from step {first} on"
