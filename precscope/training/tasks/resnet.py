"""A residual network with batch norm on real handwritten digits: which digit is it?

task = make_task("resnet")                 # 0.08 million parameters, 64 images of 8 x 8: 95% right after 60 steps
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor, nn

from ...bundled import TASKS
from ...tasks import Task
from . import digits
from .classifying import classification_loss


@dataclass(frozen=True)
class ResNetConfig:
    """width: channels of the first stage, doubled by each of the next two; depth: blocks per stage; edge: of images."""

    width: int = 16
    depth: int = 1
    batch: int = 64
    edge: int = 8


SIZES = {
    "tiny": ResNetConfig(width=8, batch=16),
    "small": ResNetConfig(),
    "medium": ResNetConfig(width=64, depth=2, batch=128, edge=32),
    "large": ResNetConfig(width=128, depth=3, batch=256, edge=64),
}


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm, in-place as such networks are written. NCHW."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Conv2d(channels, out, 1, stride, bias=False) if stride > 1 or channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.down(x)
        return self.relu(y)


class ResNet(nn.Module):
    """Images [B, 1, H, W] -> logits [B, outputs]."""

    def __init__(self, width: int = 16, depth: int = 1, *, outputs: int = 10) -> None:
        super().__init__()
        w = width
        self.stem, self.bn = nn.Conv2d(1, w, 3, 1, 1, bias=False), nn.BatchNorm2d(w)
        self.relu = nn.ReLU(inplace=True)
        blocks, channels = [], w
        for out, stride in ((w, 1), (2 * w, 2), (4 * w, 2)):
            for index in range(depth):
                blocks.append(ResidualBlock(channels, out, stride if index == 0 else 1))
                channels = out
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(4 * w, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.relu(self.bn(self.stem(x)))).mean((2, 3)))


def resnet(size: str = "small", *, seed: int = 0) -> Task:
    """The task: batches are (images fp32 [B, 1, H, W], digits int64 [B]). seed: of which images a batch holds.

    Raises UsageError on another size, TaskError where scikit-learn is not installed.
    """
    config = SIZES[TASKS["resnet"].check(size)]
    images, labels = digits.load()
    held_out = slice(digits.TRAINING, None)
    return Task(
        model=ResNet(config.width, config.depth),
        loss=classification_loss,
        batches=functools.partial(_batch, images, labels, config, seed),
        eval_batches=[(_prepared(images[held_out], config), labels[held_out])],
        forward=lambda model, batch: model(batch[0]),
        name=f"resnet-{size}",
    )


def _batch(images: Tensor, labels: Tensor, config: ResNetConfig, seed: int, step: int) -> tuple[Tensor, Tensor]:
    chosen = digits.drawn(config.batch, seed, step)
    return _prepared(images[chosen], config), labels[chosen]


def _prepared(images: Tensor, config: ResNetConfig) -> Tensor:
    return digits.enlarged(images, config.edge) - 0.3  # about their mean
