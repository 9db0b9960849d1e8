"""Attention by its definition in bf16, softmax included: what policy "cast" with fp32 masters makes of it on CPUs.

PyTorch's fused attention keeps logits and softmax in fp32 and never stores the matrix of weights, which is what long
sequences need. On CPUs it is no faster in bf16 than in fp32, its backward pass often slower. Two bf16 matrix products
with a bf16 softmax between them store [..., T, S] twice and take about half the time up to a few hundred keys.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .spec import Now

MOST_KEYS = 512
"""Measured with AVX-512 bf16 units: half the fused kernel's time at 64 to 256 keys, 0.9 to 1 at 512, 1.4 at 1024."""


class LowAttention(TorchFunctionMode):
    """While entered, `F.scaled_dot_product_attention` of plain bf16 CPU tensors with few keys is `attend`, in regions
    that want it."""

    def __init__(self, now: Now) -> None:
        super().__init__()
        self.now = now

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention and self.now.attention and _suits(*args, **(kwargs or {})):
            return attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _suits(
    query: Any = None, key: Any = None, value: Any = None, attn_mask: Any = None, *more: Any, **named: Any
) -> bool:
    """Whether `attend` takes such a call. One with a mask and is_causal is for PyTorch's function to refuse."""
    for tensor in (query, key, value):
        if type(tensor) is not Tensor or tensor.dtype is not torch.bfloat16 or tensor.device.type != "cpu":
            return False
    causal = more[1] if len(more) > 1 else named.get("is_causal", False)
    return not (key.is_nested or (causal and attn_mask is not None)) and key.shape[-2] <= MOST_KEYS


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(query key^T * scale + mask) value, each step rounded to the dtype of the tensors.

    query [..., T, E], key [..., S, E], value [..., S, V] -> [..., T, V]; arguments as in PyTorch's function. Rows whose
    keys are all masked give 0, as there.
    """
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    logits = (query * factor) @ key.transpose(-2, -1)  # [..., T, S]
    if is_causal:
        logits.add_(_causal(logits))  # in place: nothing else holds the product
    elif attn_mask is not None:
        bias = _bias(attn_mask, logits.dtype)
        masked = (bias == -math.inf).all(-1, keepdim=True)
        logits.add_(bias.masked_fill(masked, 0.0))
        return (_weights(logits, dropout_p) @ value).masked_fill(masked, 0.0)
    return _weights(logits, dropout_p) @ value


def _weights(logits: Tensor, dropout_p: float) -> Tensor:
    weights = logits.softmax(-1)
    return F.dropout(weights, dropout_p) if dropout_p else weights


def _causal(logits: Tensor) -> Tensor:
    """[T, S] of 0 up to the diagonal, -inf above."""
    return torch.full(logits.shape[-2:], -math.inf, dtype=logits.dtype, device=logits.device).triu(1)


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask adds to the logits: 0 and -inf where it is boolean. It is small beside them: most broadcast."""
    if mask.dtype is not torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -math.inf)
