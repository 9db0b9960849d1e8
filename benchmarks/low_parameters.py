"""Fine-tuning at a small learning rate with parameters in bf16: what plain storage loses, and what gets it back.

A small GPT is first trained in fp32 to a working point, and its weights are rounded to bf16. From there it is trained
on at `--lr` in fp32, and with bf16 parameters written in each way that the trainer knows. gain: how far the held-out
loss fell, and its share of what fp32 gained. loss: against fp32's. bytes: parameters, optimizer state and what the
method keeps, per parameter, without gradients. ms: median per step, all methods in turn in each round. Before all that,
the tool is asked what it thinks of bf16 parameters, from 20 recorded steps of the fp32 run.

    python benchmarks/low_parameters.py [--size tiny] [--steps 300] [--lr 1e-5] [--json OUT]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from common import write_json

import precscope as ps
from precscope.training.tasks.gpt import gpt

METHODS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16, plain": {"params": "bf16"},
    "bf16, nearest": {"params": "bf16", "updates": "nearest"},
    "bf16, stochastic": {"params": "bf16", "updates": "stochastic"},
    "bf16, kahan": {"params": "bf16", "updates": "kahan"},
    "bf16, master": {"params": "bf16", "updates": "master"},
    "bf16, stochastic, state bf16": {"params": "bf16", "updates": "stochastic", "state": "bf16"},
    "bf16, kahan, state bf16": {"params": "bf16", "updates": "kahan", "state": "bf16"},
    "bf16, stochastic, state int8": {"params": "bf16", "updates": "stochastic", "state": "int8"},
}
_PLAIN_BYTES = {"fp32": 12.0, "bf16, plain": 6.0}  # AdamW's two moments have the parameter's dtype


class Bench:
    """A working point and how training goes on from it."""

    def __init__(self, size: str, warm_steps: int, lr: float) -> None:
        self.size, self.lr = size, lr
        task = self._task(None)
        ps.train(task, steps=warm_steps, lr=3e-3)
        self.start = {k: v.bfloat16().float() for k, v in task.model.state_dict().items()}

    def _task(self, start: dict[str, torch.Tensor] | None) -> ps.Task:
        torch.manual_seed(0)
        task = gpt(self.size)
        if start is not None:
            task.model.load_state_dict(start)
        return task

    def settings(self, lr: float) -> dict[str, Any]:
        return {"lr": lr, "schedule": "constant", "warmup": 0, "weight_decay": 0.0, "seed": 1}

    def train(self, steps: int, lr: float | None = None, **method: Any) -> Any:
        return ps.train(self._task(self.start), steps=steps, **self.settings(self.lr if lr is None else lr), **method)

    def advice(self) -> dict[str, Any]:
        """What the tool says of bf16 parameters before they are tried."""
        with tempfile.TemporaryDirectory() as folder:
            profile = ps.profile(
                self._task(self.start), out=Path(folder) / "run", steps=20, every=5, precision="fp32", costs=False,
                shadow_every=None, ops=False, **self.settings(self.lr),
            )  # fmt: skip
            plan = ps.recommend(profile, formats=("bf16", "fp32"), policy="cast", costs="model")
        reasons = [r for layer in plan.modules.values() for r in layer.reasons if getattr(r, "code", "") == "swallowed"]
        parameters = sum(p.numel() for p in self._task(None).model.parameters())
        return {
            "modules_swallowed": len(reasons),
            "energy_lost": [f(r.numbers["energy"] for r in reasons) if reasons else 0.0 for f in (min, max)],
            "advised_updates": plan.optimizer.get("advised_updates"),
            "says": next((w for w in plan.optimizer["warnings"] if "would swallow" in w), ""),
            "parameters": parameters,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--warm-steps", type=int, default=300, help="steps in fp32 before")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--rounds", type=int, default=3, help="of the timing")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bench = Bench(options.size, options.warm_steps, options.lr)
    advice = bench.advice()
    print(f"{advice['parameters']} parameters; the tool on plain bf16 storage: {advice['modules_swallowed']} modules "
          "would lose {:.0%} to {:.0%} of the energy of their updates".format(*advice["energy_lost"]))  # fmt: skip
    print(advice["says"] + "\n")
    methods = {n: m for n, m in METHODS.items() if m.get("state") != "int8" or find_spec("torchao")}
    begin = bench.train(1, lr=1e-30).eval_loss
    results = {name: bench.train(options.steps, **method) for name, method in methods.items()}
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(options.rounds):
        for name, method in methods.items():
            times[name].append(bench.train(30, **method).step_time_ms)
    fp32 = results["fp32"].eval_loss
    rows = []
    print(f"{'':<30} held-out loss      gain  of fp32's  loss/fp32  bytes  ms/step")
    for name, result in results.items():
        noted = [n for n in result.notes if "bytes per parameter" in n]
        size = float(noted[0].split()[-4]) if noted else _PLAIN_BYTES[name]
        row = {"method": name, "loss": result.eval_loss, "gain": begin - result.eval_loss,
               "share": (begin - result.eval_loss) / (begin - fp32), "ratio": result.eval_loss / fp32,
               "bytes_per_parameter": size, "step_ms": statistics.median(times[name])}  # fmt: skip
        rows.append(row)
        print(f"{name:<30} {row['loss']:13.5f} {row['gain']:9.5f} {row['share']:10.1%} {row['ratio']:10.4f} "
              f"{size:6.1f} {row['step_ms']:8.2f}")  # fmt: skip
    content = {"size": options.size, "steps": options.steps, "lr": options.lr, "start": begin, "advice": advice}
    write_json(options.json, "low_parameters", rows, **content)


if __name__ == "__main__":
    main()
