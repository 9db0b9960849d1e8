"""Why a run is not finite, as far as a look at its batch, parameters and buffers tells."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .log import Row


def nonfinite_message(row: Row, count: int, model: nn.Module, batch: Any, precision: str) -> str:
    """One line: at which steps training was not finite, what it comes from, and what to do next."""
    steps = f"step {row.step}" if count == 1 else f"{count} consecutive steps ({row.step - count + 1} to {row.step})"
    what = "the loss" if row.loss != row.loss or abs(row.loss) == float("inf") else "the gradient"
    cause = _in_batch(batch) or _in_model(model)
    if cause is None:
        cause = "batch, parameters and buffers are finite, so the numbers leave the range within the step"
        advice = "lower the learning rate" if precision == "fp32" else "try precision='fp32', and if that holds"
        advice += ", or see which module it is: precscope profile"
    elif cause.startswith("the batch"):
        advice = "look at the data"
    else:
        advice = "restore an earlier checkpoint or start anew; what made it so was before this step"
    return (
        f"{what} was not finite at {steps} in {precision}: {cause}; {advice}. Weights were not updated at these steps."
    )


def _in_batch(batch: Any) -> str | None:
    for name, tensor in tensors(batch):
        share = _nonfinite_share(tensor)
        if share:
            return f"the batch itself holds NaN or inf ({share:.0%} of tensor {name or 'it consists of'})"
    return None


def _in_model(model: nn.Module) -> str | None:
    for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in named:
            share = _nonfinite_share(tensor)
            # a mask or a bound may hold inf on purpose, and a parameter may not
            if share and (kind == "parameter" or torch.isnan(tensor).any()):
                return f"{kind} {name} holds NaN or inf ({share:.0%})"
    return None


def _nonfinite_share(tensor: torch.Tensor) -> float:
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.device.type == "meta":
        return 0.0
    return float((~torch.isfinite(tensor.detach())).double().mean())


def tensors(batch: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors within nested dicts, lists, tuples and dataclasses, with where they are: "0", "labels", "0.mask"."""
    if isinstance(batch, torch.Tensor):
        yield name, batch
        return
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        batch = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    items = batch.items() if isinstance(batch, Mapping) else enumerate(batch) if isinstance(batch, list | tuple) else ()
    for key, value in items:
        yield from tensors(value, f"{name}.{key}" if name else str(key))
