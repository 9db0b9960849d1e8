"""Which other modules cure a case of the zoo: writes accept.json.

For each failing (case, format) every single module outside the guilty ones (their containers left out) is kept in fp32
alone, and each guilty one of several is left low alone, under three seeds; what cures under all of them is an answer.

    python benchmarks/zoo_answers.py [FOLDER]          # default: precscope/zoo; takes about two minutes
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from precscope.bench.cases import FORMATS, Case, load_cases
from precscope.bench.harness import fails, islands, run_case
from precscope.bench.zoo import own_zoo

SEEDS = (0, 1, 2)


def cures(case: Case, fmt: str, modules: list[str]) -> bool:
    """Whether fp32 in `modules` alone makes the case train, under every seed."""
    for seed in SEEDS:
        planned = run_case(case, fmt=fmt, plan=islands(case, fmt, modules), seed=seed)
        if fails(case, planned, run_case(case, seed=seed)):
            return False
    return True


def answers(case: Case, fmt: str) -> dict[str, list[str]]:
    """The entry of accept.json for one failing pair."""
    guilty = case.guilty[fmt]
    names = [n for n, _ in case.build()[0].named_modules() if n and n not in guilty]
    others = [n for n in names if not any(g.startswith(f"{n}.") or n.startswith(f"{g}.") for g in guilty)]
    return {
        "also_cures_alone": [n for n in others if cures(case, fmt, [n])],
        "guilty_not_strictly_needed": [
            g for g in guilty if len(guilty) > 1 and cures(case, fmt, [o for o in guilty if o != g])
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="of case files (default: those of precscope)")
    folder = parser.parse_args().folder or own_zoo()
    torch.set_num_threads(1)
    found: dict[str, dict[str, dict[str, list[str]]]] = {}
    for case in load_cases(folder):
        for fmt in FORMATS:
            if case.fails_in(fmt):
                found.setdefault(case.name, {})[fmt] = answers(case, fmt)
                print(case.name, fmt, found[case.name][fmt], flush=True)
    path = folder / "accept.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
