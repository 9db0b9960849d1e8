"""FLOPs of one forward pass per module, children not counted, by torch's own counter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..preservation import preserved
from .watcher import watched_modules


def count_flops(model: nn.Module, run: Callable[[], Any]) -> dict[str, int]:
    """FLOPs (2 per multiply-add) of the matrix products, convolutions and attention that `run()` does inside each
    watched module. The model, its buffers and the RNG are left as they were; no gradient is computed."""
    with preserved(model), torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_extra()) as counter:
        run()
    root = type(model).__name__
    total = {
        name.removeprefix(root).removeprefix("."): sum(by_op.values())
        for name, by_op in counter.get_flop_counts().items()
        if name == root or name.startswith(root + ".")
    }
    names = list(watched_modules(model).values())
    exclusive = {name: total.get(name, 0) for name in names}
    for name in names:
        parent = _parent(name, exclusive)
        if parent is not None:
            exclusive[parent] -= total.get(name, 0)
    return {name: max(flops, 0) for name, flops in exclusive.items()}


def _parent(name: str, names: dict[str, int]) -> str | None:
    while name:
        name = name.rpartition(".")[0]
        if name in names:
            return name
    return None


def _extra() -> dict[Any, Any]:
    """Attention on the CPU, which torch's counter does not know: 4 b h q k d."""

    def attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        b, h, q, d = query
        return 2 * b * h * q * key[2] * (d + value[3])

    op = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    return {op: attention} if op is not None else {}
