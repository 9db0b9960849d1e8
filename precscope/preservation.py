"""Leaving things as they were found: buffers, gradients, training mode, RNG state and torch.compile's stance."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .batches import preserved_rng

if TYPE_CHECKING:
    from torch import nn


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore buffers, `.grad` of parameters, train/eval modes and the generators of torch (CPU and CUDA), numpy and
    random on exit. Buffers get their values back, and where one was re-assigned, the tensor that was there.

    Parameters themselves are not copied: what runs inside must not change them.
    """

    gradients = {p: p.grad for p in model.parameters()}
    modes = {m: m.training for m in model.modules()}
    with preserved_rng(cuda=True), preserved_buffers(model):
        for parameter in gradients:
            parameter.grad = None
        try:
            yield
        finally:
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
            for module, training in modes.items():
                module.training = training


@contextlib.contextmanager
def preserved_buffers(model: nn.Module) -> Iterator[None]:
    """Restore the buffers on exit: their values, and where one was re-assigned, the tensor that was there."""
    import torch

    scripted = torch.jit.ScriptModule  # keeps its buffers elsewhere, and cannot re-assign them
    owned = {m: dict(m._buffers) for m in model.modules() if not isinstance(m, scripted)}
    values = {b: b.detach().clone() for b in model.buffers()}
    try:
        yield
    finally:
        for module, buffers in owned.items():
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, old in values.items():
                if buffer.shape != old.shape:
                    buffer.resize_(old.shape)
                buffer.copy_(old)


class ForcedEager:
    """Compiled code runs no hooks: while anybody holds this, what torch.compile made runs eagerly.

    Holders are counted over the process; the stance from before the first is put back after the last.
    """

    _holders = 0
    _stance: Any = None

    def __init__(self) -> None:
        self._held = False

    def hold(self) -> None:
        """Run compiled code eagerly from now on. Does nothing where nothing was compiled (torch._dynamo takes seconds
        to import)."""
        if self._held or "torch._dynamo" not in sys.modules:
            return
        import torch

        self._held = True
        if ForcedEager._holders == 0:
            ForcedEager._stance = torch.compiler.set_stance("force_eager")
        ForcedEager._holders += 1

    def release(self) -> None:
        """Hold it no more."""
        if not self._held:
            return
        self._held = False
        ForcedEager._holders -= 1
        if ForcedEager._holders == 0:
            ForcedEager._stance.__exit__(None, None, None)
            ForcedEager._stance = None


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Inside, what torch.compile made runs eagerly."""
    forced = ForcedEager()
    forced.hold()
    try:
        yield
    finally:
        forced.release()


@contextlib.contextmanager
def backward_outside_autocast() -> Iterator[None]:
    """For models that torch.compile compiles inside: their backward pass is compiled as it runs in eager mode where
    backward() is called after the `with torch.autocast` block, as PyTorch's manual has it.

    By default the compiler takes the autocast around the forward pass to be around the backward pass, too. It then
    lowers the products in the backward pass of modules that left autocast for fp32.
    """
    config = _functorch_config()
    if config is None:
        yield
        return
    with config.patch(backward_pass_autocast="off"):
        yield


def warn_of_lowered_backward() -> None:
    """Called while torch.compile traces a module that leaves autocast: where what is compiled is under autocast as a
    whole, and the compiler takes that to be around the backward pass (see above), say so."""
    from torch._guards import TracingContext

    config, tracing = _functorch_config(), TracingContext.try_get()
    if config is None or tracing is None or config.backward_pass_autocast != "same_as_forward":
        return
    around = tracing.global_context.global_state  # name -> (how to set it, what it was when tracing began)
    if any(around.get(name, (None, False))[1] for name in ("autocast_enabled", "autocast_cpu_enabled")):
        warnings.warn(
            "a module with a plan is compiled within torch.autocast: the backward pass of what leaves autocast in it "
            "(fp32, or policy 'cast') will run under autocast, which it does not in eager mode; use `with "
            "handle.autocast():` of the handle that ps.apply returns in place of torch.autocast, or set "
            "torch._functorch.config.backward_pass_autocast = 'off'",
            RuntimeWarning,
            stacklevel=2,
        )


# Run while tracing, not traced. What torch.compiler.assume_constant_result does, which takes seconds to import.
warn_of_lowered_backward._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _functorch_config() -> Any:
    """The compiler's settings, None where PyTorch is too old to have this one, or has not loaded its compiler."""
    config = getattr(sys.modules.get("torch._functorch"), "config", None)
    return config if hasattr(config, "backward_pass_autocast") else None
