"""What recording costs at module level: step times of a model unwatched and watched, interleaved in one run.

    python benchmarks/recorder.py [--model gpt resnet] [--steps 60] [--precision fp32 bf16] [--json OUT]

Single steps in turn, in an order drawn anew each turn; ratios are those of benchmarks/peers.py, which says how they are
taken, with more turns and without the other tools. "unwatched again" shows the noise.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import check, machine, write_json
from peers import measure, targets
from realmodels import MODELS, Missing

SHOWN = ("unwatched again", "precscope every=1", "precscope every=10", "precscope every=100")


def line(rows: list[dict[str, Any]]) -> str:
    """One line of the table: the ratios, and the flushes in them."""
    by = {row["tool"]: row for row in rows}
    ratios = "".join(f"{by[name]['ratio']:>10.3f}" for name in SHOWN)
    flushes = ", ".join(f"{by[name]['of_which_flushes']:.3f}" for name in SHOWN[1:])
    label = f"{rows[0]['model']} {rows[0]['precision']}"
    return f"{label:<12} {by['unwatched']['step_ms']:>9.1f} ms{ratios}   {flushes}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["gpt"], choices=tuple(MODELS))
    parser.add_argument("--steps", type=int, default=60, help="timed turns, after 2 to warm up (default: 60)")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows, asked, left_out = [], [], {}
    print(f"{'':<12} {'unwatched':>12}{'again':>10}{'every=1':>10}{'every=10':>10}{'every=100':>10}   of which flushes")
    for model in options.model:
        for precision in options.precision:
            try:
                found = measure(model, precision, options.steps, ["again", "every="])["rows"]
            except Missing as missing:
                print(f"{model}: skipped, {missing}")
                left_out[model] = str(missing)
                continue
            print(line(found), flush=True)
            rows += found
            if model == "gpt":
                asked += targets(found)
    check(asked)
    write_json(options.json, "recorder", rows, targets=asked, steps=options.steps, left_out=left_out, **machine())


if __name__ == "__main__":
    main()
