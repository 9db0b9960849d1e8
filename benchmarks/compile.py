"""torch.compile and plans: time per step eager and compiled, what compiling takes, and what recorded steps cost.

    python benchmarks/compile.py [gpt mlp] [--steps 40] [--backend inductor] [--json OUT]

Each of fp32, plain bf16 autocast and a plan (bf16 with fp32 islands) is trained uncompiled, compiled, and compiled with
every fifth step recorded, all nine taking single steps in turn. Times are medians, steps that compile left out. Then:
the first step's seconds, graphs, graph breaks and recompilations, and how far the losses lie from the uncompiled ones.
A recorded run compiles nothing of its own: it finds the code of the compiled run of a like model.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from common import write_json
from torch._dynamo.utils import counters
from trainer import TASKS

import precscope as ps
from precscope.preservation import backward_outside_autocast

WARM_UP = 6
EVERY = 5
WAYS = ("eager", "compiled", "recorded")


def plan_for(task: ps.Task) -> ps.PrecisionPlan:
    """bf16, with every third module that has parameters in fp32."""
    names = [name for name, m in task.model.named_modules() if next(m.parameters(recurse=False), None) is not None]
    return ps.PrecisionPlan(default="bf16", modules=dict.fromkeys(names[2::3], "fp32"))


class Run:
    """One model in training. precision: "fp32", "bf16" or "plan". way: one of WAYS."""

    def __init__(self, make: Any, precision: str, way: str, backend: str, out: Path) -> None:
        self.task, self.precision, self.step = make(), precision, 0
        model = self.task.model
        self.handle = ps.apply(plan_for(self.task), model) if precision == "plan" else None
        self.model = model if way == "eager" else torch.compile(model, backend=backend)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        self.recorder = None
        self.graphs = self.breaks = 0
        self.first_s, self.losses, self.times = 0.0, [], {True: [], False: []}
        if way == "recorded":
            self.recorder = ps.record(self.model, out / f"{precision}", optimizer=self.optimizer, every=EVERY)
            self.recorder.__enter__()

    def around(self) -> AbstractContextManager[Any]:
        if self.handle is not None:
            return self.handle.autocast()
        return torch.autocast("cpu", dtype=torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def one_step(self) -> None:
        recorded = self.recorder is not None and self.recorder.recording
        before, broken = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        start = time.perf_counter()
        with backward_outside_autocast(), self.around():
            loss = self.task.loss(self.model, self.task.batch(self.step))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        took = time.perf_counter() - start
        made = counters["stats"]["unique_graphs"] - before
        self.graphs, self.breaks = self.graphs + made, self.breaks + sum(counters["graph_break"].values()) - broken
        if made and not self.first_s:
            self.first_s = took
        elif self.step >= WARM_UP and not made:
            self.times[recorded].append(1e3 * took)
        if self.recorder is not None:
            self.recorder.step()
        self.losses.append(loss.item())
        self.step += 1

    def close(self) -> None:
        if self.recorder is not None:
            self.recorder.__exit__(None, None, None)
        if self.handle is not None:
            self.handle.remove()


def measure(name: str, steps: int, backend: str) -> dict[str, Any]:
    """Figures of one task: by precision and way."""
    torch.compiler.reset()
    with tempfile.TemporaryDirectory() as folder:
        pairs = [(precision, way) for precision in ("fp32", "bf16", "plan") for way in WAYS]
        runs = {pair: Run(TASKS[name], *pair, backend, Path(folder)) for pair in pairs}
        for step in range(steps + WARM_UP):
            shift = step % len(pairs)
            for pair in pairs[shift:] + pairs[:shift]:
                runs[pair].one_step()
        for run in runs.values():
            run.close()
    result: dict[str, Any] = {}
    for (precision, way), run in runs.items():
        reference = runs[precision, "eager"].losses
        result[f"{precision} {way}"] = {
            "step_ms": statistics.median(run.times[False]),
            "recorded_step_ms": statistics.median(run.times[True]) if run.times[True] else None,
            "first_step_s": run.first_s,
            "graphs": run.graphs,
            "graph_breaks": run.breaks,
            "recompiles": max(0, run.graphs - 1 - run.breaks),
            "largest_loss_difference": max(abs(a - b) for a, b in zip(run.losses, reference, strict=True)),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(TASKS), help=f"of {', '.join(TASKS)}")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {name: measure(name, options.steps, options.backend) for name in options.tasks}
    for name, rows in results.items():
        print(
            f"{name:<14} {'ms/step':>9} {'recorded':>9} {'compiling':>10} {'graphs':>7} {'breaks':>7} {'loss off':>9}"
        )
        for how, r in rows.items():
            recorded = "" if r["recorded_step_ms"] is None else f"{r['recorded_step_ms']:.2f}"
            print(f"{how:<14} {r['step_ms']:>9.2f} {recorded:>9} {r['first_step_s']:>8.1f} s {r['graphs']:>7} "
                  f"{r['graph_breaks']:>7} {r['largest_loss_difference']:>9.1e}")  # fmt: skip
        over = rows["plan compiled"]["step_ms"] / rows["bf16 compiled"]["step_ms"]
        print(f"compiled: the plan takes {over:.3f} of plain bf16 autocast's time")
    rows = [{"task": name, "how": how, **r} for name, found in results.items() for how, r in found.items()]
    write_json(options.json, "compile", rows, backend=options.backend)


if __name__ == "__main__":
    main()
