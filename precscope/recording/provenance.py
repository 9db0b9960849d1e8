"""What ran, where and when: for run.json and reports."""

from __future__ import annotations

import os
import platform
import time
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..store import this_command


def provenance(model: nn.Module) -> dict[str, Any]:
    """What ran: versions, device, host threads, command line."""
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "precscope": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device.type,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "command": this_command(),
        "pid": os.getpid(),
        "started": now(),
    }


def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def now() -> str:
    """Local time with its offset, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
