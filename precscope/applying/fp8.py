"""8-bit matrix products: the scale that operands take, and the emulation where no instruction multiplies them.

Operands and the gradient of the output take 8-bit values, the rest is bf16. Every tensor gets one power-of-two scale
from its own amax, such that amax falls one binade below the largest of the format (head-room). Multiplying by a power
of two is exact, so what is lost is what the format loses. Gradients pass the rounding of operands unchanged
(straight-through); the gradient of the output is rounded to e5m2 (Micikevicius et al. 2022, arXiv:2209.05433: e4m3 for
weights and activations, e5m2 for gradients). No host sync of its own. torch.compile takes each emulated rounding as one
opaque operation. `scaled` has the products that devices with 8-bit instructions compute under the same scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import get_format

HEADROOM = 1
"""Binades kept free above amax."""


def round_scaled(x: Tensor, fmt: str) -> Tensor:
    """`x` rounded to the values of `fmt` under its own power-of-two scale; shape, dtype and device of `x`, no graph.

    The scale comes from the largest finite magnitude. inf and NaN stay what `fmt` can make of them: e4m3 has no inf, so
    inf becomes NaN there. An empty tensor stays empty.
    """
    from ..rounding import quantize

    if x.numel() == 0:
        return torch.empty_like(x)
    wide = x.detach().float()
    magnitude = wide.abs()
    k = scale_exponent(torch.where(magnitude.isfinite(), magnitude, 0.0).amax(), fmt)
    return (quantize(wide * power_of_two(k), fmt) * power_of_two(-k)).to(x.dtype)


def scale_exponent(amax: Tensor, fmt: str) -> Tensor:
    """k such that amax * 2^k lies in the binade below the top one of `fmt`, within -126 <= k <= 126: int32 scalar.

    amax: largest finite magnitude, float32 scalar, 0 where there is none."""
    # floor(log2(amax)) from the exponent bits; the smallest normal binade stands for subnormals and zero
    binade = (amax.view(torch.int32) >> 23).clamp(min=1) - 127
    return (get_format(fmt).emax - HEADROOM - binade).clamp(-126, 126)


def power_of_two(k: Tensor) -> Tensor:
    """2^k as float32 from its bit pattern, for integer -126 <= k <= 126."""
    return ((k + 127) << 23).to(torch.int32).view(torch.float32)


@torch.library.custom_op("precscope::fake_quantise", mutates_args=())
def fake_quantise(x: Tensor, fmt: str) -> Tensor:
    """`round_scaled` forward; the gradient passes unchanged."""
    rounded, out = round_scaled(x, fmt), torch.empty_like(x)
    return rounded if rounded.stride() == out.stride() else out.copy_(rounded)


@torch.library.custom_op("precscope::quantise_gradient", mutates_args=())
def quantise_gradient(x: Tensor) -> Tensor:
    """A copy of `x` forward; the gradient is rounded to e5m2 (`round_scaled`)."""
    return x.clone()


def _same_layout(x: Tensor, fmt: str = "") -> Tensor:
    return torch.empty_like(x)


fake_quantise.register_fake(_same_layout)
fake_quantise.register_autograd(lambda ctx, grad: (grad, None))
quantise_gradient.register_fake(_same_layout)
quantise_gradient.register_autograd(lambda ctx, grad: fake_quantise(grad, "e5m2"))
