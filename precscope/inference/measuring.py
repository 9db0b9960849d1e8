"""Latency of two precisions in turns, and the memory that a model needs to run in one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..training.precision import Precision
from .calls import Call
from .result import Latency


def in_turns(model: nn.Module, calls: Sequence[Call], both: tuple[Precision, Precision], *, pairs: int) -> Latency:
    """Time `pairs` runs in each of two precisions, the reference first and last by turns, over `calls` cyclically.

    Each run follows one that warms up. The ratio is taken within each pair, which a machine with other work on it
    disturbs least; medians over the pairs.
    """
    seconds = np.full((2, pairs), math.nan)
    for pair in range(pairs):
        call = calls[pair % len(calls)]
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            seconds[which, pair] = _timed(model, call, both[which])
    if not pairs:
        return Latency(math.nan, math.nan, math.nan, math.nan, math.nan, 0)
    ratio = seconds[0] / seconds[1]
    low, middle, high = np.quantile(ratio, (0.25, 0.5, 0.75))
    reference, planned = np.median(seconds, axis=1) * 1e3
    return Latency(float(reference), float(planned), float(middle), float(low), float(high), pairs)


def _timed(model: nn.Module, call: Call, precision: Precision) -> float:
    with precision.applied(model):
        for _ in range(2):
            data = call.fresh()
            start = _now(precision.device)
            with precision.forward_context():
                output = call.function(data)
            took = _now(precision.device) - start
            del output
    return took


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers as they are stored now; tied ones once."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def working_bytes(run: Callable[[], Any], precision: Precision) -> int:
    """Most bytes of tensors that `run()` has at once beyond those from before, its output included.

    On a GPU what PyTorch's allocator says. Elsewhere the tensors that operations return are counted, not the scratch
    memory inside an operation; fp16 products that are computed through fp32 count as fp16.
    """
    device = precision.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with precision.forward_context():
            kept = run()
        peak = torch.cuda.max_memory_allocated(device)
        del kept
        return peak - before
    counter = _Peak()
    with precision.forward_context(), counter:
        kept = run()
    del kept
    return counter.peak


class _Peak(TorchDispatchMode):
    """Adds up the storages of what operations return, as long as each lives."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        given = {_key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
                continue
            storage, key = tensor.untyped_storage(), _key(tensor)
            if key not in self._live and key not in given:  # not a view of a weight or an input
                self._live[key] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)
