"""PyTorch's autocast lists: in which precision an op runs under torch.autocast on CUDA and on the CPU.

"low": floating arguments are cast to the low format. "fp32": they are cast to float32, and the result is float32.
"promote": the widest of the arguments decides, as it does for every op that is on no list.

The lists are data, by the op's name without overload. The tests hold them against the running torch: against the
kernels that it registers for autocast, and against the dtypes that the ops return there. (With fake tensors, autocast
for CUDA can be asked without a GPU.) Sources: ATen/autocast_mode.h and autocast_mode.cpp;
https://docs.pytorch.org/docs/stable/amp.html#autocast-op-reference

Autocast decides above autograd, on composite ops; a dispatch mode sees what they are made of. `entry_of` maps these
names back (`_softmax` to `softmax`, `convolution` to `conv2d`). Composites that leave no op of their own
(`cosine_similarity`, `kl_div`) are known by the function that the user calls; see casts.py.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Literal

Entry = Literal["low", "fp32", "promote"]

_LOW = """_convolution conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d prelu addmm
    matmul mm linalg_vecdot linear addbmm baddbmm bmm scaled_dot_product_attention"""
_LISTS: dict[str, dict[str, str]] = {
    "cuda": {
        "low": _LOW + """ convolution addmv addr einsum mv chain_matmul linalg_multi_dot _thnn_fused_lstm_cell
            _thnn_fused_gru_cell lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell _scaled_dot_product_flash_attention
            cudnn_convolution cudnn_convolution_transpose""",
        "fp32": """acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow softplus
            layer_norm native_layer_norm rms_norm group_norm frobenius_norm nuclear_norm
            cosine_similarity poisson_nll_loss cosine_embedding_loss nll_loss nll_loss2d
            hinge_embedding_loss kl_div l1_loss smooth_l1_loss huber_loss mse_loss
            margin_ranking_loss multilabel_margin_loss soft_margin_loss triplet_margin_loss
            multi_margin_loss binary_cross_entropy binary_cross_entropy_with_logits dist pdist cdist
            renorm logsumexp upsample_nearest1d _upsample_nearest_exact1d upsample_nearest2d
            _upsample_nearest_exact2d upsample_nearest3d _upsample_nearest_exact3d upsample_linear1d
            upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d upsample_bicubic2d
            _upsample_bicubic2d_aa prod softmax log_softmax cumprod cumsum linalg_vector_norm
            linalg_matrix_norm linalg_matrix_sqrth sum norm""",
        "promote": "addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add",
    },
    "cpu": {
        "low": _LOW + " _addmm_activation mkldnn_rnn_layer _native_multi_head_attention",
        "fp32": """_grid_sampler_2d_cpu_fallback _lu_with_info adaptive_avg_pool3d adaptive_max_pool3d avg_pool3d
            binary_cross_entropy binary_cross_entropy_with_logits cdist cholesky cholesky_inverse
            cholesky_solve cosine_embedding_loss cross_entropy_loss ctc_loss
            fake_quantize_per_tensor_affine fft_fft fft_fft2 fft_fftn fft_hfft fft_ifft fft_ifft2
            fft_ifftn fft_ihfft fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftn
            fractional_max_pool2d fractional_max_pool3d geqrf grid_sampler grid_sampler_2d
            grid_sampler_3d hinge_embedding_loss huber_loss inverse kl_div l1_loss linalg_cholesky
            linalg_cholesky_ex linalg_cond linalg_eig linalg_eigh linalg_eigvals linalg_eigvalsh
            linalg_householder_product linalg_inv linalg_inv_ex linalg_lstsq linalg_matrix_rank
            linalg_matrix_sqrth linalg_qr linalg_solve linalg_svd linalg_svdvals linalg_tensorinv linalg_tensorsolve
            lu_solve margin_ranking_loss max_pool3d max_unpool2d max_unpool3d mse_loss
            multi_margin_loss multilabel_margin_loss multilabel_margin_loss_forward nanquantile
            nll_loss nll_loss2d orgqr ormqr pinverse poisson_nll_loss polar prod qr quantile
            reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d replication_pad3d
            smooth_l1_loss soft_margin_loss stft svd trace triangular_solve triplet_margin_loss
            view_as_complex""",
        "promote": "cat stack index_copy",
    },
}  # fmt: skip

_ALSO = {
    "_softmax": "softmax", "_log_softmax": "log_softmax", "native_group_norm": "group_norm",
    "native_layer_norm": "layer_norm", "_fused_rms_norm": "rms_norm", "nll_loss_forward": "nll_loss",
    "nll_loss2d_forward": "nll_loss2d", "_cdist_forward": "cdist", "_pdist_forward": "pdist",
    "_ctc_loss": "ctc_loss", "_prelu_kernel": "prelu", "convolution": "conv2d", "mkldnn_convolution": "conv2d",
    "_linalg_svd": "linalg_svd", "_linalg_eigh": "linalg_eigh", "_linalg_solve_ex": "linalg_solve",
    "multilabel_margin_loss_forward": "multilabel_margin_loss", "mv": "matmul", "dot": "matmul", "addmv": "addmm",
    "_trilinear": "bilinear", "_fft_r2c": "fft_rfft", "_fft_c2c": "fft_fft", "_fft_c2r": "fft_irfft",
    "_cudnn_rnn": "linear", "mkldnn_rnn_layer": "linear",
}  # fmt: skip
"""What composite ops are made of: the name on the lists under which it is decided."""


def lists(device: str) -> dict[str, Entry]:
    """The lists of `device` ("cuda" or "cpu") as one mapping: op name -> "low", "fp32" or "promote"."""
    return {name: entry for entry, names in _LISTS[device].items() for name in names.split()}  # type: ignore[misc]


@cache
def _by_name(device: str) -> dict[str, Entry]:
    return lists(device)


@cache
def entry_of(name: str, device: str) -> Entry:
    """How autocast on `device` runs the op `name` (as OpFacts.name); its backward kernel runs as it ran."""
    known = _by_name(device)
    name = re.sub(r"_backward(_data|_overrideable)?$", "", name)
    base = name.rstrip("_") if not name.startswith("__") else name
    if "attention" in base and base not in known:
        base = "scaled_dot_product_attention"
    for candidate in (name, base, _ALSO.get(base)):
        if candidate in known:
            return known[candidate]
    return "promote"


@cache
def entry_of_node(node: str, device: str) -> Entry:
    """The same for an autograd node such as "LogSoftmaxBackward0"."""
    squeezed = {name.replace("_", ""): name for name in [*_by_name(device), *_ALSO]}
    base = re.sub(r"Backward\d*$", "", node).lower()
    return entry_of(squeezed.get(base, base), device)
