"""What an op's schema says that matters here: does it make numbers, what does it write, how does it compute.

Looked up once per op (`facts_of` is cached), since a dispatch mode asks at every op.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

Op = Any
"""A torch._ops.OpOverload."""

MATMUL = frozenset({
    "mm", "bmm", "addmm", "addmv", "addbmm", "baddbmm", "mv", "dot", "vdot", "addr", "linear", "matmul",
    "_addmm_activation", "convolution", "_convolution", "convolution_backward", "convolution_overrideable",
    "mkldnn_convolution", "cudnn_convolution", "cudnn_convolution_transpose", "mkldnn_linear", "mkldnn_rnn_layer",
    "mkldnn_rnn_layer_backward", "_trilinear", "conv_tbc", "conv_tbc_backward", "_thnn_fused_lstm_cell",
    "_thnn_fused_gru_cell",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable", "_flash_attention_forward", "_efficient_attention_forward",
    "_scaled_dot_product_flash_attention_backward", "_scaled_dot_product_flash_attention_for_cpu_backward",
    "_scaled_dot_product_efficient_attention_backward", "_scaled_dot_product_cudnn_attention_backward",
    "_scaled_dot_product_fused_attention_overrideable_backward", "_flash_attention_backward",
    "_efficient_attention_backward",
})  # fmt: skip
"""Ops that multiply matrices and add up: half kernels take half operands, add in fp32 and round once."""

_NORMS = frozenset({
    "native_layer_norm", "native_group_norm", "_fused_rms_norm", "native_batch_norm", "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_with_update",
    "_batch_norm_no_update",
})  # fmt: skip
"""Ops whose result has the dtype of the input, whatever that of weight, bias and running statistics."""

_STATISTICS = _NORMS | {"_thnn_fused_lstm_cell", "nll_loss_forward", "nll_loss2d_forward"} | {
    name for name in MATMUL if "attention" in name and not name.endswith("backward")
}  # fmt: skip
"""Ops whose second and further results are internal (mean, rstd, logsumexp): half kernels keep these in fp32."""

ACCUMULATES = frozenset({
    "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_", "index_add", "index_add_", "index_put",
    "index_put_", "_index_put_impl_", "_unsafe_index_put", "index_reduce", "index_reduce_", "put", "put_",
})  # fmt: skip
"""Ops that add one value after the other to a stored one, so that half kernels round at every addition."""

_SAME = frozenset({"detach", "alias", "_unsafe_view", "lift", "lift_fresh", "lift_fresh_copy", "_conj", "view_as_real"})
_COPIES = frozenset({"clone", "_to_copy", "contiguous", "copy"})
_UNFILLED = frozenset({
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted", "resize_", "resize_as_",
    "set_", "_local_scalar_dense", "sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "is_same_size",
    "zeros", "zeros_like", "new_zeros", "zero_",
})  # fmt: skip
_UNANNOTATED = {"native_batch_norm": (3, 4), "cudnn_batch_norm": (3, 4), "miopen_batch_norm": (3, 4)}
"""Ops that write running statistics, whose schema does not say so: which arguments."""


@dataclass(frozen=True)
class OpFacts:
    """name: without namespace (if it is aten) and overload. view: its results share memory with an argument and nothing
    is written. copies: its result has the values of its argument. unfilled: its result holds nothing yet, or only
    zeros. written: positions, and names of keyword arguments, that it writes. returned: for each result whether it is
    one of these. matmul, norm, statistics, accumulates: see above. backward: it is a derivative's own kernel.
    """

    name: str
    view: bool
    copies: bool
    unfilled: bool
    written: tuple[int | str, ...]
    returned: tuple[bool, ...]
    matmul: bool
    norm: bool
    statistics: bool
    accumulates: bool
    backward: bool

    def label(self, result: int) -> str:
        """Name of the op in tables: "native_layer_norm", and "native_layer_norm[1]" for its second result."""
        return self.name if result == 0 else f"{self.name}[{result}]"


@cache
def facts_of(op: Op) -> OpFacts:
    """The facts of one op."""
    if not isinstance(op, torch._ops.OpOverload):
        return OpFacts(str(op), False, False, False, (), (), False, False, False, False, False)
    schema = op._schema
    namespace, _, base = schema.name.partition("::")
    aliases = [r.alias_info for r in schema.returns]
    written = [
        a.name if a.kwarg_only else i
        for i, a in enumerate(schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    ]
    return OpFacts(
        name=base if namespace == "aten" else f"{namespace}::{base}",
        view=base in _SAME or (bool(aliases) and not written and all(a is not None for a in aliases)),
        copies=base in _COPIES,
        unfilled=base in _UNFILLED,
        written=tuple(written) or _UNANNOTATED.get(base, ()),
        returned=tuple(a is not None and a.is_write for a in aliases),
        matmul=base in MATMUL,
        norm=base.removesuffix("_backward") in _NORMS,
        statistics=base in _STATISTICS,
        accumulates=base in ACCUMULATES,
        backward=base.endswith(("_backward", "_backward_data")),
    )
