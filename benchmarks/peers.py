"""What watching costs, beside the tools people would use instead: the demo GPT or a ResNet, all in turn in one run.

    python benchmarks/peers.py [--model gpt resnet] [--steps 20] [--precision fp32] [--only NAME ...] [--json OUT]

Each tool watches a model of its own; all models start equal, see the same batches and take single training steps in
turn, in an order drawn anew each turn, so that a change in the machine's speed meets all alike. A ratio is the median
over the turns of a tool's step time over that of the unwatched step of the same turn, with its quartiles; "unwatched
again" shows the noise. With every=N, recorded and unrecorded steps are weighted 1 to N - 1 and the mean time in
rec.step() is added; what it takes in a recorded step, flushes included, is taken from every=1, which records enough of
them. A shadow step is set against forward and backward in plain fp32. A tool whose package is missing is left out and
named. What each records is printed below the times: hooks of peers see leaf modules only, precscope all that compute
or own parameters.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import Target, check, machine, spread, turns, write_json
from peertools import TOOLS, Tool, ToolMissing
from realmodels import MODELS, Missing

import precscope as ps
from precscope.recording.ops import record_ops

WARM_UP = 2
EVERY = (1, 10, 100)
OPS, SHADOW, BASE, AGAIN, FP32 = "precscope op level", "precscope shadow step", "unwatched", "unwatched again", "fp32"
ALL_ROLES = "inputs, outputs, weights, gradients of all, updates, optimizer state"
STATISTICS = "exponent histogram, zeros, inf, NaN, amax, smallest, sum, squares"
TOOL = {tool.name: tool for tool in TOOLS}
RECORDS = {
    **{f"precscope every={n}": (ALL_ROLES, STATISTICS, "any, at any scale") for n in EVERY},
    OPS: ("result of every op, forward and backward", STATISTICS, "any, at any scale"),
    SHADOW: (ALL_ROLES + " in fp32", STATISTICS + ", the price of rounding, true error", "any, with its loss noise"),
    **{tool.name: (tool.roles, tool.statistics, tool.answers) for tool in TOOLS},
}
LIMITS = {"precscope every=1": 1.4, "precscope every=10": 1.04, OPS: 3.0, SHADOW: 3.0}


@dataclass(frozen=True)
class Step:
    """Seconds of one step: whole, its forward and backward, rec.step(); whether it was recorded."""

    whole: float
    passes: float
    bookkeeping: float = 0.0
    recorded: bool = False


class Loop:
    """One model in training, watched by one tool. `steps` of it will be timed."""

    def __init__(self, name: str, model_name: str, precision: str, steps: int, folder: Path) -> None:
        self.name, self.task = name, MODELS[model_name]()
        self.model = self.task.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.low = precision != "fp32" and name != FP32
        self.step, self.times = 0, list[Step]()
        self.held = ExitStack()
        self.tool: Tool | None = TOOL.get(name)
        self.every = int(name.split("=")[1]) if "every=" in name else 1
        self.recorder = None
        if "every=" in name or name == SHADOW:
            self.recorder = self.held.enter_context(
                ps.record(self.model, folder / name.replace(" ", "-"), optimizer=self.optimizer, every=self.every,
                          first_step=first_step(self.every, steps))
            )  # fmt: skip
        elif self.tool is not None and not self.tool.each_step:
            self.held.enter_context(self.tool.watch(self.model))

    def one_step(self) -> None:
        """Take a training step, and note its seconds."""
        batch = self.task.batch(self.step)
        step = self._shadow_step(batch) if self.name == SHADOW else self._training_step(batch)
        self.times.append(step)
        self.step += 1

    def _training_step(self, batch: Any) -> Step:
        recorded = self.recorder is not None and self.recorder.recording
        start = time.perf_counter()
        self._passes(batch)
        passed = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        done = time.perf_counter()
        if self.recorder is not None:
            self.recorder.step()
        return Step(done - start, passed - start, time.perf_counter() - done, recorded)

    def _passes(self, batch: Any) -> None:
        """Forward and backward, inside the tool if it belongs there."""
        if self.name == OPS:
            with record_ops(self.model) as ops:
                self._loss(batch).backward()
            ops.table()
        elif self.tool is not None and self.tool.each_step:
            with self.tool.watch(self.model):
                self._loss(batch).backward()
        else:
            self._loss(batch).backward()

    def _loss(self, batch: Any) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.low):
            return self.task.loss(self.model, batch)

    def _shadow_step(self, batch: Any) -> Step:
        """The step itself is recorded and not timed."""
        assert self.recorder is not None
        self._loss(batch).backward()
        start = time.perf_counter()
        self.recorder.shadow(lambda: self.task.loss(self.model, batch))
        took = time.perf_counter() - start
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.recorder.step()
        return Step(took, took)

    def begin_timing(self) -> None:
        """What happens once is over: graph.json is written with the first flush."""
        self.times.clear()
        if self.recorder is not None:
            self.recorder.flush()

    def end_timing(self) -> None:
        """At every=1 the rows that still wait are written on the clock, as part of the last step."""
        if self.recorder is not None and self.every == 1:
            start, last = time.perf_counter(), self.times[-1]
            self.recorder.flush()
            bookkeeping = last.bookkeeping + time.perf_counter() - start
            self.times[-1] = replace(last, bookkeeping=bookkeeping)
        self.held.close()


def first_step(every: int, steps: int) -> int:
    """Such that at least one of `steps` steps after the warm-up is recorded and, where it fits, one before them."""
    return every - 1 if every <= steps else every - WARM_UP - steps // 2


def figures(loop: Loop, loops: dict[str, Loop]) -> dict[str, Any]:
    """The row of one loop, beside the unwatched steps of the same turns."""
    if loop.name == SHADOW:
        plain = loops[FP32 if FP32 in loops else BASE].times
        ratios = spread([s.passes / p.passes for s, p in zip(loop.times, plain, strict=True)])
        row = {"ratio": ratios.median, "quartiles": [ratios.low, ratios.high]}
    else:
        row = weighted(loop, loops[BASE].times, loops.get("precscope every=1", loop).times)
    roles, statistics_, answers = RECORDS.get(loop.name, ("nothing", "", ""))
    whole = statistics.median(s.whole for s in loop.times)
    return {
        "tool": loop.name,
        **row,
        "step_ms": 1e3 * whole,
        "roles": roles,
        "statistics": statistics_,
        "answers_for_a_format": answers,
        "beyond_one_maximum": loop.tool.beyond_max if loop.tool else None,
    }


def weighted(loop: Loop, base: list[Step], flushing: list[Step]) -> dict[str, Any]:
    """Ratio with quartiles; recorded and unrecorded steps in the proportion of `every`, time in rec.step() added, of
    recorded steps that of `flushing`."""
    groups: dict[bool, list[float]] = {True: [], False: []}
    for step, unwatched in zip(loop.times, base, strict=True):
        groups[step.recorded].append(step.whole / unwatched.whole)
    share = 1 / loop.every if loop.recorder is not None else 0.0
    parts = [(weight, spread(groups[kind])) for kind, weight in ((True, share), (False, 1 - share)) if groups[kind]]
    flush = 0.0
    if loop.recorder is not None:
        recorded = [s.bookkeeping for s in flushing if s.recorded]
        others = [s.bookkeeping for s in loop.times if not s.recorded] or [0.0]
        seconds = share * statistics.fmean(recorded) + (1 - share) * statistics.fmean(others)
        flush = seconds / statistics.median(s.whole for s in base)
    ratio, low, high = (
        sum(weight * getattr(part, word) for weight, part in parts) + flush for word in ("median", "low", "high")
    )
    found = {"ratio": ratio, "quartiles": [low, high]}
    if loop.recorder is not None:
        found |= {"of_which_flushes": flush, "recorded_step_ratio": statistics.median(groups[True])}
    return found


def measure(model_name: str, precision: str, steps: int, only: list[str]) -> dict[str, Any]:
    """Rows of all tools. Raises Missing where the model's package is not installed."""
    asked = [AGAIN, *(f"precscope every={n}" for n in EVERY), OPS, SHADOW, *TOOL]
    names = [BASE] + [FP32] * (precision != "fp32") + [n for n in asked if not only or any(o in n for o in only)]
    missing: dict[str, str] = {}
    loops: dict[str, Loop] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for name in names:
            try:
                loop = Loop(name, model_name, precision, steps, Path(folder))
                stack.callback(loop.held.close)
                loop.one_step()
                loops[name] = loop
            except ToolMissing as error:
                missing[name] = str(error)
        for _ in range(WARM_UP - 1):
            for loop in loops.values():
                loop.one_step()
        for loop in loops.values():
            loop.begin_timing()
        for order in turns(list(loops.values()), steps):
            for loop in order:
                loop.one_step()
        for loop in loops.values():
            loop.end_timing()
    rows = [{"model": model_name, "precision": precision, **figures(loop, loops)} for loop in loops.values()]
    return {"rows": rows, "missing": missing}


