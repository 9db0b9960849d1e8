"""What a layer's precision means in torch's dtypes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..plans import LayerPrecision

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CONVERTED = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes whose storage a plan decides; fp64, 8-bit, integer and complex tensors stay as they are."""
MATMULS = (nn.Linear, nn.modules.conv._ConvNd)
BATCHNORM = nn.modules.batchnorm._BatchNorm
TABLES = ("_parameters", "_buffers")


def dtype_of(layer: LayerPrecision) -> torch.dtype:
    """Dtype of the arithmetic; 8-bit formats are emulated on bf16."""
    return DTYPES.get(layer.compute, torch.bfloat16)


def kind_of(layer: LayerPrecision) -> str:
    """ "fp32", or the policy: what the forward does to autocast and inputs. See the package's docstring."""
    return "fp32" if layer.compute in ("fp32", "tf32") else layer.policy


def is_matmul(module: nn.Module) -> bool:
    """Whether an 8-bit format applies to it: a linear or convolution module that holds its weight itself."""
    known = isinstance(module, MATMULS) or type(module).__name__ == "Conv1D"  # Hugging Face's transposed linear
    return known and module._parameters.get("weight") is not None


def needs_swap(module: nn.Module, layer: LayerPrecision) -> bool:
    """Whether its own tensors, as they are stored now, are not what its forward under `layer` needs."""
    if kind_of(layer) == "autocast" and layer.params == "fp32":
        return False
    tensors = [t for table in TABLES for t in getattr(module, table).values() if t is not None]
    tensors = [t for t in tensors if t.is_floating_point()]
    if kind_of(layer) == "cast":
        if isinstance(module, BATCHNORM) and all(t.dtype is torch.float32 for t in tensors):
            return False  # its kernels take low inputs with fp32 parameters and statistics
        return any(differs(t, dtype_of(layer), doubles=True) for t in tensors)
    if kind_of(layer) == "autocast" and isinstance(module, MATMULS) and layer.params == layer.compute:
        return False  # autocast would cast them to just that
    return any(differs(t, torch.float32, doubles=False) for t in tensors)


def differs(tensor: Tensor, target: torch.dtype, *, doubles: bool) -> bool:
    """Whether the forward must see a cast of this tensor. doubles: fp64 is cast too."""
    dtype = tensor.dtype
    return dtype is not target and (dtype in CONVERTED or (doubles and dtype is torch.float64))
