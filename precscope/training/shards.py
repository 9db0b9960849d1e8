"""Tensors of an optimizer where parameters may be sharded (DTensor): the local part, and back; copies and sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def local(x: Any) -> Any:
    """The shard that this process holds of a distributed tensor; anything else as it is, cut off from the graph."""
    x = getattr(x, "_local_tensor", x)
    return x.detach() if isinstance(x, Tensor) else x


def wrapped(value: Any, p: Tensor) -> Any:
    """`value`, a local tensor of the shape of p's shard, distributed as p is; int16 as the same bits in bf16, since
    neither NCCL nor gloo can send int16."""
    shard = getattr(p, "_local_tensor", None)
    if shard is None or not isinstance(value, Tensor) or value.shape != shard.shape:
        return value
    from torch.distributed.tensor import DTensor

    value = value.view(torch.bfloat16) if value.dtype is torch.int16 else value
    layout: Any = p
    return DTensor.from_local(
        value, layout.device_mesh, layout.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


def moved(value: Any, p: Tensor) -> Any:
    """A copy of `value` on the device of p."""
    return value.to(local(p).device, copy=True) if isinstance(value, Tensor) else value


def copied(value: Any) -> Any:
    """A copy of `value` where it is."""
    return value.clone() if isinstance(value, Tensor) else value


def values(kept: Any) -> list[Any]:
    """The entries of an optimizer's state for one parameter."""
    return list(kept.values()) if isinstance(kept, dict) else [kept]


def size(value: Any) -> int:
    """Bytes of a tensor, of its parts where it is made of parts."""
    if not isinstance(value, Tensor):
        return 0
    value = local(value)
    if hasattr(value, "__tensor_flatten__"):
        return sum(size(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.numel() * value.element_size()
