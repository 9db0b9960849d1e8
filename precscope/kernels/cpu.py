"""The one-pass kernels on the CPU, compiled by numba (cpu_kernels.py): what is launched, and on which threads.

Large tensors are spread over the OpenMP threads that torch itself uses, by a call of GOMP_parallel in the library that
torch loaded. numba's own threading layers, or a thread pool, compete with torch's threads, which spin for a while after
each operation: between matrix products a thread pool was slower than one thread alone for tensors of up to 2^18
elements; and numba's layers end the process when used from two threads or after a fork. Where torch brings no such
library, and in forked children, one thread does the work.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import openmp, reference
from .cpu_kernels import (
    BF16,
    CHUNK,
    FP16,
    FP32,
    FP64,
    LINE,
    PARALLEL_FROM,
    gather,
    serial,
    thread,
    thread_many,
    work_many,
)
from .reference import AMIN, INF_BITS, WIDTH

KINDS = {torch.float32: FP32, torch.bfloat16: BF16, torch.float16: FP16, torch.float64: FP64}


def _parallel(threads: int, kind: int, before: int, after: int, size: int, k: int, row: int, ratio: int) -> None:
    """A whole job on several threads, each with rows of its own."""
    parts = np.zeros((threads, 2, WIDTH), np.int64)
    parts[:, 0, AMIN] = INF_BITS
    sums = np.empty(((size + CHUNK - 1) // CHUNK, 2))
    first = parts.ctypes.data
    words = [0, 0, kind, before, after, size, k, first, first + 8 * WIDTH, 16 * WIDTH, sums.ctypes.data]
    job = np.array(words, np.int64)
    openmp.run(thread.address, job.ctypes.data, threads)  # type: ignore[arg-type]
    gather(parts, sums, k, row, ratio)


def _reduce(kind: int, before: int, after: int, size: int, k: int, row: int, ratio: int) -> None:
    threads = 1 if size < PARALLEL_FROM else min(openmp.threads(), (size + CHUNK - 1) // CHUNK)
    if threads > 1:
        _parallel(threads, kind, before, after, size, k, row, ratio)
    else:
        serial(kind, before, after, size, k, row, ratio)


def accumulate(rows: Tensor, slot: int, x: Tensor, k: int = 0) -> None:
    """Add the statistics of x * 2^k to row `slot`. x: fp32, bf16, fp16 or fp64 on the CPU."""
    if not x.is_contiguous():
        x = reference.flat(x.detach())
    _reduce(KINDS[x.dtype], 0, x.data_ptr(), x.numel(), k, rows.data_ptr() + slot * 8 * WIDTH, 0)


def accumulate_many(rows: Tensor, slots: Sequence[int], tensors: Sequence[Tensor], ks: Sequence[int]) -> None:
    """`accumulate` of each tensor times 2^k to its slot: bit for bit the same. Small tensors are shared out whole among
    the threads, largest first; a slot that comes twice is left to one thread."""
    if len(set(slots)) < len(slots):
        for slot, x, k in zip(slots, tensors, ks, strict=True):
            accumulate(rows, slot, x, k)
        return None
    address, total = rows.data_ptr(), 0
    words = [0, 0]
    for slot, x, k in zip(slots, tensors, ks, strict=True):
        size = x.numel()
        if size >= PARALLEL_FROM or not x.is_contiguous():
            accumulate(rows, slot, x, k)
        elif size:
            words += (KINDS[x.dtype], x.data_ptr(), size, k, address + slot * 8 * WIDTH)
            total += size
    job = np.array(words, np.int64)
    job[1] = len(job) // LINE
    threads = 1 if total < PARALLEL_FROM else min(openmp.threads(), int(job[1]))
    if threads > 1:
        lines = job[2:].reshape(-1, LINE)
        lines[:] = lines[np.argsort(-lines[:, 2], kind="stable")]
        openmp.run(thread_many.address, job.ctypes.data, threads)  # type: ignore[arg-type]
    else:
        work_many(job.ctypes.data)
    return None


def accumulate_update(rows: Tensor, slot: int, ratio_slot: int, before: Tensor, after: Tensor) -> None:
    """Like reference.accumulate_update, in one pass over both tensors."""
    if before.dtype != after.dtype or before.dtype == torch.float64 or before.shape != after.shape:
        return reference.accumulate_update(rows, slot, ratio_slot, before, after)
    if before.stride() != after.stride() or not reference.fills_its_storage(before):
        before, after = before.contiguous(), after.contiguous()
    if not before.numel():
        return None  # an empty tensor's address is 0
    address = rows.data_ptr()
    row, ratio = address + slot * 8 * WIDTH, address + ratio_slot * 8 * WIDTH
    return _reduce(KINDS[before.dtype], before.data_ptr(), after.data_ptr(), before.numel(), 0, row, ratio)


def accumulate_weights(weights: Tensor, slot: int, y: Tensor, g: Tensor) -> None:
    """Like reference.accumulate_weights. Its kernel is compiled, or loaded from a cache, when it is first used."""
    from . import cpu_weights

    cpu_weights.accumulate_weights(weights, slot, y, g)
