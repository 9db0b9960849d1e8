"""One batch through the model in a given precision: loss, gradients and a sample of the output, compared with fp32.

Parameters, buffers, gradients, modes and random generators are as before afterwards. Every forward pass is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..applying import apply
from ..applying.dtypes import DTYPES
from ..attribution import Attribution, unwrap
from ..batches import copy_containers
from ..errors import one_line
from ..plans import PrecisionPlan
from ..preservation import eager, preserved
from ..recording.tensors import named_tensors
from ..tasks import Task
from ..training.devices import own_device, to_device
from ..training.halfmatmul import half_matmul_through_fp32, needs_half_matmul
from .explanation import OpLog
from .states import attributes_kept
from .substitution import Memory, Substitution

SAMPLE = 512  # elements of the output that are compared by order
_RETRY = (0, -5, -10)  # binades by which a loss scale is lowered where gradients overflow, as GradScaler would


@dataclass(frozen=True)
class Outcome:
    """What one pass gave. loss: NaN for inference. gradients: parameter -> fp32 tensor, loss scale divided out.
    outputs: the floating outputs in one fp32 vector (inference), else a sample. error: what was raised, "" if nothing.
    scale_exponent: k of the loss scale 2^k that was used. discrete: the outputs are integers, such as classes.
    low_loss: the loss itself came in 16 bits."""

    loss: float = float("nan")
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: torch.Tensor | None = None
    error: str = ""
    scale_exponent: int = 0
    discrete: bool = False
    low_loss: bool = False

    @property
    def finite(self) -> bool:
        """Whether nothing was raised, and loss and gradients are finite, or at inference the output holds no NaN. An
        output may hold infinities: masks write them."""
        if self.error:
            return False
        if self.gradients or self.loss == self.loss:
            return self.loss - self.loss == 0 and self.gradients_finite
        return self.outputs is None or not bool(self.outputs.isnan().any())

    @property
    def gradients_finite(self) -> bool:
        return all(bool(g.isfinite().all()) for g in self.gradients.values())


class Prober:
    """Runs one batch of `task` in any precision. inference: outputs without gradients in evaluation mode.

    scale_exponent: of the loss scale that fp16 gradients get; None where the user trains without one.
    passes: forward passes made so far.
    """

    def __init__(self, task: Task, *, policy: str, inference: bool, scale_exponent: int | None) -> None:
        self.task, self.policy, self.inference = task, policy, inference
        self.model = unwrap(task.model)
        self.device = own_device(self.model)
        self.scale_exponent = scale_exponent
        self.passes = 0
        self._log: OpLog | None = None
        self._in_vain = 0  # times that no loss scale gave finite gradients

    def reference(self, batch: Any) -> Outcome:
        """In fp32, autocast off."""
        return self._run(batch, nullcontext(), nullcontext(), scale=0)

    @contextmanager
    def logged(self, units: Collection[str]) -> Iterator[OpLog]:
        """Passes made inside keep what the ops of `units` give."""
        with Attribution(self.model) as who:
            self._log = OpLog(who, units)
            try:
                yield self._log
            finally:
                self._log = None

    def all_low(self, batch: Any, fmt: str) -> tuple[Outcome, Memory]:
        """Every module low, and what each call received and returned (see Substitution)."""
        names = [name for name, _ in self.model.named_modules()]
        inside = Substitution(self.model, fmt, names, policy=self.policy, outside_low=True)
        outside = self._outside(fmt)
        return self._scaled(batch, lambda: inside, outside, fmt), inside.memory

    def alone(self, batch: Any, fmt: str, units: Collection[str], memory: Memory) -> Outcome:
        """`units` low, everything else fp32."""

        def inside() -> Substitution:
            return Substitution(self.model, fmt, units, policy=self.policy, memory=memory)

        return self._scaled(batch, inside, nullcontext, fmt)

    def planned(self, batch: Any, plan: PrecisionPlan) -> Outcome:
        """With `plan` applied, as training would run it."""
        layers = plan.resolve(name for name, _ in self.model.named_modules())
        half = "fp16" in {layer.compute for layer in layers.values()}
        handles: list[Any] = []

        @contextmanager
        def inside() -> Iterator[None]:
            handles.append(apply(plan, self.model))
            try:
                yield
            finally:
                handles.pop().remove()

        def outside() -> AbstractContextManager[Any]:
            return handles[-1].autocast(self.device.type)

        return self._scaled(batch, inside, outside, "fp16" if half else "bf16")

    def _outside(self, fmt: str) -> Callable[[], AbstractContextManager[Any]]:
        if self.policy == "cast":
            return nullcontext
        return lambda: torch.autocast(self.device.type, dtype=DTYPES[fmt])

    def _scaled(self, batch: Any, inside: Callable[[], Any], outside: Callable[[], Any], fmt: str) -> Outcome:
        """With the loss scale where the format is fp16; a smaller one where gradients alone overflow."""
        k = self.scale_exponent
        if fmt != "fp16" or k is None or self.inference:
            return self._run(batch, inside(), outside, scale=0, fmt=fmt)
        # where lowering it has not helped before, the lowest scale alone tells whether it does now
        for lower in _RETRY if self._in_vain < 2 else (_RETRY[0], _RETRY[-1]):
            outcome = self._run(batch, inside(), outside, scale=k + lower, fmt=fmt)
            if outcome.error or outcome.gradients_finite or outcome.loss - outcome.loss != 0:
                return outcome
        self._in_vain += 1
        return outcome

    def _run(self, batch: Any, inside: Any, outside: Any, *, scale: int, fmt: str = "fp32") -> Outcome:
        self.passes += 1
        model = self.model
        through = fmt == "fp16" and self.device.type == "cpu" and needs_half_matmul()
        captured: list[torch.Tensor] = []
        with ExitStack() as stack:
            stack.enter_context(preserved(model))
            stack.enter_context(attributes_kept(model))
            stack.enter_context(eager())
            torch.clear_autocast_cache()
            model.train(not self.inference)
            hook = model.register_forward_hook(lambda m, a, out: captured.append(_vector(out)))
            stack.callback(hook.remove)
            if through:
                stack.enter_context(half_matmul_through_fp32())
            try:
                with torch.autocast(self.device.type, enabled=False), inside, self._log or nullcontext():
                    around = outside if isinstance(outside, nullcontext) else outside()
                    return self._forward_backward(batch, around, captured, scale)
            except Exception as error:  # the user's code: what it raises in a format is an outcome
                return Outcome(error=one_line(error, limit=160), scale_exponent=scale)

    def _forward_backward(self, batch: Any, around: Any, captured: list[torch.Tensor], scale: int) -> Outcome:
        task, model = self.task, self.model
        batch = to_device(copy_containers(batch), self.device)
        if self.inference:
            with torch.no_grad(), around:
                output = task.forward(model, batch) if task.forward else _call(model, batch)
            discrete = not any(t.is_floating_point() for _, t in named_tensors(output))
            return Outcome(outputs=_vector(output, whole=True), discrete=discrete)
        with around:
            loss = task.checked_loss(batch)
        (loss * 2.0**scale).backward()
        gradients = {
            name: _dense(p.grad).float() * 2.0**-scale for name, p in model.named_parameters() if p.grad is not None
        }
        low = loss.dtype in (torch.bfloat16, torch.float16)
        return Outcome(float(loss.detach()), gradients, captured[-1] if captured else None, "", scale, low_loss=low)


def _call(model: nn.Module, batch: Any) -> Any:
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _vector(output: Any, *, whole: bool = False) -> torch.Tensor:
    """The floating tensors of an output as one fp32 vector, its integers where it has no others; unless `whole`, an
    evenly spaced sample of the first."""
    tensors = [t.detach() for _, t in named_tensors(output)]
    found = [t for t in tensors if t.is_floating_point()] or [t for t in tensors if whole and not t.is_complex()]
    if not found:
        return torch.zeros(0)
    if whole:
        return torch.cat([t.float().flatten() for t in found])
    return scattered(found[0].flatten(), SAMPLE).float()


def scattered(values: torch.Tensor, count: int) -> torch.Tensor:
    """At most `count` elements of a vector from all over it, the same ones for every vector of that length. Evenly
    spaced ones would all be of one class where the spacing is a multiple of their number."""
    n = values.numel()
    if n <= count:
        return values
    return values[torch.arange(count, device=values.device) * 2_654_435_761 % n]  # Knuth's multiplicative hash


def _dense(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient
