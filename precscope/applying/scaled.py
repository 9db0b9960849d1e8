"""Linear modules whose products are 8-bit ones of the device: torch._scaled_mm.

    forward       y  = x w^T      e4m3 x e4m3
    backward      dx = g w        e5m2 x e4m3
                  dw = g^T x      e5m2 x e4m3, and db = g^T 1

Each operand is cast under the scale that the emulation takes (`fp8.scale_exponent`), so that both see equal values and
differ by the order of sums alone; sums are fp32 and results bf16. The weight is cast at each call from the parameter as
it is stored: a copy kept from call to call would not notice writes through `.data`. Between forward and backward the
8-bit operands alone are kept. 8-bit instructions want each operand contiguous along the sum, so that what the backward
takes is also written transposed. Under torch.compile the casts are plain operations, for the compiler to fuse; on a
GPU in eager mode Triton kernels do each in two passes. No host sync.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .fp8 import power_of_two, scale_exponent

CAPABILITY = (8, 9)
"""The least CUDA compute capability that multiplies 8-bit floats: Ada and Hopper."""
MULTIPLE = 16
"""What both sizes of a weight must be a multiple of (cuBLASLt)."""
_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_WIDE = (torch.float32, torch.bfloat16, torch.float16)

_forced = False


@contextmanager
def native_anywhere() -> Iterator[None]:
    """For tests of the arithmetic: plans applied inside take torch._scaled_mm on any device, the CPU too."""
    global _forced
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before


def missing_on(device: torch.device) -> str:
    """Why `device` has no 8-bit products; "" where it has."""
    if _forced:
        return ""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"no scaled 8-bit products on {'ROCm' if device.type == 'cuda' else device.type}"
    have = torch.cuda.get_device_capability(device)
    if have < CAPABILITY:
        return "compute capability {}.{}, and 8-bit products begin at {}.{}".format(*have, *CAPABILITY)
    return ""


def missing_for(module: nn.Module, compute: str) -> str:
    """Why the products of this matmul module under `compute` are emulated; "" where the device computes them."""
    weight: Any = module._parameters.get("weight")
    if weight is None:
        return "no weight of its own"
    if absent := missing_on(weight.device):
        return absent
    if compute != "e4m3":
        return f"no instruction multiplies {compute} by {compute}"
    if not isinstance(module, nn.Linear) and not _is_conv1d(module):
        return "only linear modules have scaled products"
    plain = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
    if "forward" in module.__dict__ or not (_is_conv1d(module) or type(module).forward in [c.forward for c in plain]):
        return f"{type(module).__name__} has a forward of its own"
    if weight.dtype not in _WIDE:
        return f"weight stored as {str(weight.dtype).removeprefix('torch.')}"
    if weight.dim() != 2 or any(n % MULTIPLE or not n for n in weight.shape):
        return f"weight {' x '.join(map(str, weight.shape))}: both must be multiples of {MULTIPLE}"
    return ""


def _is_conv1d(module: nn.Module) -> bool:
    """Hugging Face's transposed linear: weight [in, out]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def product(module: nn.Module, args: tuple, kwargs: dict, device: str) -> Tensor | None:
    """The module's output in bf16, or None where this call must be emulated: arguments other than one tensor, another
    device than `device`, nothing in it, a weight that is not a plain tensor (sharded, say), vmap, or torch.export."""
    parameters: dict[str, Any] = module._parameters
    weight, bias = parameters["weight"], parameters.get("bias")
    exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()  # 2.11's dynamo says True
    if kwargs or len(args) != 1 or exporting:
        return None
    x = args[0]
    if not isinstance(x, Tensor) or x.device.type != device or weight.device.type != device or x.numel() == 0:
        return None
    if x.dtype not in _WIDE or type(weight) not in (nn.Parameter, Tensor) or type(x) not in (nn.Parameter, Tensor):
        return None
    if not torch.compiler.is_compiling() and any(map(torch._C._functorch.is_batchedtensor, (x, weight))):
        return None
    if not torch.is_grad_enabled():  # else transposes would be written for a backward that never comes
        x, weight, bias = x.detach(), weight.detach(), None if bias is None else bias.detach()
    wide = weight if isinstance(module, nn.Linear) else weight.t()  # [out, in]
    return ScaledLinear.apply(x, wide, bias)