def targets(rows: list[dict[str, Any]]) -> list[Target]:
    """What is asked of the demo GPT, with the figures of this run."""
    ratio = {row["tool"]: row["ratio"] for row in rows}
    label = f"{rows[0]['model']} {rows[0]['precision']}, "
    found = [Target(label + name, ratio[name], limit) for name, limit in LIMITS.items() if name in ratio]
    ours = ratio.get("precscope every=1")
    if ours is not None:
        found += [Target(f"{label}{row['tool']} / every=1", row["ratio"] / ours, 1.0, at_least=True)
                  for row in rows if row["beyond_one_maximum"]]  # fmt: skip
    return found


def show(one: dict[str, Any]) -> None:
    """The times of one model, the fastest first."""
    first = one["rows"][0]
    print(f"\n{first['model']}, {first['precision']}, unwatched {first['step_ms']:.1f} ms")
    print(f"{'':26}{'ratio':>7}  {'quartiles':<15} of which flushes")
    for row in sorted(one["rows"], key=lambda row: row["ratio"]):
        low, high = row["quartiles"]
        flushes = f"{row['of_which_flushes']:.3f}" if "of_which_flushes" in row else ""
        print(f"{row['tool']:26}{row['ratio']:7.3f}  {low:.3f} to {high:.3f}  {flushes}")
    for name, why in one["missing"].items():
        print(f"{name}: left out, {why}")


