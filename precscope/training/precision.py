"""How precision enters training: one object, harmless no-ops by default, so that the loop has no `if fp16`.

    Precision            what every precision shares: plain fp32 arithmetic, a step that is refused when not finite
    |-- FullPrecision    fp32, with TF32 matrix products switched off; or on: "tf32"
    |-- Autocast         torch.autocast of one dtype; with fp16 a loss scale
    `-- Planned          a PrecisionPlan applied to the model; with fp16 anywhere in it a loss scale

The order within a step is that of the loop: forward_context, backward, unscale, (clip,) step. Gradients are unscaled
before anything looks at them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import UsageError
from ..formats import get_format
from .halfmatmul import compiling_half_matmul, half_matmul_through_fp32, matmul_rates, needs_half_matmul

if TYPE_CHECKING:
    from ..plans import PrecisionPlan

WORDS = ("fp32", "tf32", "bf16", "fp16")
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class LossScaler(torch.amp.GradScaler):
    """A GradScaler whose scale and verdict can be read without waiting for the device.

    Gradients stored in fp16 are unscaled too, in fp16: where parameters are kept in fp16 on purpose, by a plan or by
    model.half(), that is what training them is like.
    """

    @classmethod
    def of(cls, plan: PrecisionPlan, device: str, *, initial: float | None = None) -> LossScaler:
        """As a plan's loss_scale has it: initial (without one 65536) and growth_interval (2000).

        device: its type. initial: a scale to start with in place of the plan's. The plan's floor is where gradients
        begin to be lost: a run that overflows above it goes below rather than stop.
        """
        scale = plan.loss_scale
        start = float(scale.get("initial", 65536.0) if initial is None else initial)
        return cls(device, init_scale=start, growth_interval=scale.get("growth_interval", 2000))

    def current_scale(self) -> torch.Tensor:
        """A copy of the loss scale: float32 scalar on the device."""
        scale = self._get_scale_async()
        assert scale is not None, "the scale exists from the first backward on"
        return scale.detach().clone()

    def found_nonfinite(self, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        """Whether `unscale_` met an inf or NaN in this step's gradients: bool scalar on the device."""
        found = self._found_inf_per_device(optimizer).values()
        return torch.stack([f.to(self._device) for f in found]).sum() > 0

    def _unscale_grads_(self, optimizer: Any, inv_scale: Any, found_inf: Any, allow_fp16: bool) -> Any:
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)

    def prepare(self, device: torch.device) -> None:
        """Create the scale on `device` now instead of at the first backward."""
        self._device = device.type
        if self._scale is None:
            self._lazy_init_scale_growth_tracker(device)


