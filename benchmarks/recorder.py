"""What recording costs: step times of the demo GPT, unwatched and watched, interleaved in one run.

    python benchmarks/recorder.py [--steps 60] [--precision fp32 bf16] [--json OUT]

The variants take single steps in turn, so that a change in the machine's speed meets all alike. A variant's time per
step is the mean over its cycle of the median time of its recorded and of its unrecorded steps, plus the mean time in
`rec.step()`, which holds the flushes. The ratio is to the unwatched median of the same run.
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

WARM_UP = 11


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

    def one_step(self) -> tuple[float, float, bool]:
        """Seconds of the step, seconds in rec.step(), and whether it was recorded."""
        watched = self.recorder is not None and self.recorder.recording
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            loss = self.task.loss(self.model, self.task.batch(self.step))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        middle = time.perf_counter()
        if self.recorder is not None:
            self.recorder.step()
        self.step += 1
        return middle - start, time.perf_counter() - middle, watched

    def close(self) -> None:
        if self.recorder is not None:
            self.recorder.__exit__(None, None, None)


def measure(precision: str, steps: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        loops = {name: Loop(every, precision, Path(folder)) for name, every in
                 (("unwatched", None), ("every=1", 1), ("every=10", 10))}  # fmt: skip
        for loop in loops.values():
            for _ in range(WARM_UP):
                loop.one_step()
        times: dict[str, list[tuple[float, float, bool]]] = {name: [] for name in loops}
        for _ in range(steps):
            for name, loop in loops.items():
                times[name].append(loop.one_step())
        for loop in loops.values():
            loop.close()
    base = statistics.median(t for t, *_ in times["unwatched"])
    result = {"unwatched_ms": base * 1e3}
    for name in ("every=1", "every=10"):
        result[name] = _per_step(times[name]) / base
        result[f"{name}, flush and bookkeeping"] = statistics.mean(s for _, s, _ in times[name]) / base
    return result


def _per_step(times: list[tuple[float, float, bool]]) -> float:
    groups = [[t for t, _, r in times if r is recorded] for recorded in (True, False)]
    weighted = sum(statistics.median(g) * len(g) for g in groups if g) / len(times)
    return weighted + statistics.mean(s for _, s, _ in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {p: measure(p, options.steps) for p in options.precision}
    print(f"{'precision':<10} {'unwatched':>12} {'every=1':>9} {'every=10':>9}   of which flushes and bookkeeping")
    for precision, r in results.items():
        rest = [f"{r[n + ', flush and bookkeeping']:.3f}" for n in ("every=1", "every=10")]
        ratios = f"{r['every=1']:>9.3f} {r['every=10']:>9.3f}"
        print(f"{precision:<10} {r['unwatched_ms']:>9.1f} ms {ratios}   {' and '.join(rest)}")
    if options.json:
        content = {"torch": torch.__version__, "threads": torch.get_num_threads(), "results": results}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
