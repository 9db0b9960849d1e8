"""How long the command line takes to answer: whole processes, from start to exit.

python benchmarks/startup.py [--runs 15] [--json OUT]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

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
    results = {}
    for name, command in COMMANDS.items():
        seconds(command)
        times = [seconds(command) for _ in range(options.runs)]
        results[name] = {"median_s": statistics.median(times), "max_s": max(times)}
        print(f"{name:<28} median {results[name]['median_s']:.3f} s, slowest {results[name]['max_s']:.3f} s")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
