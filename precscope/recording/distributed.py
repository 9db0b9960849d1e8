"""Shadow steps on several processes: DistributedDataParallel exchanges gradients through memory of its own.

What it exchanges may be compressed (communication hooks), lies in its buckets, which `.grad` may be a view of, and
leaves out the fp32 stand-ins of parameters that are stored low. So a shadow step runs without its exchange, and
averages the fp32 gradients itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def ddp_in(model: nn.Module) -> DistributedDataParallel | None:
    """The DistributedDataParallel around a model, also one that torch.compile or Fabric wraps, or that wraps a compiled
    one."""
    found: nn.Module | None = model
    while found is not None and not isinstance(found, DistributedDataParallel):
        found = getattr(found, "_orig_mod", getattr(found, "_forward_module", None))
    return found


@contextmanager
def unsynchronised(ddp: DistributedDataParallel | None) -> Iterator[None]:
    """Passes of `ddp` inside exchange no gradients, and the next one outside begins as it would have."""
    if ddp is None:
        yield
        return
    due = ddp.require_forward_param_sync  # whether the next pass broadcasts the buffers
    try:
        with ddp.no_sync():
            yield
    finally:
        ddp.require_forward_param_sync = due


@contextmanager
def gradients_apart(model: nn.Module, ddp: DistributedDataParallel | None) -> Iterator[dict[Tensor, Tensor | None]]:
    """Yield parameter -> .grad, whose values come back on leaving, whatever is written to their memory.

    A wrapper that was not told of exchanges gradients inside, and may do so in the memory of those that are there.
    """
    gradients: dict[Tensor, Tensor | None] = {p: p.grad for p in model.parameters()}
    if ddp is not None or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        yield gradients
        return
    copies: dict[Tensor, Tensor] = {p: g.clone() for p, g in gradients.items() if type(g) is Tensor}
    try:
        yield {**gradients, **copies}
    finally:
        with torch.no_grad():
            for parameter, copy in copies.items():
                gradients[parameter].copy_(copy)  # type: ignore[union-attr]


@torch.no_grad()
def average_gradients(model: nn.Module, ddp: DistributedDataParallel) -> None:
    """Average .grad over the processes, as `ddp` does, but in the gradients' own dtype; one that only some processes
    have counts as zero on the others. All processes must call it."""
    parameters = [p for name, p in model.named_parameters() if p.requires_grad and name not in ddp.parameters_to_ignore]
    if not parameters:
        return
    group = ddp.process_group
    world = torch.distributed.get_world_size(group)
    there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    torch.distributed.all_reduce(there, group=group)
    for parameter, count in zip(parameters, there.tolist(), strict=True):
        if not count:
            continue
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        own = (own if own.layout is torch.strided else own.to_dense()).contiguous()
        torch.distributed.all_reduce(own, group=group)
        parameter.grad = own / world
