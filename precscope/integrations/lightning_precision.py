"""What PlanPrecision and FabricPlanPrecision do. Needs no Lightning: lightning.py and pytorch_lightning.py mix it with
the MixedPrecision of theirs, which knows when a loss is scaled and gradients are unscaled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..applying import PlanHandle, apply
from ..errors import UsageError
from ..plans import PrecisionPlan
from ..training.precision import LossScaler
from .given_plan import read_plan
from .lightning_recording import submodule
from .settling import Settling


class Planned:
    """Trains as a plan says, in place of Lightning's `precision=`.

    The plan is put on the model before optimizers are made and before DDP wraps it. Code outside the modules, mostly
    the loss, runs as the plan's default says (PlanHandle.autocast). Where the plan computes in fp16 anywhere, the loss
    is scaled, from the plan's loss_scale on; on the CPU, too.

    plan: a PrecisionPlan, or the path of one. module: name of the part of the model that the plan is for; None: all.
    scaler: a GradScaler of one's own. scaler is None where the plan needs none; handles: the PlanHandles now in force.

    Raises PlanError for a plan with phases, and, when the model is set up, where the plan does not fit.
    """

    scaler: Any

    def __init__(self, plan: PrecisionPlan | str | Path, *, module: str | None = None, scaler: Any = None) -> None:
        self.plan, self.module = read_plan(plan), module
        self._plans: list[Settling] = []
        device = "cuda" if torch.cuda.is_available() else "cpu"
        half = "fp16" in {layer.compute for layer in [self.plan.default, *self.plan.modules.values()]}
        if half and scaler is None:
            scaler = LossScaler.of(self.plan, device)
        super().__init__("16-mixed" if half else "bf16-mixed", device, scaler if half else None)  # type: ignore[call-arg]

    @property
    def handles(self) -> list[PlanHandle]:
        return [plan.handle for plan in self._plans]

    def put_on(self, model: nn.Module) -> None:
        """Apply the plan to `model`, or to the part of it that the plan is for."""
        self._plans.append(Settling(apply(self.plan, model if self.module is None else submodule(model, self.module))))

    def remove(self) -> None:
        """Take the plan off: models that were not trained are exactly as they were, trained ones have the values that
        the plan stored, cast up. Again: nothing."""
        while self._plans:
            self._plans.pop().remove()

    @contextmanager
    def outside(self) -> Iterator[None]:
        """For code outside the modules: under autocast where the plan's default is a low format."""
        if not self._plans:
            yield
            return
        handle = self._plans[0].handle
        parameter = next(handle.model.parameters(), None)
        with handle.autocast("cpu" if parameter is None else parameter.device.type):
            yield

    def convert_input(self, data: Any) -> Any:
        """Inputs as they are: each module casts its own."""
        return data


class TrainerPlanned(Planned):
    """Planned, for Trainer(plugins=[...]): from the beginning of fit, validate, test or predict to its end.

    Where the plan stores parameters in a lower format, fit starts from their rounded values and ends with such; after
    validate, test and predict the parameters are exactly what they were."""

    def __init__(self, plan: PrecisionPlan | str | Path, *, module: str | None = None, scaler: Any = None) -> None:
        super().__init__(plan, module=module, scaler=scaler)
        self._uncached = False

    def convert_module(self, module: Any) -> Any:
        if getattr(module, "_trainer", None) is None:
            raise UsageError("PlanPrecision is for Trainer(plugins=[...]); for Fabric there is FabricPlanPrecision")
        self.remove()
        self.put_on(module)
        if module._trainer.state.fn == "fit":
            self._plans[-1].begin()
        # within a training_step that steps optimizers itself, casts of weights that autocast keeps would be outdated
        self._uncached = not module.automatic_optimization
        return module

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        before = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(before and not self._uncached)
        try:
            with self.outside():
                yield
        finally:
            torch.set_autocast_cache_enabled(before)

    def teardown(self) -> None:
        self.remove()


class FabricPlanned(Planned):
    """Planned, for Fabric(plugins=[...]): from fabric.setup() until `remove()`.

    Each model that is set up gets the plan. Models give fp32, as under Fabric's own mixed precision, and the loss
    outside is computed in it. ps.record is given `scaler=precision.scaler`.

    Where the plan stores parameters in a lower format, a model is trained from their rounded values on, and has such
    after `remove()`. A model that no optimizer of fabric.setup() has stepped gets back exactly what it had."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        self.put_on(module)
        return module

    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        for plan in self._plans:
            plan.before_step(optimizer)
        return super().optimizer_step(optimizer, **kwargs)  # type: ignore[misc]

    def forward_context(self) -> Any:
        return self.outside() if self._plans else nullcontext()
