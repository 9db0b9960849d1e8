"""How long the command line takes to answer: whole processes, from start to exit.

python benchmarks/startup.py [--runs 15] [--json OUT]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import Target, check, machine, write_json

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "precscope --help": [sys.executable, "-m", "precscope", "--help"],
    "precscope profile --help": [sys.executable, "-m", "precscope", "profile", "--help"],
    "import precscope": [sys.executable, "-c", "import precscope"],
}


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for name, command in COMMANDS.items():
        seconds(command)
        times = [seconds(command) for _ in range(options.runs)]
        rows.append({"command": name, "median_s": statistics.median(times), "max_s": max(times)})
        print(f"{name:<28} median {rows[-1]['median_s']:.3f} s, slowest {rows[-1]['max_s']:.3f} s")
    asked = [Target(r["command"], r["median_s"], 0.5) for r in rows if r["command"].startswith("precscope")]
    check(asked)
    write_json(options.json, "startup", rows, targets=asked, runs=options.runs, **machine())


if __name__ == "__main__":
    main()