class Precision:
    """fp32 arithmetic as the process has it. Subclasses change what they need to.

    word: short name for tables. scaler: the loss scaler, None where no loss scale is needed. device: where it trains.
    compiled: whether the model is under torch.compile.
    """

    word = "fp32"
    scaler: LossScaler | None = None
    resting: LossScaler | None = None  # of an earlier phase, for a later one
    plan: PrecisionPlan | None = None
    initial_scale: float | None = None  # as asked for, None: the plan's or the usual one
    compiled = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """In force for the whole run: the plan's hooks, switches of the backends. Left as found, after errors too."""
        yield

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Around the forward pass and the loss."""
        yield

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of the loss, times the loss scale where there is one."""
        loss.backward()

    def scale(self) -> torch.Tensor | None:
        """The loss scale of the running step (a copy), None where there is none."""
        return None

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the loss scale."""

    def step(self, optimizer: torch.optim.Optimizer, finite: torch.Tensor) -> torch.Tensor:
        """Step the optimizer if the gradients are `finite` (bool scalar), else leave weights and state alone.

        On the CPU the verdict is read. Elsewhere it goes to the optimizer as a tensor where it takes one (fused
        optimizers do, the same way GradScaler tells them), so that the host need not wait. Returns whether the step
        was skipped: bool scalar.
        """
        skipped = ~finite
        if self.device.type != "cpu" and getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.grad_scale, optimizer.found_inf = None, skipped.float()  # type: ignore[attr-defined]
            try:
                optimizer.step()
            finally:
                del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        elif bool(finite):
            optimizer.step()
        return skipped

    def take_over(self, before: Precision) -> None:
        """Go on where `before` ends, in the middle of a run: with its loss scaler, at once or when one is needed."""
        last = before.scaler or before.resting
        if last is not None and self.scaler is not None:
            last.set_growth_interval(self.scaler.get_growth_interval())
            self.scaler = last
        else:
            self.resting = last

    def settle(self) -> None:
        """Within `applied`, in training: parameters are from now on what is stored (see PlanHandle.settle)."""

    def unrounded(self) -> dict[str, torch.Tensor]:
        """Within `applied`: values to come back when the plan is taken off, for a checkpoint."""
        return {}

    def load_unrounded(self, values: dict[str, torch.Tensor]) -> None:
        """Inverse of unrounded."""

    def describe(self) -> dict[str, Any]:
        """What runs, for run.json: word, loss scaling, and notes in words."""
        return {"word": self.word, "loss_scale": self._describe_scaler(), "notes": []}

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        states = {"scaler": self.scaler, "resting": self.resting}
        return {name: scaler.state_dict() for name, scaler in states.items() if scaler is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict. A loss scale that is not needed now rests for a later phase."""
        saved = state.get("scaler") or state.get("resting")
        if not saved:
            return
        scaler = self.scaler or LossScaler(self.device.type)
        scaler.load_state_dict(saved)
        scaler.prepare(self.device)
        if scaler is not self.scaler:
            self.resting = scaler

    def _describe_scaler(self) -> dict[str, Any] | None:
        if self.scaler is None:
            return None
        return {"initial": self.scaler.get_scale(), "growth_interval": self.scaler.get_growth_interval()}


class FullPrecision(Precision):
    """fp32 with IEEE matrix products ("fp32"), or with TF32 ones ("tf32", on NVIDIA GPUs since Ampere)."""

    def __init__(self, device: torch.device, *, tf32: bool = False) -> None:
        super().__init__(device)
        self.word = "tf32" if tf32 else "fp32"
        if tf32 and not (device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8):
            raise UsageError(
                f"precision 'tf32' needs an NVIDIA GPU of compute capability 8.0 or later, and this run is on "
                f"{device.type}: use 'fp32' or 'bf16'"
            )

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Set the TF32 switches of cuBLAS and cuDNN (cuDNN's are on by default), and put them back."""
        if self.device.type != "cuda":
            yield
            return
        cudnn: Any = torch.backends.cudnn
        switches: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
        before = [switch.fp32_precision for switch in switches]
        try:
            for switch in switches:
                switch.fp32_precision = "tf32" if self.word == "tf32" else "ieee"
            yield
        finally:
            for switch, value in zip(switches, before, strict=True):
                switch.fp32_precision = value


class _Scaled(Precision):
    """A precision that may have fp16 gradients: a loss scale, and fp16 matrix products through fp32 where needed."""

    def __init__(self, device: torch.device, *, scaler: LossScaler | None) -> None:
        super().__init__(device)
        self.through_fp32 = scaler is not None and device.type == "cpu" and needs_half_matmul()
        self.scaler = scaler
        if scaler is not None:
            scaler.prepare(device)

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        with self._half_matmul(), self._autocast():
            yield

    def _half_matmul(self) -> AbstractContextManager[Any]:
        if not self.through_fp32:
            return nullcontext()
        return compiling_half_matmul() if self.compiled else half_matmul_through_fp32()

    def _autocast(self) -> AbstractContextManager[Any]:
        """Autocast for the forward pass, as far as no plan on the model decides."""
        raise NotImplementedError

    def backward(self, loss: torch.Tensor) -> None:
        with self._half_matmul():
            (self.scaler.scale(loss) if self.scaler else loss).backward()

    def scale(self) -> torch.Tensor | None:
        return self.scaler.current_scale() if self.scaler else None

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        if self.scaler:
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, finite: torch.Tensor) -> torch.Tensor:
        if self.scaler is None:
            return super().step(optimizer, finite)
        # of all reasons to leave a step out, only what unscaling found is the scale's: `update` knows no other
        skipped = self.scaler.found_nonfinite(optimizer) | ~finite
        super().step(optimizer, ~skipped)
        self.scaler.update()
        return skipped

    def describe(self) -> dict[str, Any]:
        notes = []
        if self.through_fp32:
            half, single = matmul_rates()
            notes.append(
                "fp16 matrix products computed through fp32 on this CPU "
                f"(native rate {half:.1f} GFLOP/s against {single:.0f})"
            )
        return {**super().describe(), "notes": notes}


