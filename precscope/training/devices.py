"""Where a run takes place, and moving batches there."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import UsageError, first_line


def pick_device(model: nn.Module, device: str | torch.device | None) -> torch.device:
    """`device`; where None the model's own device, or the first GPU where the model lies on the CPU and there is one.

    Raises UsageError where the device is unknown or not there.
    """
    own = own_device(model)
    if device is None:
        return torch.device("cuda") if own.type == "cpu" and torch.cuda.is_available() else own
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"cannot use device {str(device)!r} ({first_line(error):.100}): this machine offers {_devices()}"
        ) from error
    return place


def to_device(batch: Any, where: nn.Module | torch.device) -> Any:
    """`batch` with its tensors on a device, or on that of a model's first parameter.

    Moves tensors, anything that has .to(), and these within dicts, lists, tuples and namedtuples.
    """
    if isinstance(where, nn.Module):
        where = own_device(where)
    if hasattr(batch, "to"):
        return batch.to(where, non_blocking=True) if isinstance(batch, torch.Tensor) else batch.to(where)
    if isinstance(batch, dict):
        return type(batch)((key, to_device(value, where)) for key, value in batch.items())
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, where) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, where) for value in batch)
    return batch


def own_device(model: nn.Module) -> torch.device:
    """The device of the model's first parameter; the CPU where it has none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _devices() -> str:
    return "cpu and cuda" if torch.cuda.is_available() else "cpu"
