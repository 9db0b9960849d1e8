"""A byte-level GPT on real text that every Python has: the source of its standard library.

Bytes are the vocabulary (256), so there is no tokenizer and nothing to download. About ten megabytes of code and prose
by many hands; whole files are held out for evaluation, chosen by a hash of their path. The batch of a step is drawn
from (seed, step) alone: every run of a comparison reads the same text.

    task = gpt()                           # 3.3 million parameters, batches of 8 x 256: minutes on two CPU cores
    task = gpt(size="medium")              # 86 million, 8 x 1024: for a GPU
"""

from __future__ import annotations

import functools
import hashlib
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ...bundled import TASKS
from ...errors import TaskError
from ...tasks import Task

_SKIPPED = {"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "encodings", "__pycache__"}
_HELD_OUT_SHARE = 10  # one file in so many


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT. width: of the residual stream; context: bytes seen at once; batch: sequences per batch."""

    layers: int = 4
    width: int = 256
    heads: int = 4
    context: int = 256
    batch: int = 8
    vocabulary: int = 256


SIZES = {
    "tiny": GPTConfig(layers=2, width=32, heads=2, context=32, batch=4),
    "small": GPTConfig(),
    "medium": GPTConfig(layers=12, width=768, heads=12, context=1024),
    "large": GPTConfig(layers=24, width=1024, heads=16, context=1024, batch=16),
}


class Attention(nn.Module):
    """Causal self-attention. x [B, T, C] -> [B, T, C]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)  # each [B, H, T, C/H]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(b, t, c))


class MLP(nn.Module):
    """Feed-forward layer four times as wide. x [B, T, C] -> [B, T, C]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, 4 * config.width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * config.width, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-LN transformer block (Xiong et al. 2020, arXiv:2002.04745)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(config.width)
        self.attn = Attention(config)
        self.ln2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    """Bytes [B, T] (int64) -> logits of the next byte [B, T, 256]. The head is not tied to the embedding."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocabulary, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        initialise(self, config.layers)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.wte(tokens) + self.wpe(positions)  # [B, T, C]
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x))


def initialise(model: nn.Module, layers: int) -> None:
    """GPT-2's: normal(0, 0.02), layers that write to the residual stream divided by sqrt(2 * layers)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            into_stream = name.endswith(("attn.proj", "mlp.fc2"))
            nn.init.normal_(module.weight, std=0.02 / (2 * layers) ** 0.5 if into_stream else 0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def next_byte_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy (nats per byte) of the next byte, as users write it: autocast computes it in fp32."""
    tokens, targets = batch
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def gpt(size: str = "small", *, seed: int = 0) -> Task:
    """The task: size "tiny" (for tests), "small" (4 layers, 256 wide), "medium" (12, 768) or "large" (24, 1024).

    seed: of the batches; the parameters are drawn from torch's global generator.
    Raises UsageError on another size, TaskError where this Python has no source of its standard library.
    """
    config = SIZES[TASKS["gpt"].check(size)]
    text, held_out = load_text()
    return Task(
        model=GPT(config),
        loss=next_byte_loss,
        batches=functools.partial(draw, text, config, seed),
        eval_batches=[draw(held_out, config, 2**20, step) for step in range(8)],
        forward=lambda model, batch: model(batch[0]),
        name=f"gpt-{size}",
    )


def draw(text: torch.Tensor, config: GPTConfig, seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of `step`: int64 [batch, context] each, the targets one byte further on."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(text) - config.context, (config.batch,), generator=generator)
    rows = text[starts[:, None] + torch.arange(config.context + 1)].long()
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


@functools.cache
def load_text() -> tuple[torch.Tensor, torch.Tensor]:
    """The standard library's source, (training, held out), uint8 [bytes] each. Read once per process.

    Files come in the order of their paths, each after a line with its name; a file is held out when the hash of its
    path says so, whatever the others are. Raises TaskError where there is no source (a Python packed in a zip file).
    """
    root = Path(sysconfig.get_path("stdlib"))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in source_files(root):
        name = path.relative_to(root).as_posix()
        parts[is_held_out(name)].append(f"# {name}\n".encode() + path.read_bytes() + b"\n")
    train, held_out = (b"".join(p) for p in parts)
    if len(train) < 100_000 or len(held_out) < 10_000:
        raise TaskError(
            f"no source of the standard library in {root}: the gpt task reads Python's own .py files; install a Python "
            "that has them, or give a task of your own (path/to/file.py:function)"
        )
    return _as_bytes(train), _as_bytes(held_out)


def _as_bytes(text: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)  # a bytearray, for a tensor that may be written to


def source_files(root: Path) -> list[Path]:
    """The .py files below `root` in the order of their paths, without tests, installed packages and codec tables."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in _SKIPPED]  # installed packages can be very many files
        found += [Path(folder, f) for f in files if f.endswith(".py")]
    return sorted(found, key=lambda p: p.relative_to(root).as_posix())


def is_held_out(name: str) -> bool:
    """Whether the file of this relative path is kept for evaluation: one in ten, by a hash of the path."""
    return hashlib.sha256(name.encode()).digest()[0] % _HELD_OUT_SHARE == 0
