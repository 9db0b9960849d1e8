"""fp16 training that works: fp32 master weights and a dynamic loss scale (Micikevicius et al. 2018, arXiv:1710.03740).

Arithmetic and gradients are fp16, but the optimizer steps a copy of the weights in fp32, and the loss is multiplied by
a scale before the backward pass so that small gradients do not fall below 6e-8, the smallest number of fp16. The scale
halves when a gradient overflows (that step is skipped) and doubles after `INTERVAL` good steps.

The same recipe comes with the trainer: ps.train(task, precision="fp16").

    python examples/fp16_master_weights.py
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

import precscope as ps

STEPS, INTERVAL, WEIGHT = 300, 50, 1e-6  # WEIGHT: of the loss, as when it is a mean over very many pixels


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
    return x, x[:, :4].argmax(-1)  # the class is the largest of four inputs


def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return WEIGHT * F.cross_entropy(model(x).float(), y)


def train(model: nn.Module, *, half: bool, scaled: bool) -> dict[str, float]:
    """SGD on `model`; where `half`, forward and backward run on an fp16 copy of it."""
    work = copy.deepcopy(model).half() if half else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 / WEIGHT, momentum=0.9)
    scale, good, skipped = (2.0**40 if scaled else 1.0), 0, 0
    for step in range(STEPS):
        x, y = batch(step)
        (scale * loss_of(work, x.half() if half else x, y)).backward()
        if step == 0:
            flushed = float(torch.cat([(p.grad == 0).flatten() for p in work.parameters()]).float().mean())
        grads = [p.grad.float() / scale for p in work.parameters()]  # unscaled in fp32, before anything looks at them
        finite = all(bool(torch.isfinite(g).all()) for g in grads)
        if finite:
            for parameter, grad in zip(model.parameters(), grads, strict=True):
                parameter.grad = grad
            optimizer.step()
        if scaled:  # dynamic: as large as gradients bear
            good, skipped = (good + 1, skipped) if finite else (0, skipped + 1)
            scale = scale / 2 if not finite else scale * 2 if good % INTERVAL == 0 else scale
        work.zero_grad()
        if half:
            with torch.no_grad():  # the fp16 copy follows its fp32 master
                for low, high in zip(work.parameters(), model.parameters(), strict=True):
                    low.copy_(high)
    with torch.no_grad():
        x, y = batch(10_000)
        loss = float(F.cross_entropy(work(x.half() if half else x).float(), y))
    return {"loss": loss, "flushed": flushed, "scale": scale, "skipped": skipped}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))


if __name__ == "__main__":
    exact = train(network(), half=False, scaled=False)
    mixed = train(network(), half=True, scaled=True)
    bare = train(network(), half=True, scaled=False)
    print(f"fp32                                    loss {exact['loss']:.4f}")
    exponent = math.log2(mixed["scale"])
    print(f"fp16, master weights, dynamic scale     loss {mixed['loss']:.4f}  scale 2^{exponent:.0f}", end="")
    print(f"  skipped {mixed['skipped']}")
    print(f"fp16, master weights, no scale          loss {bare['loss']:.4f}  {bare['flushed']:.0%} of gradients are 0")
    task = ps.Task(model=network(), loss=lambda model, b: loss_of(model, *b), batches=batch,
                   optimizer=lambda params: torch.optim.SGD(params, lr=0.1 / WEIGHT, momentum=0.9))  # fmt: skip
    result = ps.train(task, steps=STEPS, precision="fp16", schedule="none", grad_clip=None)
    print(f"the trainer's precision='fp16'          loss {result.train_loss / WEIGHT:.4f}  (over the last ten steps)")
