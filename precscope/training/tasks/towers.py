"""Two towers, a residual network and a transformer, that learn which caption belongs to which handwritten digit.

The loss is that of CLIP (Radford et al. 2021, arXiv:2103.00020): both towers give unit vectors, their products times a
learned temperature are logits, and every image has to find its caption among those of the batch, and the reverse. An
image shows one of ten digits in thin or bold ink, as its amount of ink has it; captions say so in eight ways, in bytes.

    task = make_task("towers")                 # 0.2 million parameters, twenty images and captions, all different
    accuracy(task.model, task)                 # share of the held-out images that find their own among twenty captions
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...bundled import TASKS
from ...tasks import Task
from . import digits
from .resnet import ResNet

_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_WAYS = (
    "a {ink} {name}", "the digit {name} in {ink} ink", "{ink} handwriting: {name}", "a picture of a {ink} {name}",
    "{name}, {ink}", "someone wrote {name} with a {ink} pen", "number {digit}, {ink}", "a {ink} {digit} on paper",
)  # fmt: skip
_BYTES = 40  # the longest caption fits
_KINDS = 20  # ten digits, thin or bold


@dataclass(frozen=True)
class TowersConfig:
    """groups: of twenty different images each in a batch; width, layers, heads: of the text's transformer; channels,
    depth: of the images' residual network; edge: of images."""

    groups: int = 1
    width: int = 64
    layers: int = 2
    heads: int = 4
    channels: int = 16
    depth: int = 1
    edge: int = 8


SIZES = {
    "tiny": TowersConfig(width=16, layers=1, heads=2, channels=8),
    "small": TowersConfig(),
    "medium": TowersConfig(groups=10, width=384, layers=6, heads=6, channels=64, depth=2, edge=32),
    "large": TowersConfig(groups=25, width=768, layers=12, heads=12, channels=128, depth=3, edge=64),
}


class TextTower(nn.Module):
    """Transformer encoder. Bytes [B, 40] (int64, 0 after the end) -> mean of its outputs [B, C]."""

    def __init__(self, config: TowersConfig) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, config.width)
        self.positions = nn.Parameter(torch.randn(_BYTES, config.width) * 0.1)
        nn.init.normal_(self.bytes.weight, std=0.1)
        layers = (
            nn.TransformerEncoderLayer(
                config.width, config.heads, 4 * config.width, dropout=0.0, activation="gelu", batch_first=True,
                norm_first=True,
            )
            for _ in range(config.layers)
        )  # fmt: skip
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, captions: Tensor) -> Tensor:
        mask = captions > 0
        x = self.bytes(captions) + self.positions
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~mask)
        weights = mask.unsqueeze(-1).to(x.dtype)
        return (self.norm(x) * weights).sum(1) / weights.sum(1)


class TwoTowers(nn.Module):
    """Images [B, 1, H, W] and captions [B, 40] (bytes as int64, 0 after the end) -> logits [B, B], an image a row."""

    def __init__(self, config: TowersConfig) -> None:
        super().__init__()
        self.image = ResNet(config.channels, config.depth, outputs=config.width)
        self.text = TextTower(config)
        self.text_head = nn.Linear(config.width, config.width)
        self.temperature = nn.Parameter(torch.tensor(1 / 0.07).log())  # the logarithm of its inverse

    def forward(self, images: Tensor, captions: Tensor) -> Tensor:
        a, b = self.image(images), self.text_head(self.text(captions))
        scale = self.temperature.exp().clamp(max=100.0)
        return scale * F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


def contrastive_loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy (nats) of captions given images and of images given captions; equal kinds share the target."""
    images, captions, kinds = batch
    logits = model(images, captions)
    same = (kinds[:, None] == kinds[None]).to(logits.dtype)
    targets = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def towers(size: str = "small", *, seed: int = 0) -> Task:
    """The task: batches are (images fp32 [B, 1, H, W], captions int64 [B, 40], kinds int64 [B]), where kind 0 to 19 is
    twice the digit, and one more where it is bold. Held-out batches hold each kind once, in order.

    seed: of images and captions. Raises UsageError on another size, TaskError where scikit-learn is not installed.
    """
    config = SIZES[TASKS["towers"].check(size)]
    images, kinds = _kinds()
    pictures = digits.enlarged(images, config.edge) - 0.3
    cut = digits.TRAINING
    return Task(
        model=TwoTowers(config),
        loss=contrastive_loss,
        batches=functools.partial(_batch, pictures[:cut], kinds[:cut], config.groups, seed),
        eval_batches=[_batch(pictures[cut:], kinds[cut:], 1, 2**20, step) for step in range(8)],
        forward=lambda model, batch: model(*batch[:2]),
        name=f"towers-{size}",
    )


def _kinds() -> tuple[Tensor, Tensor]:
    """All images, and of which kind each is: bold where it has more ink than the median training image of its digit."""
    images, labels = digits.load()
    ink = images.sum((1, 2, 3))
    train = torch.arange(len(labels)) < digits.TRAINING
    medians = torch.stack([ink[train & (labels == digit)].median() for digit in range(10)])
    return images, 2 * labels + (ink > medians[labels]).long()


def _batch(images: Tensor, kinds: Tensor, groups: int, seed: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    chosen = []
    for kind in list(range(_KINDS)) * groups:
        of_kind = (kinds == kind).nonzero().flatten()
        chosen.append(of_kind[torch.randint(len(of_kind), (1,), generator=generator)])
    rows = torch.cat(chosen)
    ways = torch.randint(len(_WAYS), (len(rows),), generator=generator).tolist()
    captions = torch.stack([caption(kind, way) for kind, way in zip(kinds[rows].tolist(), ways, strict=True)])
    return images[rows], captions, kinds[rows]


@functools.cache
def caption(kind: int, way: int) -> Tensor:
    """Caption of a kind of image in one of eight ways: bytes, int64 [40], 0 after the end."""
    digit, bold = divmod(kind, 2)
    words = _WAYS[way].format(name=_NAMES[digit], digit=digit, ink="bold" if bold else "thin").encode()
    return torch.tensor([*words, *[0] * (_BYTES - len(words))])
