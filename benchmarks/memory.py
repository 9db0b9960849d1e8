"""What watching takes in memory: a recorder beside the model's own training, and a shadow step beside an fp32 step.

    python benchmarks/memory.py [--modules 556] [--steps 30] [--json OUT]

Host memory: `--modules` small Linears in one residual chain are trained with AdamW, once plainly and once recorded at
every step, each in a process of its own. The difference of the peaks (ru_maxrss) is what recording costs, libraries
that only it needs included; they are shown apart. The recorder's buffers are counted after a third of the steps and at
the end: they must not grow.

Shadow step: all allocations and frees of the demo GPT's tensors as torch's profiler sees them, those of the recorder
included. `activations` is what a plain fp32 forward leaves for its backward; the peak of a shadow step less that of
the plain fp32 step is what a shadow step adds.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn


def peak_mb() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Chain(nn.Module):
    """`count` Linears, each added to its input: 16 rows and more a step for each of them."""

    def __init__(self, count: int, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + 0.1 * layer(x)
        return x


def train(variant: str, count: int, steps: int, folder: Path) -> dict[str, Any]:
    """Train in this process: "plain", "libraries" (a tiny model is recorded first, this one is not) or "recorded"."""
    import contextlib

    from precscope.recording import record

    torch.manual_seed(0)
    model = Chain(count)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if variant == "libraries":
        train("recorded", 2, 3, folder)
    watched = record(model, folder, optimizer=optimizer, every=1) if variant == "recorded" else contextlib.nullcontext()
    buffers = []
    with watched as recorder:
        for step in range(steps):
            model(torch.randn(32, 16)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if recorder is not None:
                if step + 1 in (steps // 3, steps):
                    buffers.append(buffer_bytes(recorder))
                recorder.step()
    result: dict[str, Any] = {"peak_mb": peak_mb(), "buffers": buffers}
    if variant == "recorded":
        from precscope.profiles import Profile

        result["sites"] = len(Profile.load(folder).sites)
    return result


def buffer_bytes(recorder: Any) -> dict[str, int]:
    """Capacity of the recorder's device buffers, rows waiting in them, and bytes."""
    observations = recorder._observations
    rows = [b._rows for b in observations._buffers.values()]
    size = sum(r.numel() * r.element_size() for r in rows)
    return {"capacity": sum(len(r) for r in rows), "waiting": observations.used, "bytes": size}


def traced_peak(action: Callable[[], Any]) -> tuple[int, int]:
    """(largest, last) sum of bytes allocated by `action` and not freed yet."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
        kept = action()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    total = largest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        largest = max(largest, total)
    del kept
    return largest, total


def shadow(folder: Path) -> dict[str, int]:
    """Bytes of the demo GPT's steps."""
    from precscope.recording import record
    from precscope.tasks import make_task

    task = make_task("gpt")
    optimizer = torch.optim.AdamW(task.model.parameters())
    found: dict[str, int] = {}
    with record(task.model, folder, optimizer=optimizer, every=1) as recorder:
        for step in range(3):  # the first ones make what is made once
            batch = task.batch(step)

            def run(batch: Any = batch) -> torch.Tensor:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    return task.loss(task.model, batch)

            run().backward()
            found["shadow"], _ = traced_peak(lambda batch=batch: recorder.shadow(lambda: task.loss(task.model, batch)))
            optimizer.step()
            optimizer.zero_grad()
            recorder.step()
    task.loss(task.model, batch).backward()  # gradients are there, as they are in a shadow step
    parameters = sum(p.numel() * p.element_size() for p in task.model.parameters())
    plain, _ = traced_peak(lambda: task.loss(task.model, batch).backward())
    _, activations = traced_peak(lambda: task.loss(task.model, batch))
    return found | {"plain": plain, "activations": activations, "parameters": parameters}


def in_a_process(*arguments: str) -> dict[str, Any]:
    """Run this file's hidden stage and return what it prints."""
    done = subprocess.run(
        [sys.executable, __file__, "--stage", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", type=int, default=556, help="Linears; 556 have 10,000 sites")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--stage", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        kind, out, *rest = options.stage
        print(json.dumps(shadow(Path(out)) if kind == "shadow" else train(kind, *map(int, rest), Path(out))))
        return
    from common import Target, check, machine, write_json

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for variant in ("plain", "libraries", "recorded"):
            found = in_a_process(variant, str(Path(folder) / variant), str(options.modules), str(options.steps))
            rows.append({"variant": variant, **found})
        shadowed = in_a_process("shadow", str(Path(folder) / "shadow"))
    plain, libraries, recorded = rows
    extra = recorded["peak_mb"] - plain["peak_mb"]
    print(f"{recorded['sites']:,} sites, {options.steps} steps, all recorded; peak of host memory:")
    print(f"  plain training {plain['peak_mb']:.0f} MB, recorded {recorded['peak_mb']:.0f} MB: {extra:.0f} MB more, of")
    print(f"  which {libraries['peak_mb'] - plain['peak_mb']:.0f} MB are libraries and kernels, whatever the model")
    early, late = recorded["buffers"]
    print(f"  buffer: {early['capacity']:,} slots, {early['bytes'] / 1e6:.1f} MB after a third of the steps; "
          f"{late['capacity']:,}, {late['bytes'] / 1e6:.1f} MB at the end")  # fmt: skip
    added = shadowed["shadow"] - shadowed["plain"]
    print(f"shadow step: peak {shadowed['shadow'] / 1e6:.1f} MB, plain fp32 step {shadowed['plain'] / 1e6:.1f} MB: "
          f"{added / 1e6:+.1f} MB; activations {shadowed['activations'] / 1e6:.1f} MB")  # fmt: skip
    targets = [
        Target(
            "recording, MB of host memory beside training and libraries",
            recorded["peak_mb"] - libraries["peak_mb"],
            200,
        ),
        Target("growth of the buffer, bytes", late["bytes"] - early["bytes"], 0),
        Target("a shadow step's extra memory, in sets of activations", added / shadowed["activations"], 1),
    ]
    check(targets)
    write_json(options.json, "memory", [*rows, {"variant": "shadow", **shadowed}], targets=targets, **machine())


if __name__ == "__main__":
    main()
