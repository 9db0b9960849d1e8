"""What precscope holds for: architectures of transformers, diffusers, torch_geometric, timm and plain PyTorch, tiny and
with random weights, each recorded, planned and restored by the checks of tests/test_architectures.py.

    python benchmarks/compatibility.py --out docs/compatibility.md [--only NAME ...] [--timm DIR] [--json OUT]

A minute or three on one core. Ends with status 1 where a check failed. timm needs torchvision, whose wheels are built
for CUDA: beside a CPU build of torch its operators do not load, and transformers then fails to import, too. So timm is
looked at in a process of its own, from a folder of its own, with the operators declared empty:

    pip install --no-deps --target DIR timm torchvision
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
from architecture_checks import RECORDED, Recorded, Result, check  # noqa: E402
from architectures import ARCHITECTURES, Architecture  # noqa: E402
from common import machine, write_json  # noqa: E402

PACKAGES = ("torch", "transformers", "diffusers", "torch_geometric", "timm")
HEAD = """# Compatibility

Each architecture is built in a tiny configuration with random weights and trained for 3 steps in fp32, under bf16 and
under fp16 autocast (with a GradScaler) on a CPU, with and without the recorder; then plans are put on it, a step is
trained, and they are taken off. Made by

    python benchmarks/compatibility.py --out docs/compatibility.md{options}

with {versions}.

The same checks are `pytest tests/test_architectures.py` (a varied dozen by default, all with `make test-all`); command
and tests fail where a cell says anything but what is explained below.

- fp32, bf16, fp16: recorded sites. Losses, gradients and weights equal those of the run that was not watched bit for
  bit, or the cell says that they differ.
- coverage: leaf modules that gave floating tensors, and those at whose outputs gradients arrived: how many of them have
  statistics with just the number of elements and the largest magnitude that plain torch hooks saw. All precisions.
- mixed: modules in turn in fp32, bf16 and fp16. recommended: `ps.recommend` of the recorded run, without a task. cast:
  bf16 without autocast, every second block fp32. rec. cast: recommended with policy="cast". "ok": the plan
  applies, a step trains to a finite loss with finite gradients, and removing it restores keys, classes and outputs bit
  for bit.