class Scaled(NamedTuple):
    """A matrix [M, K] in 8 bits. rows: [M, K] contiguous. columns: [K, M'] contiguous, its transpose, M' = M rounded up
    to a multiple of 16 with zeros. scale: float32 scalar; the matrix is the 8-bit values times it."""

    rows: Tensor | None
    columns: Tensor | None
    scale: Tensor


def cast(x: Tensor, fmt: str, *, rows: bool = True, columns: bool = False) -> Scaled:
    """`x` [M, K], fp32, bf16 or fp16, any strides, cast to `fmt` under its own power-of-two scale (see `round_scaled`,
    which gives the same values). What is not asked for is None."""
    if x.is_cuda and not torch.compiler.is_compiling() and (kernels := _kernels()) is not None:
        return Scaled(*kernels.cast(x, fmt, rows=rows, columns=columns))
    finite = x.isfinite()
    k = scale_exponent(torch.where(finite, x, 0.0).abs().amax().float(), fmt)
    # torch's casts differ by version for what is beyond the format's end, inf and NaN: e4m3 has NaN for both
    beyond = x.float() if fmt == "e5m2" else torch.nan
    narrow = torch.where(finite, x.float() * power_of_two(k), beyond).to(_DTYPES[fmt])
    return Scaled(narrow if rows else None, _transposed(narrow) if columns else None, power_of_two(-k))


def _transposed(x: Tensor) -> Tensor:
    """[M, K] -> [K, M'] contiguous. Moved as bytes: few operations know the 8-bit dtypes."""
    codes = x.view(torch.uint8).t()
    return F.pad(codes, (0, -x.shape[0] % MULTIPLE)).contiguous().view(x.dtype)


def _kernels() -> Any:
    """The Triton kernels, None where Triton is not installed."""
    try:
        from . import scaled_triton
    except ImportError:
        return None
    return scaled_triton


def _multiply(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [M, K] times b [N, K] transposed, in bf16. Sums are kept in fp32 throughout: the faster accumulation of Hopper
    keeps fewer bits, which no format accounts for."""
    if not a.is_cuda:  # the CPU's adds the bias to rounded sums, and would follow autocast inside
        with torch.autocast(a.device.type, enabled=False):
            wide = torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=torch.float32)
        return (wide if bias is None else wide + bias).to(torch.bfloat16)
    return torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b, bias=bias, out_dtype=torch.bfloat16)


class ScaledLinear(torch.autograd.Function):
    """x [..., K], weight [N, K], bias [N] or None -> [..., N] in bf16; gradients in the dtypes of the inputs.

    Gradients of gradients raise RuntimeError: they would leave out what the 8-bit operands depend on.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dx, dw, _ = ctx.needs_input_grad
        flat = x.reshape(-1, x.shape[-1])
        a = cast(flat, "e4m3", columns=dw)
        b = cast(weight, "e4m3", columns=dx)
        y = _multiply(a.rows, a.scale, b.rows, b.scale, None if bias is None else bias.to(torch.bfloat16))
        ctx.save_for_backward(a.columns, a.scale, b.columns, b.scale)
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, x_scale, weight, weight_scale = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        flat = grad.reshape(-1, grad.shape[-1])
        g = cast(flat, "e5m2", rows=of_x, columns=of_weight or of_bias)
        dx = dw = db = None
        if of_x:
            dx = _multiply(g.rows, g.scale, weight, weight_scale).to(x_dtype).view(*grad.shape[:-1], -1)
        if of_weight:
            dw = _multiply(g.columns, g.scale, x, x_scale).to(weight_dtype)
        if of_bias:  # the sums of the rounded gradient, as a product with ones: the gradient is read once, in 8 bits
            ones = torch.ones_like(g.columns[:MULTIPLE], dtype=torch.bfloat16).to(torch.float8_e4m3fn)
            db = _multiply(g.columns, g.scale, ones, torch.ones_like(g.scale))[:, 0].to(bias_dtype)
        return dx, dw, db
