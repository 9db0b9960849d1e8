"""What recording costs: step times of the demo GPT, unwatched and watched, interleaved in one run.

    python benchmarks/recorder.py [--rounds 6] [--precision fp32 bf16] [--json OUT]

Each round trains every variant for ten steps in turn, so that a change in the machine's speed meets all alike. The
ratio is the median over rounds of (ten watched steps) / (ten unwatched steps of the same round).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from precscope.recording import record
from precscope.tasks import make_task

STEPS = 10


class Loop:
    """One model in training; `every` None is unwatched."""

    def __init__(self, every: int | None, precision: str, out: Path) -> None:
        self.task = make_task("gpt")
        self.model = self.task.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self.recorder = None
        self.step = 0
        if every is not None:
            self.recorder = record(self.model, out / f"every{every}", optimizer=self.optimizer, every=every)
            self.recorder.__enter__()

    def ten_steps(self) -> float:
        """Seconds of ten steps."""
        start = time.perf_counter()
        for _ in range(STEPS):
            with torch.autocast("cpu", dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None):
                loss = self.task.loss(self.model, self.task.batch(self.step))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.recorder is not None:
                self.recorder.step()
            self.step += 1
        return time.perf_counter() - start

    def close(self) -> None:
        if self.recorder is not None:
            self.recorder.__exit__(None, None, None)


def measure(precision: str, rounds: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        loops = {name: Loop(every, precision, Path(folder)) for name, every in
                 (("unwatched", None), ("every=1", 1), ("every=10", 10))}  # fmt: skip
        for loop in loops.values():
            loop.ten_steps()
        times: dict[str, list[float]] = {name: [] for name in loops}
        for _ in range(rounds):
            for name, loop in loops.items():
                times[name].append(loop.ten_steps())
        for loop in loops.values():
            loop.close()
    base = times["unwatched"]
    result = {"unwatched_ms": statistics.median(base) / STEPS * 1e3}
    for name in ("every=1", "every=10"):
        ratios = [t / b for t, b in zip(times[name], base, strict=True)]
        result[name] = statistics.median(ratios)
        result[f"{name}_range"] = [min(ratios), max(ratios)]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {p: measure(p, options.rounds) for p in options.precision}
    print(f"{'precision':<10} {'unwatched':>12} {'every=1':>24} {'every=10':>24}")
    for precision, r in results.items():
        cells = [f"{r[n]:.3f} ({r[n + '_range'][0]:.2f}-{r[n + '_range'][1]:.2f})" for n in ("every=1", "every=10")]
        print(f"{precision:<10} {r['unwatched_ms']:>9.1f} ms {cells[0]:>24} {cells[1]:>24}")
    if options.json:
        content = {"torch": torch.__version__, "threads": torch.get_num_threads(), "results": results}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
