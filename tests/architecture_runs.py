"""A few training steps of an architecture, watched or not, and what was to be seen of them: told by hooks of torch
alone, so that it can tell what a recorder missed."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from architectures import Architecture
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

STEPS = 3
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALE = 2.0**4  # DETR's gradients leave fp16 at 2**6


@dataclass
class Run:
    """losses: float [steps]. gradients: of each step, by parameter. weights: parameters and buffers at the end. learnt:
    whether they changed (a GradScaler may skip steps)."""

    losses: list[Tensor] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    learnt: bool = False

    def differs(self, other: Run) -> str:
        """Where the other run is not equal bit for bit; "" where it is."""
        for step, (a, b) in enumerate(zip(self.losses, other.losses, strict=True)):
            if not equal(a, b):
                return f"the loss of step {step}: {a.item()!r} and {b.item()!r}"
            mine, theirs = self.gradients[step], other.gradients[step]
            if mine.keys() != theirs.keys():
                return f"which parameters have a gradient: {sorted(mine.keys() ^ theirs.keys())[:3]}"
            if wrong := [name for name in mine if not equal(mine[name], theirs[name])]:
                return f"the gradient of {wrong[0]} and {len(wrong) - 1} more in step {step}"
        if wrong := [name for name in self.weights if not equal(self.weights[name], other.weights[name])]:
            return f"{wrong[0]} and {len(wrong) - 1} more after training"
        return ""


@dataclass
class Seen:
    """Of one module and direction: elements that passed and their largest finite magnitude."""

    elements: int = 0
    amax: float = 0.0

    def add(self, x: Tensor, divisor: float = 1.0) -> None:
        values = x.detach().double().abs()
        self.elements += x.numel()
        values = values[values.isfinite()] / divisor
        self.amax = max(self.amax, values.max().item() if values.numel() else 0.0)


class Reference:
    """What a recorder is to see of a model, by hooks on the leaf modules and on what they return.

    forward, backward: leaf module -> Seen, of floating outputs and of the gradients that arrive at them. parameters:
    names whose gradient was computed. scale: the loss scale of the step.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.scale = model, 1.0
        self.forward: dict[str, Seen] = defaultdict(Seen)
        self.backward: dict[str, Seen] = defaultdict(Seen)
        self.parameters: set[str] = set()

    def __enter__(self) -> Reference:
        self.handles = [
            module.register_forward_hook(self._hook(name))
            for name, module in self.model.named_modules()
            if next(module.children(), None) is None
        ]
        return self

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for y in {
                id(x): x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()
            }.values():
                self.forward[name].add(y)
                if y.requires_grad:
                    y.register_hook(lambda g: self.backward[name].add(g, self.scale))

        return hook

    def step(self) -> None:
        """Before the optimizer forgets the gradients."""
        self.parameters |= {name for name, p in self.model.named_parameters() if p.grad is not None}

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()


def built(architecture: Architecture) -> nn.Module:
    """A new model, in training mode, its weights the same each time."""
    seed(0)
    return architecture.build().train()


def seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value)  # masks of speech models are drawn from it
    torch.manual_seed(value)


def train(
    architecture: Architecture,
    model: nn.Module,
    precision: str = "fp32",
    *,
    watch: Callable[[nn.Module, Any, Any], AbstractContextManager] | None = None,
    reference: Reference | None = None,
) -> Run:
    """STEPS steps as a user would write them. fp16 has a GradScaler."""
    dtype = PRECISIONS[precision]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16", init_scale=SCALE)
    run, start = Run(), [p.detach().clone() for p in model.parameters()]
    seed(1)
    with watch(model, optimizer, scaler) if watch else nullcontext() as rec, reference or nullcontext():
        for step in range(STEPS):
            with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                loss = architecture.loss(model, architecture.batch(model, step))
            if reference is not None:
                reference.scale = scaler.get_scale()
            scaler.scale(loss).backward()
            run.losses.append(loss.detach().clone())
            run.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            if reference is not None:
                reference.step()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if rec is not None:
                rec.step()
    run.learnt = not all(equal(a, b) for a, b in zip(start, model.parameters(), strict=True))
    run.weights = {n: x.detach().clone() for n, x in [*model.named_parameters(), *model.named_buffers()]}
    return run


def equal(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    a, b = a.detach(), b.detach()
    return (
        a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0.5), b.nan_to_num(0.5))
    )
