"""A small UNet that learns to take noise off real handwritten digits (DDPM: Ho et al. 2020, arXiv:2006.11239).

The schedule of the noise is the cosine of Nichol and Dhariwal (2021, arXiv:2102.09672); the network foretells it.
Noise and times of a step are part of its batch, drawn from (seed, step), so that a batch has one loss.

    task = make_task("diffusion")              # 0.5 million parameters, 32 images of 16 x 16
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...bundled import TASKS
from ...tasks import Task
from . import digits

_TIMES = 1000


@dataclass(frozen=True)
class UNetConfig:
    """width: channels of the outermost level, twice as many in the two inner ones; edge: of the images, in pixels."""

    width: int = 32
    edge: int = 16
    batch: int = 32


SIZES = {
    "tiny": UNetConfig(width=8, edge=8, batch=4),
    "small": UNetConfig(),
    "medium": UNetConfig(width=96, edge=32, batch=64),
    "large": UNetConfig(width=192, edge=64, batch=64),
}


class ResBlock(nn.Module):
    """Two convolutions with group norm; the time is added between. x [B, C, H, W], t [B, D] -> [B, out, H, W]."""

    def __init__(self, channels: int, out: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, channels), nn.Conv2d(channels, out, 3, padding=1)
        self.time = nn.Linear(time, out)
        self.norm2, self.conv2 = nn.GroupNorm(4, out), nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(t)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class PixelAttention(nn.Module):
    """Self-attention over pixels. x [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.qkv, self.proj = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)  # each [B, H * W, C]
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(y.transpose(1, 2).reshape(b, c, h, w))


class UNet(nn.Module):
    """Noisy images [B, 1, H, W] (H, W divisible by 4) and times [B] (int64) -> the noise in them [B, 1, H, W]."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        w, time = width, 4 * width
        self.width = width
        self.time = nn.Sequential(nn.Linear(w, time), nn.SiLU(), nn.Linear(time, time))
        self.first = nn.Conv2d(1, w, 3, padding=1)
        self.down1, self.shrink1 = ResBlock(w, w, time), nn.Conv2d(w, 2 * w, 3, 2, 1)
        self.down2, self.shrink2 = ResBlock(2 * w, 2 * w, time), nn.Conv2d(2 * w, 2 * w, 3, 2, 1)
        self.middle1, self.attention = ResBlock(2 * w, 2 * w, time), PixelAttention(2 * w)
        self.middle2 = ResBlock(2 * w, 2 * w, time)
        self.up2, self.up1 = ResBlock(4 * w, 2 * w, time), ResBlock(3 * w, w, time)
        self.norm, self.last = nn.GroupNorm(4, w), nn.Conv2d(w, 1, 3, padding=1)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.time(time_features(t, self.width))
        a = self.down1(self.first(x), time)
        b = self.down2(self.shrink1(a), time)
        c = self.middle2(self.attention(self.middle1(self.shrink2(b), time)), time)
        b = self.up2(torch.cat([F.interpolate(c, scale_factor=2.0), b], 1), time)
        a = self.up1(torch.cat([F.interpolate(b, scale_factor=2.0), a], 1), time)
        return self.last(F.silu(self.norm(a)))


def time_features(t: Tensor, width: int) -> Tensor:
    """Sines and cosines of times [B] (int64) -> fp32 [B, width], as transformers number positions."""
    rates = torch.exp(-math.log(10_000.0) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = t[:, None].float() * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


def signal_share(t: Tensor) -> Tensor:
    """Cosine schedule: share of an image's variance that is left at times t (0 to 999), fp32."""
    return (torch.cos((t.float() / _TIMES + 0.008) / 1.008 * math.pi / 2) ** 2).clamp(1e-5, 0.99999)


def noise_loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Mean squared error of the noise foretold; 1 before anything is learnt."""
    noisy, times, noise = batch
    return F.mse_loss(model(noisy, times), noise)


def diffusion(size: str = "small", *, seed: int = 0) -> Task:
    """The task: batches are (noisy images fp32 [B, 1, H, W], times int64 [B], noise fp32 [B, 1, H, W]).

    seed: of images, times and noise. Raises UsageError on another size, TaskError where scikit-learn is not installed.
    """
    config = SIZES[TASKS["diffusion"].check(size)]
    images = digits.enlarged(digits.load()[0], config.edge) * 2 - 1
    train, held_out = images[: digits.TRAINING], images[digits.TRAINING :]
    return Task(
        model=UNet(config.width),
        loss=noise_loss,
        batches=functools.partial(_batch, train, config, seed),
        eval_batches=[_batch(held_out, config, 2**20, step) for step in range(8)],
        forward=lambda model, batch: model(*batch[:2]),
        name=f"diffusion-{size}",
    )


def _batch(images: Tensor, config: UNetConfig, seed: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    clean = images[torch.randint(len(images), (config.batch,), generator=generator)]
    times = torch.randint(_TIMES, (config.batch,), generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    share = signal_share(times)[:, None, None, None]
    return share.sqrt() * clean + (1 - share).sqrt() * noise, times, noise
