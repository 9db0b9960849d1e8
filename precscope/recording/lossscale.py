"""By what the gradients of the running step are multiplied: read without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..errors import UsageError


def checked(scaler: Any) -> Any:
    """`scaler` itself. Raises UsageError where its scale cannot be read."""
    if scaler is None or isinstance(scaler, int | float) or callable(getattr(scaler, "get_scale", None)):
        return scaler
    raise UsageError(
        f"scaler must be a torch.amp.GradScaler or a number, not {type(scaler).__name__}: gradients of a step have one "
        "loss scale; where two models have a scaler each, record each model by itself"
    )


def loss_scale(scaler: Any) -> float | torch.Tensor | None:
    """The scale of the running step, as a device tensor (a copy) where there is one; None where there is none.

    scaler: a GradScaler, a number, or None.
    """
    if scaler is None or isinstance(scaler, int | float):
        return scaler
    if not getattr(scaler, "is_enabled", lambda: True)():
        return None
    get_async = getattr(scaler, "_get_scale_async", None)
    scale = get_async() if get_async is not None else None
    return scale.clone() if isinstance(scale, torch.Tensor) else float(scaler.get_scale())


def scale_of_gradient(
    scaler: Any, optimizers: Iterable[torch.optim.Optimizer], parameter: torch.Tensor
) -> float | torch.Tensor:
    """By what its .grad is multiplied now: 1 once the scaler has unscaled the optimizer that holds it."""
    scale = loss_scale(scaler)
    if scale is None or isinstance(scaler, int | float):
        return 1.0 if scale is None else scale
    states = getattr(scaler, "_per_optimizer_states", {})
    for optimizer in optimizers:
        if any(parameter is p for group in optimizer.param_groups for p in group["params"]):
            stage = states[id(optimizer)]["stage"] if id(optimizer) in states else None
            return 1.0 if stage is not None and stage.name != "READY" else scale
    return scale
