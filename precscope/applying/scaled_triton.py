"""The casts of `scaled` on a GPU, in Triton: amax in one pass; values, transpose and scale in a second one.

Codes are made from the bits of fp32, in integers: round to nearest even, subnormals, NaN where the format has no inf.
The device's own conversion instructions saturate inf.

With TRITON_INTERPRET=1 in the environment before this module is imported, the same code runs on CPU tensors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import get_format
from .fp8 import HEADROOM

_TILE = 64
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}  # products with powers of two are exact, fused or not
_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@triton.jit
def _amax_kernel(x_pointer, bits_pointer, m, n, stride_m, stride_n, tile: tl.constexpr):
    """Bits of the largest finite magnitude, which order like the magnitudes. One program per row of tiles."""
    row = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)[:, None]
    largest = tl.zeros([tile, tile], dtype=tl.int32)
    start = 0
    while start < n:  # not range: the interpreter of Triton 3.6 fails on its bounds under numpy 2.5
        column = start + tl.arange(0, tile)[None, :].to(tl.int64)  # times a stride it may leave 32 bits
        x = tl.load(x_pointer + row * stride_m + column * stride_n, mask=(row < m) & (column < n), other=0.0)
        bits = x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.maximum(largest, tl.where(bits < 0x7F800000, bits, 0))
        start += tile
    tl.atomic_max(bits_pointer, tl.max(tl.max(largest, axis=1), axis=0))


@triton.jit
def _codes(x, k, p: tl.constexpr, bias: tl.constexpr, infinity: tl.constexpr):
    """8-bit codes of x * 2^k, which lies within the format, as int32. p: significand bits. infinity: its code."""
    power = ((k + 127) << 23).to(tl.float32, bitcast=True)
    bits = (x * power).to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    # dropped: 23 - p bits, to nearest even; a carry into the exponent is what rounding up to a power of two is
    rounded = magnitude + ((1 << (22 - p)) - 1) + ((magnitude >> (23 - p)) & 1)
    normal = (rounded >> (23 - p)) - ((127 - bias) << p)
    # below 2^(1 - bias): fp32 rounds to the format's smallest step where the sum has that as its ulp
    step: tl.constexpr = (127 + 1 - bias - p + 23) << 23
    magic = tl.full([1, 1], step, dtype=tl.int32).to(tl.float32, bitcast=True)
    subnormal = (magnitude.to(tl.float32, bitcast=True) + magic).to(tl.int32, bitcast=True) - step
    code = tl.where(magnitude < ((128 - bias) << 23), subnormal, normal)
    code = tl.where(magnitude == 0x7F800000, infinity, code)
    return tl.where(magnitude > 0x7F800000, 0x7F, code) | sign


@triton.jit
def _cast_kernel(
    x_pointer, bits_pointer, scale_pointer, rows_pointer, columns_pointer, m, n, padded, stride_m, stride_n,
    p: tl.constexpr, bias: tl.constexpr, infinity: tl.constexpr, target: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    binade = tl.maximum(tl.load(bits_pointer) >> 23, 1) - 127
    k = tl.minimum(tl.maximum(target - binade, -126), 126)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(scale_pointer, ((127 - k) << 23).to(tl.float32, bitcast=True))
    row = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    column = tl.program_id(1).to(tl.int64) * tile + tl.arange(0, tile)
    inside = (row[:, None] < m) & (column[None, :] < n)
    x = tl.load(x_pointer + row[:, None] * stride_m + column[None, :] * stride_n, mask=inside, other=0.0)
    code = _codes(x.to(tl.float32), k, p, bias, infinity).to(tl.uint8)
    if rows:
        tl.store(rows_pointer + row[:, None] * n + column[None, :], code, mask=inside)
    if columns:  # beyond the last row zeros were loaded: they are the padding
        kept = (column[:, None] < n) & (row[None, :] < padded)
        tl.store(columns_pointer + column[:, None] * padded + row[None, :], tl.trans(code), mask=kept)


def cast(x: Tensor, fmt: str, *, rows: bool, columns: bool) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Like `scaled.cast`: (rows, columns, scale)."""
    x, kind = x.detach(), get_format(fmt)
    m, n = x.shape
    padded = triton.cdiv(m, 16) * 16
    bits = torch.zeros((), dtype=torch.int32, device=x.device)
    scale = torch.empty((), dtype=torch.float32, device=x.device)
    straight = torch.empty((m, n) if rows else (0, 0), dtype=torch.uint8, device=x.device)
    turned = torch.empty((n, padded) if columns else (0, 0), dtype=torch.uint8, device=x.device)
    infinity = 0x7F if fmt == "e4m3" else 0x7C
    blocks = triton.cdiv(m, _TILE), triton.cdiv(n, _TILE)
    with torch.cuda.device(x.device if x.is_cuda else -1):
        _amax_kernel[(blocks[0],)](x, bits, m, n, *x.stride(), tile=_TILE, **_OPTIONS)
        _cast_kernel[blocks](
            x, bits, scale, straight, turned, m, n, padded, *x.stride(),
            p=kind.precision, bias=1 - kind.emin, infinity=infinity, target=kind.emax - HEADROOM,
            rows=rows, columns=columns, tile=_TILE, **_OPTIONS,
        )  # fmt: skip
    dtype = _DTYPES[fmt]
    return straight.view(dtype) if rows else None, turned.view(dtype) if columns else None, scale
