"""Where and on what the parts run: the device, the GPT and its text, clocks, and the file that a part writes."""

from __future__ import annotations

import functools
import json
import math
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import precscope as ps
from precscope.training.tasks.gpt import GPT, GPTConfig, load_text, next_byte_loss

SIZES = {
    "tiny": GPTConfig(layers=2, width=32, heads=2, context=32, batch=4, vocabulary=512),
    "gpt2": GPTConfig(layers=12, width=768, heads=12, context=1024, batch=8, vocabulary=50304),
}
"""gpt2: 124 million parameters, the head tied to the embedding."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Setting:
    """device: where. size: of the GPT. steps: of training runs. out: where files go. result: the file that takes what
    a part finds. seconds: what the part may take. quick: least counts, for tests."""

    device: torch.device
    size: str
    steps: int
    out: Path
    result: Path
    seconds: float
    quick: bool = False
    found: dict[str, Any] = field(default_factory=dict)
    begun: float = field(default_factory=time.perf_counter)

    @property
    def cuda(self) -> bool:
        """Whether this is the real thing."""
        return self.device.type == "cuda"

    @property
    def config(self) -> GPTConfig:
        return SIZES[self.size]

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.config.batch * self.config.context

    def left(self) -> float:
        """Seconds until the part is cut off."""
        return self.seconds - (time.perf_counter() - self.begun)

    def keep(self, **found: Any) -> None:
        """Add to what the part has found; on disk at once, so that a part that is cut off leaves it."""
        self.found |= found
        write_json(self.result, self.found)

    def count(self, full: int, few: int = 2) -> int:
        """How often to repeat: `full` on a GPU, `few` in a rehearsal."""
        return full if self.cuda else few

    def task(self) -> ps.Task:
        """A new GPT on the device, of equal start each time."""
        torch.manual_seed(0)
        config = self.config
        model = GPT(config)
        model.head.weight = model.wte.weight
        text, held_out = tokens_of(config.vocabulary)
        task = ps.Task(
            model=model.to(self.device),
            loss=next_byte_loss,
            batches=functools.partial(_batch, text, config, 0),
            eval_batches=[_batch(held_out, config, 2**20, i) for i in range(self.count(8))],
            forward=lambda model, batch: model(batch[0]),
            name=f"gpt-{self.size}",
        )
        return task

    def wait(self) -> None:
        """Until the device has done its work."""
        if self.cuda:
            torch.cuda.synchronize()

    def median_ms(self, calls: dict[str, Callable[[], object]], rounds: int = 15) -> dict[str, float]:
        """Milliseconds of each call, all in turn: of CUDA events, else of the clock. Three rounds warm up."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        rounds = rounds if self.cuda else 3
        for turn in range(rounds + 3):
            for name, call in calls.items():
                spent = self.ms(call)
                if turn > 2:
                    times[name].append(spent)
        return {name: statistics.median(values) for name, values in times.items()}

    def ms(self, call: Callable[[], object]) -> float:
        """Milliseconds of one call."""
        self.wait()
        if not self.cuda:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def device_ms(self, call: Callable[[int], object], copies: int) -> tuple[float, str]:
        """Milliseconds of one call as the device alone takes them, and how: "graph", replays of a CUDA graph of call(0)
        to call(copies - 1); "calls" where there is none, the host's time for a launch included."""
        if self.cuda:
            try:
                return self.median_ms({"it": self._graph(call, copies).replay})["it"] / copies, "graph"
            except RuntimeError as error:
                print(f"no CUDA graph: {error}".splitlines()[0], flush=True)
                self.wait()

        def each() -> None:
            for i in range(copies):
                call(i)

        return self.median_ms({"it": each})["it"] / copies, "calls"

    def _graph(self, call: Callable[[int], object], copies: int) -> torch.cuda.CUDAGraph:
        """Warmed up on a stream of its own, as capturing wants it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for i in range(copies):
                call(i)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(copies):
                call(i)
        return graph

    def copy_bandwidth(self) -> float:
        """Bytes per second that a copy on the device moves, read and written together."""
        source = torch.empty((1 << 30 if self.cuda else 1 << 24) // 4, device=self.device)
        target = torch.empty_like(source)
        spent = self.median_ms({"copy": lambda: target.copy_(source)})["copy"]
        return 2 * source.numel() * 4 / (spent * 1e-3)


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(_plain(content), indent=1, default=str) + "\n", encoding="utf-8")
    temporary.replace(path)


def _plain(value: Any) -> Any:
    """Numbers that JSON lacks as null: a reader sees that there is none."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@functools.cache
def tokens_of(vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The standard library's source as tokens, (training, held out), int32: the commonest words of the training text
    have numbers of their own from 256 on, all else is spelled in bytes."""
    texts = [bytes(part.numpy()) for part in load_text()]
    pieces = re.compile(rb"\w+|[ \t]+|\n+|[^\w\s]")
    counts = Counter(w for w in pieces.findall(texts[0]) if len(w) > 1)
    known = {word: 256 + i for i, (word, _) in enumerate(counts.most_common(vocabulary - 256))}
    split = []
    for text in texts:
        ids: list[int] = []
        for word in pieces.findall(text):
            number = known.get(word)
            ids.extend(word) if number is None else ids.append(number)
        split.append(torch.tensor(ids, dtype=torch.int32))
    return split[0], split[1]


def _batch(text: torch.Tensor, config: GPTConfig, seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of `step`: int64 [batch, context] each, the targets one token further on."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(text) - config.context - 1, (config.batch,), generator=generator)
    rows = text[starts[:, None] + torch.arange(config.context + 1)].long()
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
