"""fp32 values stored in fewer bits between steps: parameters, rounded or in two halves, and state, in bf16 or blocks.

Stochastic rounding to bf16 is one addition: bf16 is the upper half of fp32, so that adding a uniform 16-bit number to
the bit pattern and cutting the lower half off carries into the upper half with just the probability that the lower half
stands for, in every binade, subnormals included. It is exact, and unbiased: E[round(x)] = x.

State formats: "bf16" is rounded stochastically, since a running average with a decay of 1 - 2^-9 or nearer to 1 cannot
move when it is rounded to nearest. "int8", "int4" and "fp8" are the blockwise formats of torchao.optim (one fp32 scale
per 256 or 128 values; Dettmers et al. 2021, arXiv:2110.02861), used as storage alone: no torch.compile is needed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..rounding import quantize
from .config import STATES

_BLOCKS = {"int8": 256, "int4": 128, "fp8": 256}  # values per scale: torchao's defaults
_LEAST = 4096  # elements from which on torchao (and bitsandbytes) store in blocks
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")  # never negative: all codes for one sign
_PIECE = 1 << 16  # elements worked on at once on the CPU


def round_stochastically(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """`x` (fp32) as `dtype` (bf16 or fp16): one of the two nearest values, the nearer one more often, E[result] = x.

    A new tensor of x's shape. generator: on the device of x; the only source of randomness. NaN stays NaN, inf stays.
    """
    if dtype is not torch.bfloat16:
        return quantize(x, "fp16", rounding="stochastic", generator=generator).to(dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    for piece, piece_out in _pieces(x, out):
        piece_out.copy_(_to_bf16(piece, generator))
    return out


def round_together(
    tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype], generator: torch.Generator
) -> list[Tensor]:
    """`round_stochastically` of each, fp32 tensors of one device: small ones in one go, which is much quicker."""
    rounded: list[Tensor] = [torch.empty(0)] * len(tensors)
    for dtype in dict.fromkeys(dtypes):
        chosen = [i for i, d in enumerate(dtypes) if d is dtype]
        flat = torch.cat([tensors[i].reshape(-1) for i in chosen]) if len(chosen) > 1 else tensors[chosen[0]]
        parts = round_stochastically(flat, dtype, generator).view(-1).split([tensors[i].numel() for i in chosen])
        for i, part in zip(chosen, parts, strict=True):
            rounded[i] = part.view(tensors[i].shape)
    return rounded


def _to_bf16(x: Tensor, generator: torch.Generator) -> Tensor:
    """x fp32 [n] rounded to values of bf16, still as fp32. Each 32-bit draw serves two elements."""
    draws = torch.empty((x.numel() + 1) // 2, dtype=torch.int32, device=x.device)
    draws.random_(-(2**31), 2**31, generator=generator)
    noise = draws.view(torch.int16)[: x.numel()]  # uniform on -32768 .. 32767
    bits = x.view(torch.int32) + noise  # int32: a carry reaches the upper half, and may make inf of the largest values
    bits.add_(1 << 15).bitwise_and_(-(1 << 16))
    if x.device.type == "cpu" and math.isfinite(float(x.sum())):
        return bits.view(torch.float32)
    return torch.where(torch.isfinite(x), bits.view(torch.float32), x)


def cut_off(full: Tensor, x: Tensor) -> Tensor:
    """What rounding `full` (fp32) to `x` (bf16 or fp16) lost, in 16 bits.

    Of bf16 these are the lower bits of the pattern, -32768 .. 32767 (int16), exact: a value that is rounded to nearest
    differs from its rounding by at most 2^15 in the pattern. Just 2^15 (a tie that is rounded down, one value in 65536)
    becomes 2^15 - 1, an ulp of fp32 less. Of fp16 it is the difference, rounded to bf16.
    """
    if x.dtype is torch.bfloat16:
        rest = torch.empty(x.shape, dtype=torch.int16, device=x.device)
        for piece, x_piece, out in _pieces(full, x, rest):
            out.copy_((piece.view(torch.int32) - _upper(x_piece)).clamp_(max=2**15 - 1))
        return rest
    return (full - x.float()).to(torch.bfloat16)


def put_together(x: Tensor, rest: Tensor) -> Tensor:
    """Inverse of `cut_off`: fp32. Of bf16 the rest may also be there as the same bits in bf16 (see shards.py)."""
    if x.dtype is torch.bfloat16:
        full = x.to(torch.float32, memory_format=torch.contiguous_format)
        for piece, rest_piece in _pieces(full, rest.view(torch.int16)):
            piece.view(torch.int32).add_(rest_piece)
        return full
    return x.float() + rest


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors flat and, on the CPU, in pieces, so that each step of the arithmetic finds its operands in cache."""
    size = _PIECE if tensors[0].device.type == "cpu" else max(tensors[0].numel(), 1)
    return zip(*(t.contiguous().view(-1).split(size) for t in tensors), strict=True)


def _upper(x: Tensor) -> Tensor:
    """The bit pattern of bf16 values as fp32: int32."""
    return x.float().view(torch.int32)


def check_state(state: str) -> None:
    """Raises UsageError where `state` is no format for optimizer state, or needs torchao and that is not there."""
    if state not in STATES:
        raise UsageError(f"optimizer state cannot be stored in {state!r}; allowed: {', '.join(STATES)}")
    if state in _BLOCKS:
        _torchao(state)


def store_state(entries: list[tuple[str, Tensor, Tensor]], state: str, generator: torch.Generator) -> list[Tensor]:
    """What to keep of entries of an optimizer's state between steps; an entry is (key, value, the fp32 parameter it
    belongs to). All are on one device.

    Only fp32 tensors of the parameter's shape are stored lower; step counters and the like are kept as they are, and so
    are tensors that are too small for blocks.
    """
    kept = [value for _, value, _ in entries]
    if state == "fp32":
        return kept
    lower = [
        i
        for i, (_, value, like) in enumerate(entries)
        if value.dtype is torch.float32 and value.shape == like.shape and value.dim() and value.layout is torch.strided
    ]
    if state == "bf16":
        stored = round_together([kept[i] for i in lower], [torch.bfloat16] * len(lower), generator)
    else:
        stored = [_in_blocks(entries[i][0], kept[i], state) for i in lower]
    for i, value in zip(lower, stored, strict=True):
        kept[i] = value
    return kept


def _in_blocks(key: str, value: Tensor, state: str) -> Tensor:
    if value.numel() < _LEAST or value.numel() % _BLOCKS[state]:
        return value
    signed = {} if state == "fp8" else {"signed": key not in _SQUARES}
    stored = _torchao(state).zeros(
        value.shape, block_size=_BLOCKS[state], device=value.device, dtype=torch.float32, **signed
    )
    stored.copy_(value)
    return stored


def restore_state(value: Any) -> Any:
    """Inverse of `store_state`, as far as it can be: fp32 again."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    if type(value) is not Tensor and hasattr(value, "codes"):
        blocks: Any = value
        return blocks.dequantize(torch.float32)
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


def _torchao(state: str) -> Any:
    """torchao's tensor class for `state`; importing it also lets torch.load(weights_only=True) read it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchao.optim import subclass_4bit, subclass_8bit, subclass_fp8
    except ImportError as error:
        raise UsageError(
            f"optimizer state in {state} is stored by torchao, which cannot be imported here ({error}): "
            "pip install torchao, or take state='bf16'"
        ) from error
    return {
        "int8": subclass_8bit.OptimState8bit,
        "int4": subclass_4bit.OptimState4bit,
        "fp8": subclass_fp8.OptimStateFp8,
    }[state]