def show_records() -> None:
    """What each tool records in such a step."""
    print(f"\n{'what is recorded':26}of / what / does it answer for a format")
    for name, words in RECORDS.items():
        print(f"{name:26}{' / '.join(words)}")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["gpt", "resnet"], choices=tuple(MODELS))
    parser.add_argument(
        "--steps", type=int, default=20, help="timed turns of the GPT, five times as many of others (default: 20)"
    )
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=("fp32", "bf16"))
    parser.add_argument("--only", nargs="+", default=[], help="tools whose name contains one of these words")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "Anomaly Detection has been enabled", UserWarning)
    rows: list[dict[str, Any]] = []
    asked: list[Target] = []
    left_out: dict[str, str] = {}
    for model in options.model:
        for precision in options.precision:
            try:
                one = measure(model, precision, options.steps * (1 if model == "gpt" else 5), options.only)
            except Missing as missing:
                print(f"{model}: skipped, {missing}")
                left_out[model] = str(missing)
                continue
            show(one)
            rows, left_out = rows + one["rows"], left_out | one["missing"]
            if model == "gpt":
                asked += targets(one["rows"])
    show_records()
    check(asked)
    write_json(options.json, "peers", rows, targets=asked, steps=options.steps, left_out=left_out, **machine())


if __name__ == "__main__":
    main()
