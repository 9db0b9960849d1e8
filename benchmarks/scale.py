"""How run directories of large models and long runs are written, loaded and judged: times, sizes and peak memory.

    python benchmarks/scale.py [--sites 100 1000 10000] [--steps 10 1000 100000] [--most 10000000] [--json OUT]

Directories are synthetic (synthetic.py) and go through the real writer, flushed as a recorder flushes. A combination of
more than --most rows is not run, and the table says so. Each stage runs in a process of its own: `load` is
Profile.load, and the others begin with a loaded profile. Times leave out starting Python and importing; peak memory
(ru_maxrss) holds everything, `base` of it being there after the imports. `write` counts the writer's own time, without
the making up of numbers. `load, no aggregate` is what a killed run costs at worst: the sums made again from all parts.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STAGES = ("write", "load", "load, no aggregate", "ask", "recommend", "report")


def peak_mb() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_stage(stage: str, out: Path, sites: int, steps: int) -> dict[str, Any]:
    """One stage in this process."""
    if stage == "write":
        return _write(out, sites, steps)
    import pandas  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import scipy.optimize  # noqa: F401

    import precscope as ps

    base = peak_mb()
    if stage.startswith("load"):
        if stage != "load":
            (out / "aggregate.parquet").rename(out / "aside")
        try:
            seconds = _timed(lambda: ps.Profile.load(out))
        finally:
            if stage != "load":
                (out / "aside").rename(out / "aggregate.parquet")
        return {"seconds": seconds, "peak_mb": peak_mb(), "base_mb": base}
    profile = ps.Profile.load(out)
    page = out / "report.html"
    actions: dict[str, Callable[[], Any]] = {
        "ask": lambda: profile.ask("e4m3"),
        "recommend": lambda: ps.recommend(profile, formats=("fp16", "bf16", "fp32")),
        "report": lambda: ps.report(out, out=page),
    }
    result = {"seconds": _timed(actions[stage]), "peak_mb": peak_mb(), "base_mb": base}
    if stage == "report":
        result["page_mb"] = page.stat().st_size / 1e6
        page.unlink()
    return result


def _timed(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _write(out: Path, sites: int, steps: int) -> dict[str, Any]:
    import pandas  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    from synthetic import write_run

    base, spent = peak_mb(), []
    write_run(out, sites, steps, timed=lambda work: spent.append(_timed(work)))
    files = [p for p in out.iterdir() if p.is_file()]
    return {
        "seconds": sum(spent), "longest_s": max(spent), "rows_per_s": sites * steps / sum(spent), "peak_mb": peak_mb(),
        "base_mb": base, "directory_mb": sum(p.stat().st_size for p in files) / 1e6, "files": len(files),
        "bytes_per_row": sum(p.stat().st_size for p in out.glob("stats-*")) / (sites * steps),
    }  # fmt: skip


def measure(sites: int, steps: int, folder: Path) -> list[dict[str, Any]]:
    """All stages for one size."""
    rows, out = [], folder / f"{sites}x{steps}"
    for stage in STAGES:
        command = [sys.executable, __file__, "--stage", stage, str(out), str(sites), str(steps)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{stage} of {sites} sites x {steps} steps failed:\n{done.stderr[-2000:]}")
        rows.append({"sites": sites, "steps": steps, "stage": stage, **json.loads(done.stdout.splitlines()[-1])})
        print(_line(rows[-1]), flush=True)
    shutil.rmtree(out)
    return rows


def _line(row: dict[str, Any]) -> str:
    text = (
        f"{row['sites']:>7,} {row['steps']:>8,}  {row['stage']:<19} {row['seconds']:>8.2f} s {row['peak_mb']:>7.0f} MB"
    )
    if row["stage"] == "write":
        text += (
            f"   {row['rows_per_s']:,.0f} rows/s, {row['directory_mb']:.1f} MB in {row['files']} files, "
            f"{row['bytes_per_row']:.1f} bytes/row, longest call {row['longest_s']:.2f} s"
        )
    return text + (f"   page {row['page_mb']:.1f} MB" if "page_mb" in row else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 1000, 100_000])
    parser.add_argument("--most", type=int, default=10_000_000, help="rows; larger directories are not made")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--stage", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        stage, out, sites, steps = options.stage
        print(json.dumps(run_stage(stage, Path(out), int(sites), int(steps))))
        return
    rows, skipped = [], []
    print(f"{'sites':>7} {'steps':>8}  {'stage':<19} {'time':>10} {'peak':>10}")
    with tempfile.TemporaryDirectory() as folder:
        for sites in options.sites:
            for steps in options.steps:
                if sites * steps > options.most:
                    print(f"{sites:>7,} {steps:>8,}  not run: {sites * steps:,} rows, more than {options.most:,}")
                    skipped.append([sites, steps])
                else:
                    rows += measure(sites, steps, Path(folder))
    from common import check, machine, write_json

    targets = _targets(rows)
    check(targets)
    write_json(options.json, "scale", rows, targets=targets, not_run=skipped, **machine())


def _targets(rows: list[dict[str, Any]]) -> list[Any]:
    """What is asked of 10,000 sites x 1,000 steps, where that was run."""
    from common import Target

    of = {row["stage"]: row for row in rows if (row["sites"], row["steps"]) == (10_000, 1000)}
    if not of:
        return []
    return [
        Target("10,000 x 1,000: directory, MB", of["write"]["directory_mb"], 400),
        Target("load of the aggregate, s", of["load"]["seconds"], 3),
        Target("ask, s", of["ask"]["seconds"], 1),
        Target("recommend, s", of["recommend"]["seconds"], 20),
        Target("report, s", of["report"]["seconds"], 20),
        Target("report's page, MB", of["report"]["page_mb"], 15),
    ]


if __name__ == "__main__":
    main()
