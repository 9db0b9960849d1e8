"""Leaving things as they were found: buffers, gradients, training mode, RNG state and torch.compile's stance."""

from __future__ import annotations

import contextlib
import sys
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
    config = getattr(sys.modules.get("torch._functorch"), "config", None)
    if not hasattr(config, "backward_pass_autocast"):
        yield
        return
    with config.patch(backward_pass_autocast="off"):
        yield
