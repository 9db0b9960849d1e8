"""What benchmarks share: the machine in words, JSON, turns, medians with their quartiles, targets.

from common import Spread, check, machine, spread, turns, write_json
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

import precscope

T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """A median, the quartiles around it, and of how many values."""

    median: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles; of one value all three are that value."""
    if len(values) < 2:
        return Spread(values[0], values[0], values[0], 1)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high, len(values))


def turns(items: Sequence[T], count: int) -> Iterator[Sequence[T]]:
    """`items`, `count` times, each time in another order (the same ones in each run): nobody always follows the same
    one, whose data is still in the caches."""
    order = random.Random(0)
    for _ in range(count):
        yield order.sample(items, len(items))


@dataclass(frozen=True)
class Target:
    """A figure and its limit. held: whether value <= limit (or, with at_least, value >= limit)."""

    what: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def held(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        word = "at least" if self.at_least else "at most"
        return f"{self.what}: {self.value:.3g}, asked {word} {self.limit:g}: {'held' if self.held else 'MISSED'}"


def keep_memory() -> bool:
    """Let the C allocator keep what is freed instead of handing it back to the system, for all contenders alike.

    A result of 64 MB then no longer costs its page faults, which take several times as long as filling it. False
    where there is no mallopt (glibc has it).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    no_mmap, trim_threshold = (-4, 0), (-1, 2**31 - 1)
    return all(bool(mallopt(*setting)) for setting in (no_mmap, trim_threshold))


def cpu_name() -> str:
    """As the system calls the processor."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine(*modules: Any, device: str = "cpu") -> dict[str, Any]:
    """Processor, cores, threads, device and versions; `modules` adds those of other packages."""
    cuda = device.startswith("cuda")
    return {
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
                    "system": platform.system(), "load": _load(),
                    "device": torch.cuda.get_device_name() if cuda else "cpu"},
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "precscope": precscope.__version__,
                     **{m.__name__: getattr(m, "__version__", "?") for m in modules}},
    }  # fmt: skip


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def check(targets: Sequence[Target]) -> None:
    """Print each target with its figure."""
    for target in targets:
        print(f"target, {target}")


def write_json(
    path: Path | str | None, benchmark: str, rows: Sequence[Any], *, targets: Sequence[Target] = (), **more: Any
) -> None:
    """Write {"schema": 1, "benchmark": ..., machine, versions, ..., "rows": [...]}; nothing where path is None."""
    if path is None:
        return
    content = {"schema": 1, "benchmark": benchmark, **({} if "machine" in more else machine()), **more}
    if targets:
        content["targets"] = [{**asdict(t), "held": t.held} for t in targets]
    content["rows"] = list(rows)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    print(f"wrote {path}", file=sys.stderr)
