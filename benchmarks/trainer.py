"""What the trainer costs over a loop written by hand: step times of both, interleaved in one process.

    python benchmarks/trainer.py [gpt mlp] [--steps 200] [--precision fp32 bf16 plan] [--guard] [--out] [--json OUT]

The loop by hand does the same work: the same model and batches, autocast, GradScaler, gradient clipping, a cosine
schedule, fused AdamW, and it reads the loss with .item() to show it. On the trainer's side all that surrounds a step
counts: reading the device, the log and, with --out, writing it; with --guard the guard's look at each reading. Both
take single steps in turn, in changing order, so that a change in the machine's speed meets both alike. Given are the
ratio of the medians, the median of the ratios of neighbouring steps, which is the steadier one, and the ratio of the
fastest tenths; and microseconds per step that the trainer adds. "noise" is the loop by hand against itself. A run whose
two sides end with different losses is refused.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import machine, write_json
from torch import nn

import precscope as ps
from precscope.tasks import make_task
from precscope.training import TrainConfig, Trainer, make_precision
from precscope.training.halfmatmul import half_matmul_through_fp32, needs_half_matmul

WARM_UP = 10
LR, WARM, CLIP = 1e-3, 10, 1.0


def mlp() -> ps.Task:
    """Three layers, 64 wide, batches of 64: a step so short that overhead shows."""
    torch.manual_seed(0)
    x = torch.randn(64, 64, 64)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))
    return ps.Task(model=model, loss=lambda m, b: F.mse_loss(m(b), b[:, :1]), batches=list(x))


TASKS: dict[str, Callable[[], ps.Task]] = {"gpt": lambda: make_task("gpt", seed=0), "mlp": mlp}


def plan_for(task: ps.Task) -> ps.PrecisionPlan:
    """bf16, with the last module that has parameters in fp32."""
    last = [name for name, m in task.model.named_modules() if next(m.parameters(recurse=False), None) is not None][-1]
    return ps.PrecisionPlan(default="bf16", modules={last: "fp32"})


class ByHand:
    """The loop that a user would write."""

    def __init__(self, task: ps.Task, precision: str, steps: int) -> None:
        self.task, self.model, self.step = task, task.model, 0
        self.schedule = TrainConfig(steps=steps, warmup=WARM).lr_factor
        self.parameters = sorted(self.model.parameters(), key=lambda p: p.dim() < 2)  # the optimizer's order: same sums
        groups = [
            {"params": [p for p in self.parameters if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in self.parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=True)
        self.scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
        self.handle = ps.apply(plan_for(task), self.model) if precision == "plan" else None
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self.through = half_matmul_through_fp32 if precision == "fp16" and needs_half_matmul() else nullcontext

    def autocast(self) -> Any:
        if self.handle is not None:
            return self.handle.autocast()
        return nullcontext() if self.dtype is None else torch.autocast("cpu", dtype=self.dtype)

    def one_step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = LR * self.schedule(self.step)
        batch = self.task.batch(self.step)
        with self.through(), self.autocast():
            loss = self.task.loss(self.model, batch)
        with self.through():
            self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.shown = loss.item()
        self.step += 1

    def close(self) -> None:
        if self.handle is not None:
            self.handle.remove()


class Bundled:
    """The trainer, one step at a time: just what `Trainer.run` does between its beginning and its end."""

    def __init__(self, task: ps.Task, precision: str, steps: int, guard: bool, out: Path | None) -> None:
        config = TrainConfig(steps=steps, lr=LR, warmup=WARM, grad_clip=CLIP)
        plan = plan_for(task) if precision == "plan" else None
        mode = make_precision(None if plan else precision, plan=plan, model=task.model, device=torch.device("cpu"))
        watching = None
        if guard:
            from precscope.training.guard import Guard, GuardConfig

            watching = Guard(GuardConfig(action="warn"))
        self.trainer = Trainer(task, config, precision=mode, out=out, guard=watching)
        self.trainer.model.train()
        self.stack = ExitStack()
        self.stack.callback(self.trainer._applied.close)
        self.trainer._begin(None, None)
        self.trainer.next_step = 0

    def one_step(self) -> None:
        self.trainer._go_on(self.trainer.next_step)

    def close(self) -> None:
        self.stack.close()


def measure(name: str, precision: str, steps: int, guard: bool, out: bool) -> dict[str, float]:
    """Figures of one task and precision; times in microseconds."""
    total = steps + WARM_UP + 1
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "run" if out else None
        loops: dict[str, Any] = {
            "hand": ByHand(TASKS[name](), precision, total),
            "again": ByHand(TASKS[name](), precision, total),
            "trainer": Bundled(TASKS[name](), precision, total, guard, place),
        }
        times: dict[str, list[float]] = {word: [] for word in loops}
        for step in range(steps + WARM_UP):
            words = list(loops)
            for word in words[step % 3 :] + words[: step % 3]:
                start = time.perf_counter()
                loops[word].one_step()
                times[word].append(1e6 * (time.perf_counter() - start))
        same = math.isclose(loops["hand"].shown, loops["trainer"].trainer.log.rows[-1].loss, rel_tol=1e-5)
        for loop in loops.values():
            loop.close()
    if not same:
        raise SystemExit(f"{name} {precision}: the two loops did not do the same work: their losses differ")
    hand, again, trainer = (times[word][WARM_UP:] for word in ("hand", "again", "trainer"))
    return {
        "hand_us": statistics.median(hand),
        "trainer_us": statistics.median(trainer),
        "ratio": statistics.median(trainer) / statistics.median(hand),
        "paired_ratio": statistics.median(t / h for t, h in zip(trainer, hand, strict=True)),
        "fastest_ratio": fastest(trainer) / fastest(hand),
        "added_us": statistics.median(t - h for t, h in zip(trainer, hand, strict=True)),
        "noise_ratio": statistics.median(a / h for a, h in zip(again, hand, strict=True)),
    }


def fastest(times: list[float]) -> float:
    """Mean of the fastest tenth."""
    count = max(1, len(times) // 10)
    return statistics.mean(sorted(times)[:count])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(TASKS), help=f"of {', '.join(TASKS)}")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16", "plan"])
    parser.add_argument("--guard", action="store_true", help="the trainer's side runs under guard='warn'")
    parser.add_argument("--out", action="store_true", help="the trainer's side writes its log")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(
        f"{'':<12} {'by hand':>11} {'trainer':>11} {'ratio':>7} {'paired':>7} {'fastest':>8} {'added':>9} {'noise':>6}"
    )
    for name in options.tasks:
        for precision in options.precision:
            r = measure(name, precision, options.steps, options.guard, options.out)
            rows.append({"task": name, "precision": precision, **r})
            print(f"{name + ' ' + precision:<12} {r['hand_us']:>8.0f} us {r['trainer_us']:>8.0f} us {r['ratio']:>7.3f} "
                  f"{r['paired_ratio']:>7.3f} {r['fastest_ratio']:>8.3f} {r['added_us']:>6.0f} us "
                  f"{r['noise_ratio']:>6.3f}", flush=True)  # fmt: skip
    settings = {"steps": options.steps, "guard": options.guard, "out": options.out}
    write_json(options.json, "trainer", rows, **settings, **machine())


if __name__ == "__main__":
    main()