"""


def main() -> int:
    options = _arguments()
    torch.set_num_threads(1)  # sums of several threads may differ in their last bit from run to run
    if options.stub:
        _declare_operators()
    chosen = [a for a in ARCHITECTURES.values() if not options.only or a.name in options.only]
    timm = [a for a in chosen if a.package == "timm"]
    if options.timm:
        chosen = [a for a in chosen if a.package != "timm"]
    results, skipped = _check(chosen, require=options.stub)
    packages = _versions()
    if options.timm and timm:
        more, versions = _in_a_process_of_its_own(options.timm, timm)
        results += more
        packages |= versions
    else:
        skipped += [a.name for a in timm if a.name not in skipped and a.name not in {r.name for r in results}]
    for name in dict.fromkeys(skipped):
        print(f"skipped: {name}, {ARCHITECTURES[name].package} is not installed")
    if options.out:
        options.out.write_text(_page(results, packages, timm=bool(options.timm)), encoding="utf-8")
        print(f"wrote {options.out}")
    write_json(options.json, "compatibility", [asdict(r) for r in results], packages=packages, **machine())
    faults = [f"{r.name}: {fault}" for r in results for fault in r.faults]
    print(f"{len(results)} architectures, {len(faults)} faults", *faults, sep="\n")
    return 1 if faults else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the page to write")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="architectures, by the names of the table")
    parser.add_argument("--timm", type=Path, metavar="DIR", help="a folder that holds timm and torchvision")
    parser.add_argument("--json", type=Path, metavar="OUT", help="results as JSON")
    parser.add_argument("--stub", action="store_true", help="declare torchvision's operators (used by --timm itself)")
    options = parser.parse_args()
    if unknown := set(options.only or ()) - set(ARCHITECTURES):
        parser.error(f"no architecture {sorted(unknown)[0]!r}; there are {', '.join(ARCHITECTURES)}")
    return options


def _check(chosen: Sequence[Architecture], *, require: bool = False) -> tuple[list[Result], list[str]]:
    """Results, and the names of those whose package is missing."""
    results, skipped = [], []
    for architecture in chosen:
        if importlib.util.find_spec(architecture.package) is None and not require:
            skipped.append(architecture.name)
            continue
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries; the tests turn those of precscope into errors
            results.append(check(architecture, Path(folder)))
        print(
            f"{architecture.name:<24}{results[-1].seconds:6.1f} s  {'; '.join(results[-1].faults) or 'ok'}", flush=True
        )
    return results, skipped


def _in_a_process_of_its_own(folder: Path, chosen: Sequence[Architecture]) -> tuple[list[Result], dict[str, str]]:
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "results.json"
        names = [a.name for a in chosen]
        paths = os.pathsep.join(filter(None, [str(ROOT), str(folder), os.environ.get("PYTHONPATH", "")]))
        subprocess.run(
            [sys.executable, __file__, "--stub", "--json", str(out), "--only", *names],
            env={**os.environ, "PYTHONPATH": paths},
        )
        if not out.is_file():
            raise SystemExit(f"the process with {folder} on its path wrote nothing: is timm there?")
        content = json.loads(out.read_text(encoding="utf-8"))
    rows = [{**r, "recorded": {p: Recorded(**v) for p, v in r["recorded"].items()}} for r in content["rows"]]
    return [Result(**row) for row in rows], content["packages"]


def _declare_operators() -> None:
    """What torchvision looks up when it is imported; no model here calls it."""
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        if importlib.util.find_spec(package) is not None:
            found[package] = importlib.metadata.version(package.replace("_", "-"))
    return found


def _page(results: Sequence[Result], packages: dict[str, str], *, timm: bool) -> str:
    import precscope

    versions = ", ".join(f"{name} {version}" for name, version in packages.items())
    head = HEAD.format(
        options=" --timm DIR" if timm else "",
        versions=f"Python {platform.python_version()}, precscope {precscope.__version__}, {versions}",
    )
    whole = " and ".join(r.name for r in results if ARCHITECTURES[r.name].whole)
    head += _WHOLE.format(names=whole) if whole else ""
    lines = [
        "| architecture | class | modules | fp32 | bf16 | fp16 | coverage | mixed | recommended | cast | rec. cast |",
        "|---|---|--:|--:|--:|--:|--:|---|---|---|---|",
    ]
    notes: list[str] = []
    lines += ["| " + " | ".join(map(str, _row(result, notes))) + " |" for result in results]
    full = sum(not r.faults for r in results)
    recorded = [p for r in results for p in r.recorded.values() if p.ran]
    covered, leaves = sum(p.covered for p in recorded), sum(p.leaves for p in recorded)
    summary = (
        f"{full} of {len(results)} architectures without a fault of precscope's ({len(notes)} notes tell what PyTorch "
        f"cannot run on a CPU); {sum(p.identical for p in recorded)} of "
        f"{len(recorded)} recorded runs equal bit for bit; {covered} of {leaves} statistics of leaf modules are right."
    )
    below = [""] * bool(notes) + [f"{i}. {note}" for i, note in enumerate(notes, 1)] + [_TIMM] * timm
    return "\n".join([head, summary, "", *lines, *below]) + "\n"


_WHOLE = """- In {names} the mixed plan takes each attention as one: their code masks the scores with the least value of
  the queries' dtype, which the scores' own dtype may not have, so that projections and products must agree.
"""
_TIMM = """
timm ran with torchvision's operators declared empty (see the script): its wheels are built for CUDA, and a CPU build of
torch cannot load them. The tests skip timm where it is not installed."""


def _row(result: Result, notes: list[str]) -> list[Any]:
    recorded = result.recorded.values()
    coverage = f"{sum(p.covered for p in recorded)}/{sum(p.leaves for p in recorded)}"
    return [
        result.name, result.cls, result.modules, *(_cell(p, notes) for p in recorded), coverage,
        *(_note(fault, notes) if fault else "ok" for fault in result.plans.values()),
    ]  # fmt: skip


def _cell(recorded: Recorded, notes: list[str]) -> str:
    if recorded.status != RECORDED:
        return _note(f"PyTorch does not run it on a CPU: {recorded.status}", notes)
    return f"{recorded.sites}" if recorded.identical else f"{recorded.sites}, differs"


def _note(text: str, notes: list[str]) -> str:
    """A number for what is explained below the table."""
    if text not in notes:
        notes.append(text)
    return f"no ({notes.index(text) + 1})"


if __name__ == "__main__":
    sys.exit(main())
