"""What watching costs, beside the tools people would use instead: the demo GPT or a ResNet, all in turn in one run.

    python benchmarks/peers.py [gpt resnet] [--steps 20] [--precision fp32 bf16] [--only NAME ...] [--json OUT]

Each tool watches a model of its own; all models start equal, see the same batches and take single training steps in
turn, so that a change in the machine's speed meets all alike. The ratio is of mean step times to the unwatched one of
the same run (median of the steps for tools that treat every step alike; for every=10 and every=100 the mean over a
whole cycle). The column beside it says what each tool records in such a step. A tool whose package is missing is left
out and named.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from realmodels import TASKS, Missing
from torch import nn

import precscope as ps

WARM_UP = 3
Hooks = Callable[[torch.Tensor], object]


class ToolMissing(Exception):
    """A tool's package is not installed."""


@contextmanager
def hooked(model: nn.Module, see: Hooks) -> Iterator[None]:
    """`see` called with each output tensor of each leaf module, and with its gradient."""

    def forward(module: nn.Module, args: Any, output: Any) -> None:
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                see(tensor.detach())
                if tensor.requires_grad:
                    tensor.register_hook(lambda grad: (see(grad.detach()), None)[1])

    handles = [m.register_forward_hook(forward) for m in model.modules() if not list(m.children())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def exponents(x: torch.Tensor) -> torch.Tensor:
    """An exponent histogram by torch operations."""
    _, exponent = torch.frexp(x.float())
    return torch.bincount((exponent.flatten() + 200).clamp_(0, 400), minlength=401)


@contextmanager
def underflow_overflow(model: nn.Module) -> Iterator[None]:
    """Hugging Face's detector: forward only, extremes of weights, inputs and outputs, stops at the first inf or NaN."""
    try:
        from transformers.debug_utils import DebugUnderflowOverflow
    except ImportError as error:
        raise ToolMissing("transformers is not installed") from error
    DebugUnderflowOverflow(model)
    yield  # its hooks stay; the model is its own


@contextmanager
def debug_mode(model: nn.Module) -> Iterator[None]:
    """PyTorch's own log of every op, without values."""
    try:
        from torch.utils._debug_mode import DebugMode
    except ImportError as error:
        raise ToolMissing("this torch has no DebugMode") from error
    with DebugMode():
        yield


EVERY_STEP: dict[str, tuple[str, Callable[[nn.Module], AbstractContextManager[Any]]]] = {
    "amax hook, .item()": (
        "one maximum per output and gradient",
        lambda model: hooked(model, lambda x: x.abs().max().item()),
    ),
    "torch.histc hooks": (
        "64 linear bins per output and gradient, as loggers do",
        lambda model: hooked(model, lambda x: torch.histc(x.float(), bins=64)),
    ),
    "frexp hooks": (
        "exponent histogram per output and gradient, by torch operations",
        lambda model: hooked(model, exponents),
    ),
    "DebugUnderflowOverflow": ("extremes of weights, inputs, outputs; forward only", underflow_overflow),
    "detect_anomaly": (
        "NaN in a gradient, and the forward line",
        lambda model: torch.autograd.detect_anomaly(check_nan=True),
    ),
    "DebugMode": ("a log of ops, no values", debug_mode),
}
RECORDED = "histogram, extremes, sums of inputs, outputs, weights, gradients, updates, optimizer state"


class Loop:
    """One model in training, watched by one tool."""

    def __init__(self, name: str, model_name: str, precision: str, folder: Path) -> None:
        self.name, self.task = name, TASKS[model_name]()
        self.model = self.task.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.low = precision != "fp32"
        self.step, self.recorder, self.around = 0, None, None
        self.held = contextlib.ExitStack()  # what is put on the model once
        self.times: list[float] = []
        if name.startswith("precscope every="):
            every = int(name.split("=")[1])
            self.recorder = ps.record(
                self.model, folder / name.replace(" ", "-"), optimizer=self.optimizer, every=every
            )
            self.recorder.__enter__()
        elif name == "precscope ops":
            self.around = lambda model: _ops(model)
        elif name in ("detect_anomaly", "DebugMode"):
            self.around = EVERY_STEP[name][1]
        elif name != "unwatched":
            self.held.enter_context(EVERY_STEP[name][1](self.model))

    def one_step(self) -> None:
        """Take a training step, and note its seconds."""
        batch = self.task.batch(self.step)
        start = time.perf_counter()
        with contextlib.ExitStack() as stack:
            if self.around is not None:
                stack.enter_context(self.around(self.model))
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.low):
                loss = self.task.loss(self.model, batch)
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.recorder is not None:
            self.recorder.step()
        self.times.append(time.perf_counter() - start)
        self.step += 1

    def close(self) -> None:
        """End watching."""
        self.held.close()


def _ops(model: nn.Module) -> AbstractContextManager[Any]:
    from precscope.recording.ops import record_ops

    return record_ops(model)


def measure(model_name: str, precision: str, steps: int, only: list[str]) -> dict[str, Any]:
    """Seconds per step and ratio of each tool. Raises Missing where the model's package is not installed."""
    names = ["unwatched", "precscope every=1", "precscope every=10", "precscope ops", *EVERY_STEP]
    names = [n for n in names if not only or n == "unwatched" or any(o in n for o in only)]
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        loops: dict[str, Loop] = {}
        for name in names:
            try:
                loops[name] = Loop(name, model_name, precision, Path(folder))
            except ToolMissing as error:
                missing[name] = str(error)
        for turn in range(steps + WARM_UP):
            for name, loop in loops.items():
                with contextlib.redirect_stdout(io.StringIO()) if name == "DebugUnderflowOverflow" else nullcontext():
                    loop.one_step()
            if turn == WARM_UP - 1:
                for loop in loops.values():
                    loop.times.clear()
        for loop in loops.values():
            loop.close()
    base = statistics.median(loops["unwatched"].times)
    mean = statistics.fmean(loops["unwatched"].times)
    found = {}
    for name, loop in loops.items():
        whole = name == "precscope every=10"
        ratio = statistics.fmean(loop.times) / mean if whole else statistics.median(loop.times) / base
        records = RECORDED if "every" in name else EVERY_STEP.get(name, ("", None))[0]
        records = "the same of every op" if name == "precscope ops" else records
        found[name] = {"ratio": ratio, "ms": 1e3 * statistics.median(loop.times), "records": records}
    return {"model": model_name, "precision": precision, "steps": steps, "tools": found, "missing": missing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["gpt", "resnet"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = []
    for model in options.models:
        for precision in options.precision:
            try:
                one = measure(model, precision, options.steps, options.only)
            except Missing as missing:
                print(f"{model}: skipped, {missing}")
                continue
            found.append(one)
            print(f"{model}, {precision}:")
            for name, row in sorted(one["tools"].items(), key=lambda item: item[1]["ratio"]):
                print(f"  {name:24}{row['ratio']:7.2f}{row['ms']:9.1f} ms  {row['records']}")
            for name, why in one["missing"].items():
                print(f"  {name}: left out, {why}")
    if options.json:
        content = {"schema": 1, "torch": torch.__version__, "threads": torch.get_num_threads(), "results": found}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
