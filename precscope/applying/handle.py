"""Putting a plan on a model, and taking it off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from .. import attribution
from ..errors import ModelError, PlanError
from ..plans import PrecisionPlan
from ..preservation import backward_outside_autocast
from .dtypes import dtype_of
from .forward import install
from .layout import Layout, RegionRun
from .spec import MARK, Now
from .storage import convert, load_unrounded, restore, settle, storage_changes, unrounded


class PlanHandle:
    """A plan on a model. Ends with `remove()` or with its `with` block. runs: a RegionRun for each region."""

    def __init__(self, plan: PrecisionPlan, model: nn.Module, runs: list[RegionRun], notes: list[str]) -> None:
        self.plan, self.model, self.runs, self.notes = plan, model, tuple(runs), tuple(notes)

    def remove(self) -> None:
        """Restore the model exactly; parameters that training changed in low storage are cast up. Again: nothing."""
        remove(self.model)

    def settle(self) -> None:
        """From now on the stored values of trainable parameters are the model: their unrounded originals are let go,
        and `remove` casts up what is there. For training, whose outcome must not depend on values it never saw."""
        settle(self.model)

    def unrounded(self) -> dict[str, torch.Tensor]:
        """Name -> values as before the plan, of the parameters and buffers that are stored lower and not settled."""
        return unrounded(self.model)

    def load_unrounded(self, values: dict[str, torch.Tensor]) -> None:
        """Put such values back, as far as they are kept here, too."""
        load_unrounded(self.model, values)

    def autocast(self, device_type: str = "cpu") -> AbstractContextManager[Any]:
        """For code outside the model, mostly the loss: torch.autocast where the plan's default computes in 16 bits or
        less, so that losses see the same as under plain autocast; else a context that does nothing.

        Where a compiled model is called inside, the backward pass of its fp32 modules is fp32 as in eager mode, which
        it is not under torch.autocast itself (see backward_outside_autocast). Call backward() after the block."""
        dtype = dtype_of(self.plan.default)
        if dtype is torch.float32:
            return nullcontext()
        autocast = torch.autocast(device_type, dtype=dtype)
        return autocast if torch.compiler.is_compiling() else _with_fp32_islands(autocast)

    def describe(self) -> str:
        """What runs natively and what is emulated, a line per region; then where storage differs from the plan."""
        width = max(len(r.module or "(root)") for r in self.runs)
        lines = [f"{r.module or '(root)':<{width}}  {r}" for r in self.runs]
        return "\n".join([*lines, *self.notes])

    def __enter__(self) -> PlanHandle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


@contextmanager
def _with_fp32_islands(autocast: torch.autocast) -> Iterator[None]:
    with backward_outside_autocast(), autocast:
        yield


def apply(plan: PrecisionPlan, model: nn.Module) -> PlanHandle:
    """Make `model` run as `plan` says until the handle is removed.

    Build the optimizer afterwards where the plan stores parameters below fp32: its state takes their dtype. A model
    under torch.compile or DDP may be given as it is. Raises PlanError where the plan does not fit the model, where a
    shared module would need two precisions, or where a plan is applied already; ModelError for what is no model.
    """
    if not isinstance(plan, PrecisionPlan):
        raise PlanError(f"apply takes a PrecisionPlan, not {type(plan).__name__}; PrecisionPlan.load(path) reads one")
    root = unwrap(model)
    layout = Layout(plan, root)
    storage = storage_changes(layout)
    if storage and isinstance(model, nn.parallel.DistributedDataParallel):
        raise PlanError(
            "the plan changes how parameters are stored, and DDP has laid out its buckets already: "
            "apply the plan first, then wrap the model in DDP"
        )
    now = Now()
    try:
        for module in layout.names:
            module.__dict__[MARK] = layout.spec(module, now)
        for owners, dtype in storage:
            convert(owners, dtype)
        layout.find_unlike()
        for module in layout.names:
            module.__dict__[MARK].swap = layout.swap(module)
            if module in layout.planned:
                install(module)
    except BaseException:
        remove(root)
        raise
    return PlanHandle(plan, root, layout.runs(), layout.notes)


def remove(model: nn.Module) -> None:
    """Take the plan off `model`, which may be a deepcopy of a planned model; where there is none, nothing happens."""
    for module in unwrap(model).modules():
        spec = module.__dict__.pop(MARK, None)
        if spec is None:
            continue
        if hasattr(module.__dict__.get("forward"), MARK):
            del module.__dict__["forward"]
            if spec.previous is not None:
                module.__dict__["forward"] = spec.previous
        for (table, name), original in spec.stored.items():
            restore(getattr(module, table).get(name), original, spec.stored_in[table, name])


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside torch.compile and DDP. Raises ModelError for what is no module, or DataParallel."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"a plan is applied to a torch.nn.Module, not to {type(model).__name__}")
    if isinstance(model, nn.DataParallel):
        raise ModelError("nn.DataParallel copies its modules at every step and would lose the plan; use DDP instead")
    return attribution.unwrap(model)
