"""The model as it is in full precision, for a while: what a shadow step and a reference run on.

    with suspended(model):
        loss(model, batch).backward()

Inside, a plan on the model does nothing, parameters and floating buffers that are stored in 16 or 8 bits are seen as
fp32 stand-ins (exact casts, leaves of the graph: gradients arrive there unrounded), and low floating inputs of any
module are cast up. fp32 and fp64 tensors are the model's own. Autocast is off, also where code inside turns it on
itself, and TF32 (on CPUs bf16) is off inside fp32 matrix products, convolutions and recurrent layers.

What stays low is what the user's code casts itself between modules (`x.half()`), until the next module takes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .handle import unwrap
from .inputs import cast_input, map_tensors
from .spec import MARK
from .swaps import refresh_flat_weights

_WIDE = (torch.float32, torch.float64)
_LOW = (torch.bfloat16, torch.float16)
_SWITCHES = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")


@contextmanager
def suspended(model: nn.Module) -> Iterator[dict[Tensor, Tensor]]:
    """Make `model` (also under torch.compile or DDP) run in true fp32 inside; everything is put back on leaving, after
    exceptions too.

    Yields stand-in -> stored tensor, for those parameters that have a stand-in: gradients are in `stand_in.grad`. What
    is written to a stand-in (a running statistic) is dropped: use with `preserved`, which drops the others' too.
    Two threads must not run the model at once; autocast is off for all threads that enter it meanwhile. Raises
    ModelError for a model that FSDP2 shards with parameters stored low.
    """
    root = unwrap(model)
    with ExitStack() as stack:
        stack.enter_context(no_autocast())
        stack.enter_context(ieee_fp32())
        stack.enter_context(_plan_lifted(root))
        stand_ins = stack.enter_context(_stored_wide(root))
        stack.enter_context(_inputs_cast_up(root))
        yield stand_ins


@contextmanager
def no_autocast() -> Iterator[None]:
    """Autocast off, and `with torch.autocast(...)` inside without effect: a loss function may bring its own.

    For the duration the class's `__enter__` is wrapped: that is the one place where all spellings (torch.cuda.amp,
    decorators, Hugging Face, Lightning) meet, and a context that was made before is caught as well.
    """
    own = torch.autocast.__enter__

    def enter(self: Any) -> Any:
        wanted, self._enabled = self._enabled, False
        try:
            return own(self)
        finally:
            self._enabled = wanted

    kinds = [kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.is_autocast_enabled(kind)]
    cached = torch.is_autocast_cache_enabled()
    torch.autocast.__enter__ = enter  # type: ignore[method-assign]
    for kind in kinds:
        torch.set_autocast_enabled(kind, False)
    try:
        yield
    finally:
        torch.autocast.__enter__ = own  # type: ignore[method-assign]
        for kind in kinds:
            torch.set_autocast_enabled(kind, True)
        torch.set_autocast_cache_enabled(cached)


@contextmanager
def ieee_fp32() -> Iterator[None]:
    """fp32 products in fp32: the backends' fp32_precision switches at "ieee"."""
    switches = [_switch(path) for path in _SWITCHES]
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


def _switch(path: str) -> Any:
    place: Any = torch.backends
    for name in path.split("."):
        place = getattr(place, name)
    return place


@contextmanager
def _plan_lifted(root: nn.Module) -> Iterator[None]:
    """Take planned forwards off, put them back."""
    lifted: list[tuple[nn.Module, Any]] = []
    try:
        for module in root.modules():
            spec = module.__dict__.get(MARK)
            if spec is not None and hasattr(module.__dict__.get("forward"), MARK):
                lifted.append((module, module.__dict__.pop("forward")))
                if spec.previous is not None:
                    module.__dict__["forward"] = spec.previous
        yield
    finally:
        for module, planned in lifted:
            module.__dict__["forward"] = planned


@contextmanager
def _stored_wide(root: nn.Module) -> Iterator[dict[Tensor, Tensor]]:
    """fp32 stand-ins in place of parameters and buffers that are stored low; one for all owners of a tied one."""
    if any(hasattr(type(m), "reshard") for m in root.modules()) and any(p.dtype in _LOW for p in root.parameters()):
        raise ModelError(
            "this model is sharded by FSDP2 and stores parameters in 16 bits, which it gathers as they are: it cannot "
            "be run in fp32 (no shadow steps, no comparison of a guard with fp32); use strategy='ddp' for those"
        )
    stand_ins: dict[Tensor, Tensor] = {}  # stored -> stand-in
    swapped: list[tuple[dict[str, Any], str, Tensor]] = []
    recurrent = [module for module in root.modules() if isinstance(module, nn.RNNBase)]
    try:
        for module in root.modules():
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for table in tables:
                for name, tensor in list(table.items()):
                    if not _is_low(tensor):
                        continue
                    swapped.append((table, name, tensor))
                    if tensor not in stand_ins:
                        stand_ins[tensor] = _stand_in(tensor)
                    table[name] = stand_ins[tensor]
        if swapped:
            for module in recurrent:
                refresh_flat_weights(module)
        yield {new: old for old, new in stand_ins.items() if isinstance(old, nn.Parameter)}
    finally:
        for changed, name, tensor in swapped:
            changed[name] = tensor
        if swapped:
            for module in recurrent:
                refresh_flat_weights(module)


def _is_low(tensor: Tensor | None) -> bool:
    """A plain floating tensor narrower than fp32. Shards (DTensor) are left to the engine that manages them."""
    if tensor is None or not tensor.is_floating_point() or tensor.dtype in _WIDE or nn.parameter.is_lazy(tensor):
        return False
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta"


def _stand_in(tensor: Tensor) -> Tensor:
    wide = tensor.detach().float()
    return nn.Parameter(wide, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else wide


@contextmanager
def _inputs_cast_up(root: nn.Module) -> Iterator[None]:
    """Pre-hooks that cast low floating inputs to fp32, ahead of the hooks that others have there."""

    def cast(tensor: Tensor) -> Tensor:
        return cast_input(tensor, kind="fp32", dtype=torch.float32)

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return map_tensors(args, cast), map_tensors(kwargs, cast)

    hooked = [m for m in root.modules() if not isinstance(m, torch.jit.ScriptModule)]
    handles = [m.register_forward_pre_hook(before, with_kwargs=True, prepend=True) for m in hooked]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
