"""What the callbacks of the integrations cost beside ps.record by hand, in the same trainer on the same work.

    python benchmarks/callbacks.py [--steps 60] [--every 10] [--rounds 9] [--only transformers] [--json OUT]

Within one process, in turns: a trainer unwatched, watched by ps.record from a callback of five lines, and watched by
the integration's RecordCallback. The trainer's own cost is in all three. The clock runs from the first batch to the end
of the last one's step: directories are written at the end, outside it. The model is GPT-2's (4 layers, width 256) in
Hugging Face's Trainer and in Lightning's, and an MLP in Keras, where ps.record cannot see the layers: there only the
overhead is told. The target: RecordCallback takes at most 1.02 times as long per step as ps.record by hand.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from common import Target, check, spread, turns, write_json

import precscope as ps

LIMIT = 1.02
BATCH, CONTEXT = 8, 64
Ways = dict[str, Callable[[Path], float]]  # what runs in a fresh directory; seconds


class Clock:
    """begin, end: called at the first batch and after each step; the time between the first and the last call."""

    def __init__(self) -> None:
        self.first = self.last = 0.0

    def begin(self) -> None:
        self.first = self.first or time.perf_counter()

    def end(self) -> None:
        self.last = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.last - self.first


def gpt2() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    shape = {"vocab_size": 256, "n_positions": CONTEXT, "n_embd": 256, "n_layer": 4, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**shape, **none, bos_token_id=0, eos_token_id=0))


def rows(steps: int) -> torch.Tensor:
    return torch.randint(0, 256, (steps * BATCH, CONTEXT), generator=torch.Generator().manual_seed(0))


def transformers_ways(steps: int, every: int) -> Ways:
    """Hugging Face's Trainer."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    from precscope.integrations.transformers import RecordCallback

    data = [{"input_ids": row, "labels": row} for row in rows(steps)]

    class Timed(TrainerCallback):
        def __init__(self) -> None:
            self.clock = Clock()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.clock.end()

    class ByHand(TrainerCallback):
        def __init__(self, out: Path) -> None:
            self.out = out

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self.recorder = ps.record(given["model"], self.out, optimizer=given["optimizer"], every=every).__enter__()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.recorder.step()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.recorder.__exit__(None, None, None)

    def run(folder: Path, *callbacks: TrainerCallback) -> float:
        timed = Timed()
        settings = {"max_steps": steps, "per_device_train_batch_size": BATCH, "use_cpu": True, "report_to": []}
        quiet = {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False}
        trainer = Trainer(
            gpt2(), TrainingArguments(str(folder / "trainer"), **settings, **quiet), train_dataset=data,
            callbacks=[*callbacks, timed],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return timed.clock.seconds

    return {
        "unwatched": run,
        "ps.record": lambda folder: run(folder, ByHand(folder / "run")),
        "RecordCallback": lambda folder: run(folder, RecordCallback(folder / "run", every=every)),
    }


def lightning_ways(steps: int, every: int) -> Ways:
    """Lightning's Trainer."""
    from lightning.pytorch import Callback, LightningModule, Trainer
    from torch.utils.data import DataLoader

    from precscope.integrations.lightning import RecordCallback

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Timed(Callback):
        def __init__(self) -> None:
            self.clock = Clock()

        def on_train_batch_start(self, *_: Any) -> None:
            self.clock.begin()

        def on_train_batch_end(self, *_: Any) -> None:
            self.clock.end()

    class ByHand(Callback):
        def __init__(self, out: Path) -> None:
            self.out = out

        def on_train_start(self, trainer: Any, module: Any) -> None:
            self.recorder = ps.record(module, self.out, optimizer=trainer.optimizers, every=every).__enter__()

        def on_train_batch_end(self, *_: Any) -> None:
            self.recorder.step()

        def on_train_end(self, *_: Any) -> None:
            self.recorder.__exit__(None, None, None)

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = gpt2()

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            return self.net(input_ids=batch, labels=batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.net.parameters(), lr=1e-3)

    def run(folder: Path, *callbacks: Callback) -> float:
        timed = Timed()
        quiet = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
        )  # fmt: skip
        trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[*callbacks, timed], **quiet)
        trainer.fit(Module(), DataLoader(rows(steps), batch_size=BATCH))
        return timed.clock.seconds

    return {
        "unwatched": run,
        "ps.record": lambda folder: run(folder, ByHand(folder / "run")),
        "RecordCallback": lambda folder: run(folder, RecordCallback(folder / "run", every=every)),
    }


def keras_ways(steps: int, every: int) -> Ways:
    """Keras's fit on torch. The first call builds the model: steps are timed from the third on."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    from precscope.integrations.keras import RecordCallback

    class Timed(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.clock = Clock()

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            if batch >= 2:
                self.clock.begin()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.clock.end()

    x = torch.randn(steps * 64, 256, generator=torch.Generator().manual_seed(0)).numpy()

    def run(folder: Path, *callbacks: Any) -> float:
        keras.utils.set_random_seed(0)
        layers = [keras.layers.Dense(512, activation="relu") for _ in range(6)]
        model = keras.Sequential([keras.layers.Input((256,)), *layers, keras.layers.Dense(10)])
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        timed = Timed()
        model.fit(x, x[:, :10].argmax(1), batch_size=64, verbose=0, callbacks=[*callbacks, timed])
        return timed.clock.seconds

    return {
        "unwatched": run,
        "RecordCallback": lambda folder: run(folder, RecordCallback(folder / "run", every=every)),
    }


UNTIMED = {"keras": 2}
"""Steps before the clock begins."""
PACKAGES = {
    "transformers": ("transformers", "accelerate"),
    "lightning": ("lightning", "transformers"),
    "keras": ("keras",),
}
FRAMEWORKS = {"transformers": transformers_ways, "lightning": lightning_ways, "keras": keras_ways}


def measure(ways: Ways, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, a list of rounds; a first round warms up."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as name:
        for index, order in enumerate(turns(list(ways), rounds + 1)):
            for way in order:
                gc.collect()
                seconds = ways[way](Path(name, f"{index} {way}"))
                if index:
                    times[way].append(seconds)
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=FRAMEWORKS, action="append")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    found, targets = [], []
    print(f"{'trainer':<13} {'way':<15} {'ms per step':>12} {'over unwatched':>26} {'over ps.record':>26}")
    for framework in given.only or FRAMEWORKS:
        missing = [name for name in PACKAGES[framework] if find_spec(name) is None]
        if missing:
            print(f"{framework:<13} left out: {', '.join(missing)} is not installed")
            continue
        times = measure(FRAMEWORKS[framework](given.steps, given.every), given.rounds)
        for way, seconds in times.items():
            over = {
                other: spread([a / b for a, b in zip(seconds, times[other], strict=True)])
                for other in ("unwatched", "ps.record")
                if other in times and other != way
            }
            step = 1e3 * spread(seconds).median / (given.steps - UNTIMED.get(framework, 0))
            cells = [str(over.get(other, "")) for other in ("unwatched", "ps.record")]
            print(f"{framework:<13} {way:<15} {step:>12.2f} {cells[0]:>26} {cells[1]:>26}", flush=True)
            ratios = {f"over {other}": value.__dict__ for other, value in over.items()}
            found.append({"trainer": framework, "way": way, "ms_per_step": step, **ratios})
            if way == "RecordCallback" and "ps.record" in over:
                ratio = over["ps.record"].median
                targets.append(Target(f"{framework}: RecordCallback over ps.record", ratio, LIMIT))
    check(targets)
    write_json(given.json, "callbacks", found, targets=targets, steps=given.steps, every=given.every)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
