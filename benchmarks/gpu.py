"""Everything that only a GPU can tell, in one command of under ten minutes on one H100 or H200 that needs no network.

    python benchmarks/gpu.py [--out reports/gpu/NAME] [--parts kernels ...] [--minutes 9.5]

It needs torch 2.11 or later with CUDA, Triton, numpy, pandas, pyarrow and pydantic, and for plans scipy; matplotlib
draws the figures, pytest runs the tests marked gpu. What is missing is named before anything runs. Without a network,
put the wheels into a folder on a machine that has one (`pip download --only-binary=:all: --python-version 3.12 -d
wheels scipy pydantic rich typer jinja2`) and install them with

    python -m pip install --no-index --find-links wheels scipy pydantic rich typer jinja2

Each part runs in a process of its own, so that a fault of the device or a hang ends that part alone, and has its time;
what it found until then is kept. After each part OUT has gpu.json, index.html and README.md with figures (PNG), so that
a run that is killed leaves a report of what it has. Targets stand beside figures, and whether they are met is computed.

    python benchmarks/gpu.py --device cpu --size tiny --out /tmp/rehearsal

runs the same code anywhere, to see that it runs. The report says so: such figures tell nothing about a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT)]

NEEDED = ("torch", "numpy", "pandas", "pyarrow", "pydantic")
FOR = {"triton": "the kernels (torch operations stand in)", "scipy": "plans", "matplotlib": "figures",
       "pytest": "the tests marked gpu"}  # fmt: skip
_PAUSE = 3.0  # seconds for a part's process to begin and end beyond its own time


def missing() -> dict[str, str]:
    """Package -> what goes without it."""
    return {name: use for name, use in FOR.items() if importlib.util.find_spec(name) is None}


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """What runs where, for the reader of the file."""
    import torch
    from gpu_parts.setting import SIZES

    import precscope

    cuda = options.device == "cuda"
    config = SIZES[options.size]
    properties = torch.cuda.get_device_properties(0) if cuda else None
    return {
        "schema": 1,
        "benchmark": "gpu",
        "rehearsal": not cuda,
        "command": "python benchmarks/gpu.py " + " ".join(sys.argv[1:]),
        "machine": {
            "device": torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()})",
            "capability": list(torch.cuda.get_device_capability()) if cuda else None,
            "memory_bytes": properties.total_memory if properties else None,
            "multiprocessors": properties.multi_processor_count if properties else None,
            "driver": _driver() if cuda else None,
        },
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
            "precscope": precscope.__version__, **_versions("triton", "numpy", "scipy"),
        },
        "missing": missing(),
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "gpt": {"size": options.size, "layers": config.layers, "width": config.width, "heads": config.heads,
                "context": config.context, "batch": config.batch, "vocabulary": config.vocabulary},
        "training_steps": options.steps,
        "parts": {},
    }  # fmt: skip


def _driver() -> str | None:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _versions(*names: str) -> dict[str, str | None]:
    from importlib import metadata

    return {n: metadata.version(n) if importlib.util.find_spec(n) is not None else None for n in names}


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def run_part(name: str, seconds: float, options: argparse.Namespace) -> dict[str, Any]:
    """The part's result, in a process of its own that is ended after `seconds`; its error where it failed."""
    result = options.out / f".{name}.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--only", name, "--result", str(result), "--out",
               str(options.out), "--device", options.device, "--size", options.size, "--steps", str(options.steps),
               "--seconds", str(max(seconds - _PAUSE, 1.0)), *(["--quick"] if options.quick else [])]  # fmt: skip
    start, error = time.perf_counter(), None
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds, cwd=ROOT)
        if done.returncode:
            tail = (done.stdout + done.stderr).strip().splitlines()[-12:]
            error = "\n".join(tail) or f"ended with {done.returncode}"
    except subprocess.TimeoutExpired:
        error = f"cut off after {seconds:.0f} s; what it had found is kept"
    part: dict[str, Any] = {"seconds": round(time.perf_counter() - start, 1)}
    if result.exists():
        part["result"] = json.loads(result.read_text(encoding="utf-8"))
        result.unlink()
    if error is not None:
        part["error"] = error
    return part


def run_here(options: argparse.Namespace) -> int:
    """One part, in this process."""
    import torch
    from gpu_parts import PARTS, Setting

    where = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    setting = Setting(
        where, options.size, options.steps, options.out, options.result, seconds=options.seconds, quick=options.quick
    )
    try:
        PARTS[options.only][0](setting)
    except AssertionError as error:
        print(error)
        return 1
    return 0


def arguments() -> argparse.Namespace:
    """The command line."""
    from gpu_parts import PARTS
    from gpu_parts.setting import SIZES

    parts = "; ".join(f"{name}: {what}" for name, (_, _, what) in PARTS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"parts - {parts}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="default: reports/gpu/NAME OF THE DEVICE; for a rehearsal it is asked")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=9.5, help="for all parts together")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--size", default="gpt2", choices=list(SIZES), help="of the GPT")
    parser.add_argument("--steps", type=int, help="training steps of each precision (default: 60, 6 in a rehearsal)")
    parser.add_argument("--quick", action="store_true", help="as little as tells that it runs")
    for name, kind in (("--only", str), ("--result", Path), ("--seconds", float)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)  # for its own child processes
    options = parser.parse_args()
    options.steps = options.steps or (60 if options.device == "cuda" else 6)
    return options


def main() -> int:
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        print(f"missing: {', '.join(absent)}. Without a network: python -m pip install --no-index --find-links wheels "
              f"{' '.join(absent)}")  # fmt: skip
        return 2
    options = arguments()
    if options.only:
        return run_here(options)
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here. --device cpu --size tiny --out DIR rehearses the same code on a CPU")
        return 2
    if options.out is None and options.device == "cpu":
        print("a rehearsal needs --out DIR, outside reports/gpu: its figures say nothing about a GPU")
        return 2
    return run_all(options)


def run_all(options: argparse.Namespace) -> int:
    """Every part in turn; file and report after each."""
    from gpu_parts import PARTS
    from gpu_parts.page import write_report
    from gpu_parts.setting import write_json
    from gpu_parts.targets import targets

    content = describe(options)
    if options.out is None:
        name = re.sub(r"[^a-z0-9]+", "-", content["machine"]["device"].lower()).strip("-")
        options.out = ROOT / "reports" / "gpu" / name
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, use in content["missing"].items():
        print(f"{name} is not installed; it serves {use}")
    end = time.perf_counter() + 60 * options.minutes
    for name in options.parts:
        seconds = min(PARTS[name][1], end - time.perf_counter())
        if seconds < 2 * _PAUSE:
            content["parts"][name] = {"seconds": 0.0, "error": f"not begun: {options.minutes:g} minutes were over"}
        else:
            content["parts"][name] = run_part(name, seconds, options)
        part = content["parts"][name]
        words = "failed: " + part["error"].splitlines()[-1] if "error" in part else "done"
        print(f"{name}: {words} ({part['seconds']:.0f} s)", flush=True)
        content["targets"] = targets(content)
        write_json(options.out / "gpu.json", content)
        write_report(content, options.out)
    for target in content["targets"]:
        print(f"{target['status']:<12} {target['what']}: {target['shown']} (asked: {target['asked']})")
    print(f"wrote {options.out / 'index.html'}, README.md and gpu.json")
    return 1 if any("error" in part for part in content["parts"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
