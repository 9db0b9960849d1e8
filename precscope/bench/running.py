"""Runs the scripts of the repository's benchmarks/: one with its own arguments, or all in turn into a folder.

Each runs in a process of its own, so that none meets the caches and settings of another. A folder gets NAME.json (the
figures; of gpu, gpu/gpu.json), NAME.txt (what was printed) and bench.json, the index: what ran, for how long, with what
exit status.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import RunError, UsageError, nearest
from ..store import replacing
from . import BENCHMARKS, Benchmark


@dataclass(frozen=True)
class Ran:
    """How one benchmark ended. status: "done", "failed" or "skipped", with its reason. json and text are relative to
    the folder; held of targets: how many of the targets that it states were held."""

    name: str
    status: str
    seconds: float = 0.0
    exit_status: int | None = None
    reason: str = ""
    json: str | None = None
    text: str | None = None
    held: int = 0
    targets: int = 0


def scripts() -> Path:
    """The folder benchmarks/ of the checkout that this package is imported from, or that one stands in.

    Raises RunError where there is none.
    """
    for root in (Path(__file__).parents[2], Path.cwd()):
        if (root / "benchmarks" / "recorder.py").is_file() and (root / "precscope").is_dir():
            return root / "benchmarks"
    raise RunError(
        "this benchmark is a file of the precscope repository, and this precscope was installed without it: run the "
        "command in a checkout (precscope bench zoo needs none)"
    )


def missing(benchmark: Benchmark) -> list[str]:
    """Packages that it needs and that are not installed."""
    return [name for name in benchmark.needs if importlib.util.find_spec(name) is None]


def command(name: str, arguments: Sequence[str]) -> list[str]:
    """The command line of one benchmark; --quick among the arguments stands for its short setting.

    Raises UsageError for an unknown name, RunError without a checkout or a package that it needs.
    """
    if name not in BENCHMARKS:
        hint = nearest(name, BENCHMARKS)
        raise UsageError(f"there is no benchmark {name!r}" + (f" (did you mean {hint}?)" if hint else "")
                         + f"; there are {', '.join(BENCHMARKS)}")  # fmt: skip
    benchmark = BENCHMARKS[name]
    given = [b for a in arguments for b in (benchmark.quick if a == "--quick" else (a,))]
    if not benchmark.script:
        return [sys.executable, "-m", "precscope", "bench", name, *given]
    path = scripts() / f"{name}.py"
    if not path.is_file():
        raise RunError(f"{path} does not exist: this checkout and this precscope are of different versions")
    if lacking := missing(benchmark):
        raise RunError(f"the benchmark {name} needs {' and '.join(lacking)}: install it with pip and run this again")
    return [sys.executable, str(path), *given]


def environment(root: Path | None) -> dict[str, str]:
    """That of this process, with the checkout's package first, whichever is installed."""
    kept = os.environ.get("PYTHONPATH", "")
    paths = [str(root)] * (root is not None) + [kept] * bool(kept)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)} if paths else dict(os.environ)


def run_one(name: str, arguments: Sequence[str]) -> int:
    """Run one benchmark here and now, its output passed through; its exit status."""
    line = command(name, arguments)
    sys.stdout.flush()
    root = Path(__file__).parents[2] if not BENCHMARKS[name].script else scripts().parent
    return subprocess.run(line, env=environment(root)).returncode


def run_all(
    out: Path, *, quick: bool = False, only: Sequence[str] = (), note: Callable[[str], None] = lambda text: None
) -> list[Ran]:
    """Run all benchmarks, or those of `only`, in turn into the folder `out`; one that fails does not stop the rest.

    note: is told what begins and how it ended. Raises UsageError for unknown names, RunError without a checkout and
    where nothing can be written.
    """
    names = list(dict.fromkeys(only)) or list(BENCHMARKS)
    for name in names:
        if name not in BENCHMARKS:
            command(name, ())  # says what there is
    folder = scripts()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write to {out}: {error.strerror or error}; choose another folder with --out") from error
    done: list[Ran] = []
    for name in names:
        note(f"{name}: {BENCHMARKS[name].what}")
        done.append(_run_into(out, name, quick, folder.parent))
        note(f"{name}: {describe(done[-1])}")
        _write_index(out, done, quick)
    return done


