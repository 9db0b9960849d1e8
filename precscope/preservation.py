"""Leaving things as they were found: buffers, gradients, training mode and RNG state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore buffers, `.grad` of parameters, train/eval modes and the RNG of CPU and of the model's devices on exit.

    Parameters themselves are not copied: what runs inside must not change them.
    """
    import torch

    buffers = {b: b.detach().clone() for b in model.buffers()}
    gradients = {p: p.grad for p in model.parameters()}
    modes = {m: m.training for m in model.modules()}
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        for parameter in gradients:
            parameter.grad = None
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, old in buffers.items():
                    if buffer.shape != old.shape:
                        buffer.resize_(old.shape)
                    buffer.copy_(old)
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
            for module, training in modes.items():
                module.training = training
