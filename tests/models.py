"""Small models that exercise what a recorder and a plan must hold for."""

from __future__ import annotations

import dataclasses
from collections import namedtuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...] | None = None


class MLP(nn.Module):
    def __init__(self, width: int = 8, out: int = 4) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, out)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class SharedTwice(nn.Module):
    """One linear layer called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.layer(x))
        return self.head(x)


class Structured(nn.Module):
    """Tuples, dicts, dataclasses, namedtuples, None, integers and booleans pass between modules."""

    class Maker(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x, mask=None, *, scale=1.0):
            y = self.fc(x) * scale
            return {"pair": Pair(y, y.argmax(-1)), "mask": mask, "none": None, "list": [y > 0, (y * 2,)]}

    class Taker(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, inputs):
            return Output(logits=self.fc(inputs["pair"].first + inputs["list"][1][0]), hidden=(inputs["pair"].first,))

    def __init__(self) -> None:
        super().__init__()
        self.maker, self.taker = self.Maker(), self.Taker()

    def forward(self, x):
        made = self.maker(x, mask=torch.ones(x.shape[0], dtype=torch.bool), scale=0.5)
        return self.taker(made).logits


class InPlace(nn.Module):
    """In-place activations and views."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(8, 4)

    def forward(self, x):
        y = self.act(self.fc1(x) - 0.1) * 1.0
        left, right = y[:, :8], y[:, 8:]
        return self.fc2(left.add_(right))


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.stem, self.body, self.head, self.reentrant = nn.Linear(8, 8), MLP(8, 8), nn.Linear(8, 4), reentrant

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + checkpoint(self.body, x, use_reentrant=self.reentrant))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(8, 8), nn.Linear(8, 8, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, x):
        return self.head(torch.tanh(self.emb(x.argmax(-1))))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x):
        out, (h, c) = self.lstm(x[:, None].expand(-1, 5, -1))
        return self.head(out[:, -1] + h[0] + c[0])


class Convolutional(nn.Module):
    """A block that owns its kernel and calls F.conv2d itself; batch norm; a part without gradient."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 1, 3, 3) * 0.3)

        def forward(self, x):
            return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.kernel)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = self.Padded(), nn.BatchNorm2d(4), nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x):
        x = self.bn(self.conv(x.reshape(-1, 1, 2, 4))).mean((2, 3))
        with torch.no_grad():
            gate = torch.sigmoid(self.frozen(x))
        return self.head(x * gate)


class SparseEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(8, 8, sparse=True), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.emb(x.argmax(-1)))


class EmptyTensors(nn.Module):
    """Hands an empty tensor and a scalar through modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.id = nn.Linear(8, 8), nn.Linear(8, 4), nn.Identity()

    def forward(self, x):
        empty = self.id(self.a(x[:0]))
        scale = self.id(self.a(x).mean())
        return self.b(torch.cat([empty, self.a(x)]) * scale)


ALL = {
    "mlp": MLP,
    "shared": SharedTwice,
    "structured": Structured,
    "in_place": InPlace,
    "checkpoint": lambda: Checkpointed(reentrant=False),
    "checkpoint_reentrant": lambda: Checkpointed(reentrant=True),
    "tied": Tied,
    "lstm": Recurrent,
    "conv": Convolutional,
    "sparse": SparseEmbedding,
    "empty": EmptyTensors,
}


def batch(step: int, size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [size, 8] and labels [size] of a step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 8, generator=generator), torch.randint(0, 4, (size,), generator=generator)


def loss_of(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(data[0]), data[1])
