"""Small models whose weights grow on purpose until some op leaves the range of fp16; and a noisy healthy one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from precscope.tasks import Task
from precscope.training.guard import read_events

STEPS = 80
FROM = 25  # the step from which weights grow


class MiddleLinear(nn.Module):
    """A linear layer in the middle whose output leaves fp16; a norm after it takes the size away again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.wide, self.norm, self.head = (
            nn.Linear(16, 32), nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 4),
        )  # fmt: skip

    def forward(self, x):
        return self.head(self.norm(self.wide(F.gelu(self.first(x)))))

    def grow(self):
        for parameter in self.wide.parameters():
            parameter.mul_(2.0).clamp_(-3e5, 3e5)


class Attention(nn.Module):
    """Attention that brings its logits to at most 1 itself: their matrix product is what overflows."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        logits = self.query(x) @ self.key(x).transpose(-1, -2)
        return F.softmax(logits / (1 + logits.detach().abs().amax()), -1) @ self.value(x)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention, self.head = nn.Linear(4, 16), Attention(), nn.Linear(16, 4)

    def forward(self, x):
        x = self.embed(x.reshape(-1, 4, 4))
        return self.head((x + self.attention(x)).mean(1))

    def grow(self):
        for layer in (self.attention.query, self.attention.key):
            layer.weight.mul_(1.4).clamp_(-400, 400)


class Normalised(nn.Module):
    """x over its own size, in the dtype of x. The mean of squares overflows, x / inf is 0, and nothing is ever inf in
    the loss: fp16 fails in silence."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gain, self.out = nn.Linear(16, 32), nn.Parameter(torch.ones(32)), nn.Linear(32, 4)

    def forward(self, x):
        x = self.inner(x)
        return self.out(x / (x * x).mean(-1, keepdim=True).sqrt() * self.gain)


class SumOfSquares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), Normalised())

    def forward(self, x):
        return self.body(x)

    def grow(self):
        for parameter in self.body[2].inner.parameters():
            parameter.mul_(1.5).clamp_(-2000, 2000)


class Stream(nn.Module):
    """A residual stream whose two blocks leave the range one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.left, self.right, self.head = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        x = self.embed(x)
        x = x + self.left(torch.tanh(x))
        x = x + self.right(torch.tanh(x))
        return self.head(F.layer_norm(x, (16,)))[:, :4]

    def grow(self):
        for layer in (self.left, self.right):
            for parameter in layer.parameters():
                parameter.mul_(1.6).clamp_(-1.2e4, 1.2e4)


class Keeping(nn.Linear):
    """Leaves what it returns in an attribute, where a plan cannot see it taken."""

    def forward(self, x):
        self.kept = super().forward(x)
        return self.kept


class Joined(nn.Module):
    """Two branches leave the range at the same step, and cat joins them."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(64, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(2))

    def forward(self, x):
        parts = [norm(layer(x)) for norm, layer in zip(self.norms, (self.left, self.right), strict=True)]
        return self.head(torch.cat(parts, -1))

    def grow(self):
        for layer in (self.left, self.right):
            layer.weight.mul_(1.8).clamp_(-2e5, 2e5)


class JoinedUnseen(Joined):
    """Joins what the branches keep: torch.autocast in fp16 cannot join bf16 with fp16, so that bf16 will not do."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Keeping(16, 32), Keeping(16, 32)

    def forward(self, x):
        self.left(x), self.right(x)
        return self.head(F.layer_norm(torch.cat([self.left.kept, self.right.kept], -1), (64,)))


class Scales(nn.Module):
    """Its output, in fp16, is what the loss squares: code outside every module overflows."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.project = nn.Sequential(nn.Linear(16, 32), nn.Tanh()), nn.Linear(32, 4)

    def forward(self, x):
        return self.project(self.body(x))

    def grow(self):
        self.project.weight.mul_(1.4).clamp_(-500, 500)


def relative_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Of outputs over their own size, which is taken in the dtype that they come in."""
    out = model(batch[0])
    out = out / (out * out).sum(-1, keepdim=True).sqrt()
    return F.mse_loss(out.float(), F.normalize(batch[1], dim=-1))


class EarlySquares(SumOfSquares):
    """Overflows in silence soon after the first comparison with fp32, when nothing is known yet of what is usual."""

    since = 12


CASES: dict[str, tuple[type, str]] = {
    "middle": (MiddleLinear, "wide"),
    "attention": (Attending, "attention"),
    "squares": (SumOfSquares, "body.2"),
    "stream": (Stream, "left"),
    "joined": (Joined, "left"),
    "joined unseen": (JoinedUnseen, "left"),
    "early": (EarlySquares, "body.2"),
}
"""Name -> model and the module at fault."""


def growing(name: str, *, seed: int = 0, after: Callable[[nn.Module, int], None] | None = None) -> Task:
    """A regression with one of the models; its weights grow from step FROM on. after: more to do after each step."""
    torch.manual_seed(seed)
    model = CASES[name][0]()
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(16, 4, generator=draw)
    inputs = [torch.randn(32, 16, generator=draw) for _ in range(8)]
    batches = [(x, torch.tanh(x @ weight)) for x in inputs]

    def step_done(model: nn.Module, step: int) -> None:
        if step >= getattr(model, "since", FROM):
            with torch.no_grad():
                model.grow()
        if after is not None:
            after(model, step)

    return Task(
        model=model, loss=lambda model, batch: F.mse_loss(model(batch[0]).float(), batch[1]), batches=batches,
        eval_batches=batches, after_step=step_done,
    )  # fmt: skip


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 1))

    def forward(self, x):
        return self.body(x)


def noisy(seed: int, *, heavy: bool) -> Task:
    """Four samples a batch, and noise that is now and then a hundred times as large (Cauchy)."""
    torch.manual_seed(seed)

    def batch(step):
        draw = torch.Generator().manual_seed(seed * 100003 + step)
        x, noise = torch.randn(4, 8, generator=draw), torch.randn(4, 1, generator=draw)
        return x, x.sum(1, keepdim=True) + (
            noise / (torch.randn(4, 1, generator=draw).abs() + 0.05) if heavy else noise
        )

    return Task(model=Noisy(), loss=lambda model, b: F.mse_loss(model(b[0]).float(), b[1]), batches=batch)


RUN = {"steps": STEPS, "lr": 3e-3}


def parameters(task: Task) -> torch.Tensor:
    return nn.utils.parameters_to_vector(task.model.parameters()).detach().clone()


def actions(out: str | Path) -> list[tuple[str, str, str]]:
    return [(e.kind, e.action, e.module) for e in read_events(out)]