def describe(ran: Ran) -> str:
    """How it ended, in a few words."""
    if ran.status == "skipped":
        return f"skipped: {ran.reason}"
    words = f"{ran.status} in {ran.seconds:.0f} s"
    if ran.targets:
        words += f", {ran.held} of {ran.targets} targets held"
    return words + (f": {ran.reason}" if ran.reason else "")


def table(done: Sequence[Ran]) -> str:
    """A line per benchmark: name, seconds, exit status, what else there is to say."""
    lines = [f"{'benchmark':<16}{'seconds':>8}{'exit':>6}  how it ended"]
    for ran in done:
        seconds = f"{ran.seconds:.1f}" if ran.status != "skipped" else ""
        exit_status = "" if ran.exit_status is None else ran.exit_status
        targets = f", {ran.held} of {ran.targets} targets held" if ran.targets else ""
        reason = f": {ran.reason}" if ran.reason else ""
        lines.append(f"{ran.name:<16}{seconds:>8}{exit_status:>6}  {ran.status}{targets}{reason}")
    return "\n".join(lines)


def _run_into(out: Path, name: str, quick: bool, root: Path) -> Ran:
    benchmark = BENCHMARKS[name]
    if benchmark.cuda and not _has_cuda():
        return Ran(name, "skipped", reason="there is no CUDA device")
    if lacking := missing(benchmark):
        return Ran(name, "skipped", reason=f"needs {' and '.join(lacking)}, not installed")
    places = [word.format(stem=out / name) for word in benchmark.output]
    text = out / f"{name}.txt"
    figures = out / f"{name}.json" if "--json" in benchmark.output else out / name / f"{name}.json"
    figures.unlink(missing_ok=True)  # one of an earlier run would be taken for this one's
    try:
        line = command(name, [*(["--quick"] if quick else []), *places])
    except RunError as error:
        return Ran(name, "failed", reason=str(error))
    start = time.perf_counter()
    with text.open("w", encoding="utf-8") as file:
        ended = subprocess.run(line, env=environment(root), stdout=file, stderr=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - start
    reason = ""
    if ended.returncode:
        said = [line.strip() for line in ended.stderr.splitlines() if line.strip()]
        reason = said[-1][:200] if said else ""
        with text.open("a", encoding="utf-8") as file:
            file.write(f"\nexit status {ended.returncode}\n{ended.stderr}")
    held, targets = (0, 0) if quick else _targets(figures)  # the figures of a short setting mean nothing
    return Ran(
        name, "failed" if ended.returncode else "done", round(seconds, 1), ended.returncode, reason,
        figures.relative_to(out).as_posix() if figures.is_file() else None, text.name, held, targets,
    )  # fmt: skip


def _targets(path: Path) -> tuple[int, int]:
    """How many of the targets that a file of figures states were held, and how many there are."""
    if not path.is_file():
        return 0, 0
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # ended in the middle of writing
        return 0, 0
    found = content.get("targets", []) if isinstance(content, dict) else []
    judged = [t for t in found if t.get("status") != "not measured"]  # as benchmarks/gpu.py calls them
    return sum(bool(t.get("held", t.get("status") == "met")) for t in judged), len(judged)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _write_index(out: Path, done: Sequence[Ran], quick: bool) -> None:
    """The index of what ran so far."""
    content: dict[str, Any] = {
        "schema": 1, "benchmark": "all", "quick": quick, "precscope": __version__,
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                    "system": platform.system(), "python": platform.python_version()},
        "rows": [asdict(ran) for ran in done],
    }  # fmt: skip
    with replacing(out / "bench.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
