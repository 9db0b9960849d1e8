"""A step run again: under the tracer in the precision in force, or in true fp32 for comparison. Nothing of it stays.

A step that overflowed was not taken, so the weights are still those it was computed with: the same batch, the same
random numbers and the same loss scale show which op it was. Several processes look together, each at its own batches;
what the first of them found counts for all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...applying.suspension import suspended
from ...attribution import unwrap
from ...batches import RandomStates, copy_containers
from ...errors import TaskError, one_line
from ...preservation import eager, preserved
from ...tracing import Finding, trace
from ..halfmatmul import half_matmul_through_fp32

if TYPE_CHECKING:
    from ..loop import Trainer

Gradients = dict[str, torch.Tensor]
"""Unscaled, by parameter: fp32 on the device."""


@dataclass(frozen=True)
class Look:
    """One look at a step. found: the first finding of any process. loss: of this process, NaN where it raised.
    gradients: of this process, {} where they were not asked for. error: why the step could not be run, in words.
    missed: whether the batch is not to be had again."""

    found: Finding | None = None
    loss: float = math.nan
    gradients: Gradients | None = None
    error: str = ""
    missed: bool = False

    @property
    def ran(self) -> bool:
        """Whether it came to a finite loss."""
        return not self.error and not self.missed and math.isfinite(self.loss)

    @property
    def clean(self) -> bool:
        """Whether it ran and every value was finite."""
        return self.found is None and self.ran


def look(trainer: Trainer, step: int, *, scale: float, random: RandomStates | None = None, keep: bool = False) -> Look:
    """Forward and backward of `step` under the tracer, at loss scale `scale`. random: states of the generators at its
    beginning. keep: its gradients, too."""
    mode = trainer.precision
    through = getattr(mode, "through_fp32", False)
    below = half_matmul_through_fp32() if through else nullcontext()
    result = Look()
    try:
        with _again(trainer, step, random) as batches:
            # fp16 products through fp32 go beneath the tracer, which is to see the model's ops
            mode.through_fp32 = False  # type: ignore[attr-defined]
            with below, trace(trainer.model, stop=not keep, scale=scale) as tracer:
                try:
                    loss = _passes(trainer, batches, scale, plain=False)
                except TaskError:
                    raise
                except Exception as error:
                    known = tracer.raised is not None and tracer.raised in tracer.events
                    result = Look(tracer.first_nonfinite, error="" if known else one_line(error, limit=200))
                else:
                    grads = _gradients(trainer, scale) if keep else None
                    result = Look(tracer.first_nonfinite, loss, grads)
    except TaskError as error:
        result = Look(error=str(error), missed=True)
    finally:
        mode.through_fp32 = through  # type: ignore[attr-defined]
    return _agreed(trainer, result)


def look_in_fp32(trainer: Trainer, step: int, *, random: RandomStates | None = None) -> Look:
    """Loss and gradients of `step` in true fp32, the plan lifted; see `finite`."""
    try:
        with _again(trainer, step, random) as batches, suspended(trainer.model) as stand_ins:
            loss = _passes(trainer, batches, 1.0, plain=True)
            result = Look(None, loss, _gradients(trainer, 1.0, {id(old): new for new, old in stand_ins.items()}))
    except TaskError as error:
        result = Look(error=str(error), missed=True)
    except Exception as error:
        result = Look(error=one_line(error, limit=200))
    return _agreed(trainer, result)


def run_plain(trainer: Trainer, step: int, *, scale: float, random: RandomStates | None = None) -> Look:
    """As `look` with keep=True, but not traced: quick."""
    try:
        with _again(trainer, step, random) as batches:
            loss = _passes(trainer, batches, scale, plain=False)
            result = Look(None, loss, _gradients(trainer, scale))
    except TaskError as error:
        result = Look(error=str(error), missed=True)
    except Exception as error:
        result = Look(error=one_line(error, limit=200))
    return _agreed(trainer, result)


def finite(trainer: Trainer, seen: Look) -> bool:
    """Whether loss and gradients are, of all processes."""
    mine = seen.clean and all(bool(torch.isfinite(g).all()) for g in (seen.gradients or {}).values())
    return all(trainer.engine.gather_objects(mine))


def error_of(trainer: Trainer, seen: Look, true: Look) -> float:
    """|g - g32| / |g32| over all parameters and processes; inf where a gradient is not finite or was not to be had."""
    difference, size = math.inf, 0.0
    if seen.gradients is not None and true.gradients is not None and seen.ran and true.ran:
        pairs = [(seen.gradients.get(name), g) for name, g in true.gradients.items()]
        difference = math.fsum(float((g if s is None else s - g).double().square().sum()) for s, g in pairs)
        size = math.fsum(float(g.double().square().sum()) for _, g in pairs)
    parts = trainer.engine.gather_objects((difference, size))
    total, whole = sum(p[0] for p in parts), sum(p[1] for p in parts)
    if not math.isfinite(total) or not math.isfinite(whole):
        return math.inf
    return math.sqrt(total / whole) if whole > 0 else (0.0 if total == 0 else math.inf)


@contextmanager
def _again(trainer: Trainer, step: int, random: RandomStates | None) -> Iterator[list[Any]]:
    """The batches of `step`; model, gradients, buffers and generators are put back, a recorder sees nothing."""
    mode, compiled = trainer.precision, trainer.precision.compiled
    with ExitStack() as stack:
        stack.callback(setattr, mode, "compiled", compiled)
        mode.compiled = False
        stack.enter_context(preserved(trainer.model))
        stack.enter_context(eager())
        stack.enter_context(getattr(trainer.watch, "paused", nullcontext)())
        if random is not None:
            random.put_back()
        yield [copy_containers(batch) for batch in trainer.micro_batches(step)]


def _passes(trainer: Trainer, batches: list[Any], scale: float, *, plain: bool) -> float:
    """Forward and backward of all micro-batches through the bare model; the mean loss."""
    total, count = 0.0, len(batches)
    for batch in batches:
        with nullcontext() if plain else trainer.precision.forward_context():
            loss = trainer.task.checked_loss(batch, model=trainer.model)
            loss = loss / count if count > 1 else loss
        through = getattr(trainer.precision, "through_fp32", False) and not plain
        with half_matmul_through_fp32() if through else nullcontext():
            (loss * torch.tensor(scale, device=loss.device) if scale != 1.0 else loss).backward()
        total += float(loss.detach())
    return total


def _gradients(trainer: Trainer, scale: float, stand_ins: dict[int, torch.Tensor] | None = None) -> Gradients:
    found: Gradients = {}
    for name, parameter in _stored(trainer, stand_ins or {}):
        gradient = parameter.grad
        if gradient is not None:
            dense = gradient.to_dense() if gradient.layout is not torch.strided else gradient
            dense = dense.to_local() if hasattr(dense, "to_local") else dense
            found[name] = dense.detach().float() / scale
    return found


def _stored(trainer: Trainer, stand_ins: dict[int, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in unwrap(trainer.model).named_parameters():
        yield name, stand_ins.get(id(parameter), parameter)


def _agreed(trainer: Trainer, mine: Look) -> Look:
    """What all processes take it for: the first finding, the first error."""
    if trainer.engine.world == 1:
        return mine
    every = trainer.engine.gather_objects((mine.found, mine.error, mine.missed, mine.loss))
    found = next((f for f, *_ in every if f is not None), None)
    error = next((e for _, e, *_ in every if e), "")
    loss = mine.loss if all(math.isfinite(value) for *_, value in every) else math.nan
    return Look(found, loss, mine.gradients, error, any(m for _, _, m, _ in every))
