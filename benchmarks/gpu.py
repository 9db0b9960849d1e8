"""Everything that only a GPU can tell, in one command of under ten minutes that needs no network.

    python benchmarks/gpu.py [--out reports/gpu] [--parts kernels ...] [--minutes 9] [--device cuda] [--size medium]

Parts: correctness (every kernel and format against the CPU), kernels (time of the one-pass kernels beside the floor:
bytes read over the measured copy bandwidth), recorder (step times of a GPT unwatched and watched, beside the bytes
floor of what is watched), shadow (shadow and op-level steps), matmuls (the GPT's products in each format, fp8 by
torch._scaled_mm), advice (profile with measured costs, recommend), training (fp32, tf32, autocast fp16 and bf16, the
plan: time per step, tokens per second, peak memory, loss, skipped steps), tests (those marked gpu).

Each part writes into OUT/gpu.json as it ends; a part that fails is recorded with its error and the next one begins.
With --device cpu --size tiny the same code runs anywhere, to see that it runs: such figures say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpuparts import PARTS, Setting

import precscope
from precscope.training.tasks.gpt import SIZES


@dataclass
class Report:
    """What the parts found so far, and its file."""

    out: Path
    content: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, result: Any) -> None:
        """Keep a part's result; the file is whole after each."""
        self.content.setdefault("parts", {})[name] = result
        temporary = self.out / "gpu.json.part"
        temporary.write_text(json.dumps(self.content, indent=1, default=str) + "\n", encoding="utf-8")
        temporary.replace(self.out / "gpu.json")


def describe(setting: Setting, command: list[str]) -> dict[str, Any]:
    """What ran where, for the reader of the file."""
    cuda = setting.device.type == "cuda"
    return {
        "schema": 1,
        "command": " ".join(["python", *command]),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "capability": list(torch.cuda.get_device_capability()) if cuda else None,
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "cuda": torch.version.cuda, "precscope": precscope.__version__},
        "gpt": setting.size,
        "commit": _commit(),
    }  # fmt: skip


def _commit() -> str | None:
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def run_part(name: str, part: Callable[[Setting], Any], setting: Setting) -> dict[str, Any]:
    """The part's result with its seconds; what it raised instead where it failed."""
    start = time.perf_counter()
    try:
        result: dict[str, Any] = {"result": part(setting)}
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc(limit=-4)}
    if setting.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    seconds = time.perf_counter() - start
    print(f"{name}: {'failed: ' + result['error'] if 'error' in result else 'done'} in {seconds:.0f} s", flush=True)
    return {**result, "seconds": seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("reports/gpu"))
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=9.0, help="no part begins later than this")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", default="medium", choices=list(SIZES), help="of the GPT")
    parser.add_argument("--steps", type=int, default=60, help="training steps of each precision")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: --device cpu --size tiny runs the same code, and says nothing about a GPU")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    setting = Setting(torch.device(options.device), options.size, options.steps, options.out)
    report = Report(options.out, describe(setting, sys.argv))
    begun = time.perf_counter()
    for name in options.parts:
        if time.perf_counter() - begun > 60 * options.minutes:
            report.add(name, {"error": f"not begun: {options.minutes:g} minutes were over"})
            continue
        report.add(name, run_part(name, PARTS[name], setting))
    failed = [name for name, part in report.content["parts"].items() if "error" in part]
    print(f"wrote {options.out / 'gpu.json'}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
