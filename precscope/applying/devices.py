"""The device a module runs on, and CUDA's switches for TF32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def device_type(module: nn.Module, args: tuple, kwargs: dict) -> str:
    """Device of the first tensor argument that is not on the CPU, else of the first parameter, else "cpu"."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.device.type not in ("cpu", "meta"):
            return value.device.type
    for parameter in module.parameters():
        return "cpu" if parameter.device.type == "meta" else parameter.device.type
    return "cpu"


@contextmanager
def tf32_switches(on: bool) -> Iterator[None]:
    """The process-wide CUDA switches for TF32 matrix products, convolutions and recurrences, for a while."""
    cudnn: Any = torch.backends.cudnn
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
    before = [s.fp32_precision for s in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "tf32" if on else "ieee"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value
