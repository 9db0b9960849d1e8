"""The gradient-weighted histogram on the CPU, compiled by numba: one pass over y and g = dL/dy.

Squares of g are added, in float64, to four interleaved tables by the exponent field of y, because a cell that was just
written cannot be added to again at once. Each chunk of fixed length has a histogram of its own, and these are added in
order: the result does not depend on the number of threads. Threads are those of cpu.py.
"""

from __future__ import annotations

import numba as nb
import numpy as np
import torch
from numba import njit
from torch import Tensor

from ..histogram import BINS
from . import openmp
from .cpu_kernels import _MAGNITUDE, _NORMAL, CHUNK, PARALLEL_FROM, _claim, _column, _exponent32, _pointer

# numba recompiles cached code when this file changes; what is imported from cpu_kernels.py is two
# intrinsics and the layout.

_U255, _SHIFT = np.uint32(255), np.uint32(23)
# A job: int64 [_JOB]. The first word is the counter from which threads claim chunks; _Y, _G are addresses of fp32 (or,
# with _WIDE, fp64) [_SIZE], _SUMS the address of float64 [chunks, BINS].
_CHUNK, _WIDE, _Y, _G, _SIZE, _SUMS, _JOB = range(7)


@njit
def _chunk32(bits, gradient, table, out):
    """bits: uint32 [n] of y. gradient: float32 [n]. table: float64 [1024] zeros, left as zeros. out: float64 [BINS]."""
    whole = np.uint64(bits.size // 4 * 4)
    for i in range(np.uint64(0), whole, np.uint64(4)):
        a, b = np.float64(gradient[i]), np.float64(gradient[i + np.uint64(1)])
        c, d = np.float64(gradient[i + np.uint64(2)]), np.float64(gradient[i + np.uint64(3)])
        table[np.uint64((bits[i] >> _SHIFT) & _U255)] += a * a
        table[np.uint64(((bits[i + np.uint64(1)] >> _SHIFT) & _U255) + np.uint32(256))] += b * b
        table[np.uint64(((bits[i + np.uint64(2)] >> _SHIFT) & _U255) + np.uint32(512))] += c * c
        table[np.uint64(((bits[i + np.uint64(3)] >> _SHIFT) & _U255) + np.uint32(768))] += d * d
    for i in range(whole, np.uint64(bits.size)):
        value = np.float64(gradient[i])
        table[np.uint64((bits[i] >> _SHIFT) & _U255)] += value * value
    for field in range(1, 255):
        weight = table[field] + table[field + 256] + table[field + 512] + table[field + 768]
        if weight != 0.0:
            out[_column(field - 127)] += weight
    if table[0] + table[256] + table[512] + table[768] != 0.0:  # zeros, which cost nothing, or subnormals
        for i in range(bits.size):
            magnitude = np.uint32(bits[i] & _MAGNITUDE)
            if magnitude and magnitude < _NORMAL:
                value = np.float64(gradient[i])
                out[_column(_exponent32(magnitude))] += value * value
    table[:] = 0.0


@njit
def _chunk64(bits, gradient, out):
    """bits: int64 [n] of fp64 y. gradient: float64 [n]. out: float64 [BINS]."""
    for i in range(bits.size):
        magnitude = bits[i] & np.int64(0x7FFF_FFFF_FFFF_FFFF)
        field = magnitude >> 52
        if magnitude and field < 2047:
            out[_column(field - 1023)] += gradient[i] * gradient[i]


@njit("void(intp)", nogil=True, cache=True)
def _work(address):
    """Take chunks of the job at `address` until none is left: what each thread does."""
    job = nb.carray(_pointer(address), _JOB, np.int64)
    size = job[_SIZE]
    chunks = (size + CHUNK - 1) // CHUNK
    sums = nb.carray(_pointer(job[_SUMS]), (chunks, BINS), np.float64)
    table = np.zeros(1024)
    while True:
        chunk = _claim(address + 8 * _CHUNK)
        if chunk >= chunks:
            return
        start = chunk * CHUNK
        n = min(CHUNK, size - start)
        if job[_WIDE]:
            y, g = job[_Y] + 8 * start, job[_G] + 8 * start
            _chunk64(nb.carray(_pointer(y), n, np.int64), nb.carray(_pointer(g), n, np.float64), sums[chunk])
        else:
            y, g = job[_Y] + 4 * start, job[_G] + 4 * start
            _chunk32(nb.carray(_pointer(y), n, np.uint32), nb.carray(_pointer(g), n, np.float32), table, sums[chunk])


@nb.cfunc("void(intp)", cache=True)
def _thread(address):
    """The entry point of an OpenMP thread."""
    _work(address)


def accumulate_weights(weights: Tensor, slot: int, y: Tensor, g: Tensor) -> None:
    """Like reference.accumulate_weights. y, g: contiguous [n], both fp32 or both fp64, on the CPU."""
    size = y.numel()
    if not size:
        return
    chunks = (size + CHUNK - 1) // CHUNK
    sums = np.zeros((chunks, BINS))
    wide = y.dtype == torch.float64
    job = np.array([0, wide, y.data_ptr(), g.data_ptr(), size, sums.ctypes.data], np.int64)
    threads = 1 if size < PARALLEL_FROM else min(openmp.threads(), chunks)
    if threads > 1:
        openmp.run(_thread.address, job.ctypes.data, threads)  # type: ignore[arg-type]
    else:
        _work(job.ctypes.data)
    weights[slot] += torch.from_numpy(sums.sum(axis=0))