class Autocast(_Scaled):
    """torch.autocast of fp16 or bf16: parameters stay fp32, PyTorch's lists decide what runs low."""

    def __init__(
        self, device: torch.device, dtype: str, *, initial_scale: float | None = None, growth_interval: int = 2000
    ) -> None:
        self.word, self.dtype = dtype, _DTYPES[dtype]
        scale = 65536.0 if initial_scale is None else float(initial_scale)
        half = dtype == "fp16"
        made = LossScaler(device.type, init_scale=scale, growth_interval=growth_interval) if half else None
        super().__init__(device, scaler=made)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=self.dtype)


class Planned(_Scaled):
    """A PrecisionPlan: applied to the model for the run, with a loss scale where the plan holds fp16.

    Code of the task outside the model's modules, mostly the loss, runs as the plan's default says: under autocast where
    that is a low format, so that losses are computed in fp32 as PyTorch's lists have it. To be used within `applied`.
    """

    word = "plan"

    def __init__(
        self, device: torch.device, plan: PrecisionPlan, model: nn.Module, *, initial_scale: float | None = None
    ) -> None:
        from ..attribution import unwrap

        self.plan, self.initial_scale = plan, initial_scale
        layers = plan.resolve(name for name, _ in unwrap(model).named_modules())
        half = "fp16" in {layer.compute for layer in layers.values()}
        super().__init__(device, scaler=LossScaler.of(plan, device.type, initial=initial_scale) if half else None)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Apply the plan, remove it on leaving."""
        from ..applying import apply

        assert self.plan is not None
        self.handle = apply(self.plan, model)
        try:
            yield
        finally:
            self.handle.remove()

    def settle(self) -> None:
        self.handle.settle()

    def unrounded(self) -> dict[str, torch.Tensor]:
        return self.handle.unrounded()

    def load_unrounded(self, values: dict[str, torch.Tensor]) -> None:
        self.handle.load_unrounded(values)

    def _autocast(self) -> AbstractContextManager[Any]:
        return self.handle.autocast(self.device.type)

    def describe(self) -> dict[str, Any]:
        described = super().describe()
        small = [r for r in self.handle.runs if r.precision.compute in ("e4m3", "e5m2")]
        eight = dict.fromkeys(f"8-bit products {r.how}: {r.note}" for r in small)
        return {**described, "notes": [*described["notes"], *eight, *self.handle.notes]}


def make_precision(
    word: str | None,
    *,
    plan: PrecisionPlan | None,
    model: nn.Module,
    device: torch.device,
    initial_scale: float | None = None,
    growth_interval: int = 2000,
) -> Precision:
    """The Precision for `word` ("fp32", "tf32", "bf16", "fp16") or for `plan`; fp32 where neither is given.

    Of a plan with phases the modules' own entries are meant; plan.at_step gives those of a step. Raises UsageError on
    another word, and on both. Whether a plan fits the model shows when it is applied.
    """
    if plan is not None and word not in (None, "plan"):
        raise UsageError(f"give a plan or precision={word!r}, not both: a plan says the precision of each module")
    if plan is not None:
        return Planned(device, plan, model, initial_scale=initial_scale)
    word = _normal(word or "fp32")
    if word in ("fp32", "tf32"):
        return FullPrecision(device, tf32=word == "tf32")
    return Autocast(device, word, initial_scale=initial_scale, growth_interval=growth_interval)


def _normal(word: str) -> str:
    name = get_format(word).name
    if name not in WORDS:
        raise UsageError(
            f"precision {word!r} is not one to train a whole model in; allowed: {', '.join(WORDS)}, or a plan "
            "(plan=, --plan), which may name 8-bit formats per module"
        )
    return name
