"""The one-pass kernels on the GPU, in Triton: what is launched, and for which tensors.

A tensor is read once. A program counts in shared memory (triton_table.py), keeps extremes and sums in registers
(triton_kernels.py), and at its end adds them to the row with atomics. Many small tensors take one launch per format:
a table of work, one line per program, is built on the host in pinned memory and copied to the device asynchronously.
Nothing waits for the device.

Sums. fp32, bf16 and fp16 values are added in fp32 over the at most 16 values that a thread reads at a time, then in
fp64, in no fixed order: |error of sum| <= 2^-21 sum |x|, and sumsq is right to 2^-21 of itself. fp64 tensors, and the
shares of programs that meet inf, nan, subnormals or magnitudes beyond [2^-48, 2^60), are summed in fp64 throughout.
Counts and extremes are exact always.

CUDA graphs. `accumulate`, `accumulate_many`, `accumulate_update` and `accumulate_weights` can be captured. Every kernel
must have run once before (Triton compiles it then), the buffer must be large enough before and must outlive the
graph, and the tensors are read where they lay at capture. A SlotBuffer keeps to this: see there.

With TRITON_INTERPRET=1 in the environment before this module is imported, the same code runs on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
from torch import Tensor

from . import reference
from .triton_kernels import GROUPS, LINE, VECTOR, many_kernel, one_kernel, weights_kernel
from .triton_table import THREADS, WARPS

INTERPRETED = triton.knobs.runtime.interpret
PTX = not INTERPRETED and torch.version.hip is None

_PROGRAMS_PER_SM, _REGISTERS = 2, 64  # of 512 threads each: the registers of a multiprocessor are full
_SPAN = 4  # blocks that a program of a table of work does before another one shares the tensor
_KIND = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_WEIGHTS_BLOCK, _WEIGHTS_WARPS = 2048, 8


def accumulate(rows: Tensor, slot: int, x: Tensor, k: int = 0) -> None:
    """Add the statistics of x * 2^k to row `slot`. x: fp32, bf16, fp16 or fp64, on the device of `rows`."""
    x = reference.flat(x.detach())
    if x.numel():
        kind = _KIND[x.dtype]
        with _on(x.device):
            one_kernel[_grid(x)](rows, x, x, x.numel(), slot, slot, k, update=False, **_options(kind))


def accumulate_many(rows: Tensor, slots: Sequence[int], tensors: Sequence[Tensor], ks: Sequence[int]) -> list[Tensor]:
    """`accumulate` of each tensor times 2^k: one launch per format. A slot may come several times.

    Returns what a captured graph reads at every replay: the table of work, and the host memory that it is copied from.
    """
    flat = [reference.flat(x.detach()) for x in tensors]
    kept: dict[tuple[int, bool], list[int]] = {}
    for i, x in enumerate(flat):
        if x.numel():
            kept.setdefault((_KIND[x.dtype], x.data_ptr() % 16 == 0), []).append(i)
    if not kept:
        return []
    lines, ends = [], []
    for (kind, _), members in kept.items():
        lines += [_lines(kind, flat[i], slots[i], ks[i]) for i in members]
        ends.append(sum(map(len, lines)))
    host, work = _to_device(np.concatenate(lines), rows.device)
    with _on(rows.device):
        for (kind, aligned), begin, end in zip(kept, [0, *ends[:-1]], ends, strict=True):
            many_kernel[(end - begin,)](rows, work[begin:end], aligned=aligned, update=False, **_options(kind))
    return [host, work]


def accumulate_update(rows: Tensor, slot: int, ratio_slot: int, before: Tensor, after: Tensor) -> None:
    """Like reference.accumulate_update: one pass over both tensors where these are of one format below fp64."""
    if before.dtype != after.dtype or before.dtype == torch.float64 or before.shape != after.shape:
        return reference.accumulate_update(rows, slot, ratio_slot, before, after)
    if before.stride() != after.stride() or not reference.fills_its_storage(before):
        before, after = before.contiguous(), after.contiguous()
    before, after = reference.flat(before.detach()), reference.flat(after.detach())
    if after.numel():
        with _on(after.device):
            one_kernel[_grid(after)](
                rows, after, before, after.numel(), slot, ratio_slot, 0, update=True, **_options(_KIND[after.dtype])
            )
    return None


def accumulate_weights(weights: Tensor, slot: int, y: Tensor, g: Tensor) -> None:
    """Like reference.accumulate_weights."""
    if y.numel():
        programs = min(triton.cdiv(y.numel(), _WEIGHTS_BLOCK), _resident(y.device))
        with _on(y.device):
            weights_kernel[(programs,)](
                weights, y, g, y.numel(), slot, kind=_KIND[y.dtype], block=_WEIGHTS_BLOCK,
                num_warps=_WEIGHTS_WARPS, enable_fp_fusion=True,
            )  # fmt: skip


def _lines(kind: int, x: Tensor, slot: int, k: int) -> np.ndarray:
    """The lines of a table of work for one tensor, int64 [programs, LINE]."""
    programs = triton.cdiv(x.numel(), _SPAN * _block(kind))
    found = np.empty((programs, LINE), np.int64)
    found[:] = (x.data_ptr(), x.data_ptr(), x.numel(), slot, slot, k, 0, programs)
    found[:, 6] = np.arange(programs)
    return found


def _to_device(lines: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """(pinned memory, its copy on the device), which the host does not wait for: torch keeps pinned memory until a copy
    is through, though not until a captured one has been replayed."""
    table = torch.from_numpy(lines)
    if device.type != "cuda":
        return table, table
    table = table.pin_memory()
    return table, table.to(device, non_blocking=True)


def _options(kind: int) -> dict[str, object]:
    """Everything but the arguments: constants and options of the compiler."""
    limit = {"maxnreg": _REGISTERS} if PTX else {}
    return {
        "kind": kind, "ptx": PTX, "groups": GROUPS[kind], "vector": VECTOR[kind], "num_warps": WARPS,
        "enable_fp_fusion": True, **limit,
    }  # fmt: skip


def _block(kind: int) -> int:
    """Elements that a program reads at a time."""
    return GROUPS[kind] * VECTOR[kind] * THREADS


def _grid(x: Tensor) -> tuple[int]:
    """As many programs as the device holds at once, or one per block where there are fewer."""
    return (min(triton.cdiv(x.numel(), _block(_KIND[x.dtype])), _resident(x.device)),)


def _resident(device: torch.device) -> int:
    if device.type != "cuda":
        return 3
    return _PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


def _on(device: torch.device) -> torch.cuda.device:
    """Launches go to the current device: make it the tensor's. Does nothing on the CPU."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
