"""Gradient accumulation over K micro-batches in bf16: the accumulator must be fp32.

A sum kept in bf16 (8 significant bits) stops growing once it is 256 to 512 times one contribution: each further
addition is below half an ulp of the sum and changes nothing. So of a thousand micro-batches most are lost, unless the
bf16 gradients are added up in an fp32 buffer, which is what `main_grad` of large-scale trainers is.

    python examples/gradient_accumulation.py
"""

import tempfile

import torch
import torch.nn.functional as F
from torch import nn

import precscope as ps
from precscope.tuning.sums import measure_sums


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(8, 16, generator=torch.Generator().manual_seed(step))
    return x, 2 + x.sum(-1, keepdim=True)


def make() -> ps.Task:
    torch.manual_seed(0)
    return ps.Task(
        model=nn.Linear(16, 1),
        loss=lambda model, b: F.mse_loss(model(b[0]).float(), b[1]),
        batches=batch,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.05),
    )


def accumulate(model: nn.Module, count: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Sums over `count` micro-batches of bf16 gradients, in accumulators of `dtype`; their means in fp32."""
    sums = [torch.zeros_like(p, dtype=dtype) for p in model.parameters()]
    for index in range(count):
        x, y = batch(index)
        gradients = torch.autograd.grad(F.mse_loss(model(x.bfloat16()).float(), y), list(model.parameters()))
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient.to(dtype)
    return [s.float() / count for s in sums]


if __name__ == "__main__":
    model = make().model.bfloat16()
    print("micro-batches   mean gradient of the bias:  fp32 accumulator   bf16 accumulator")
    for count in (32, 256, 1024):
        (*_, exact), (*_, low) = accumulate(model, count, torch.float32), accumulate(model, count, torch.bfloat16)
        print(f"{count:13d}   {exact.item():44.3f}   {low.item():16.3f}")

    # The same from the tool, without writing a loop: real gradients added up in each format ...
    for fmt, sums in measure_sums(make(), 1024, limit=512).items():
        print(f"{fmt}: {'survives' if sums.survives else 'needs an fp32 accumulator'}, off by {sums.error:.1%}")

    # ... and from a recorded run: what storing these parameters (and so their gradients) in bf16 would do.
    with tempfile.TemporaryDirectory() as out:
        profile = ps.profile(make(), out=out, steps=2, every=1, accumulate=1024, precision="bf16", costs=False,
                             ops=False, shadow_every=None)  # fmt: skip
        plan = ps.recommend(profile, formats=("bf16",), policy="cast")
    reason = next(r for r in plan[""].reasons if r.code == "accumulation")
    print(f"params {plan[''].params}: {reason.text.removeprefix('params fp32: ')}")
