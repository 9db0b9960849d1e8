"""Predicted shares of swallowed updates against really storing the parameters of the demo GPT in bf16 and fp16.

The parameters are rounded to the format before the first step and again after every step, as if they were stored in it
(the optimizer computes in fp32). The recorder sees w and dw at each step, its histograms give bounds [lo, hi] and an
expected share; the real share is that of the elements whose stored value did not change although dw was not zero.

    python benchmarks/swallowed.py [--size tiny] [--steps 10] [--json OUT]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import write_json

import precscope as ps
from precscope.histogram import swallowed_expected, swallowed_share
from precscope.sites import Role, Site
from precscope.training.tasks.gpt import gpt

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMIZERS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


def measure(size: str, optimizer: str, lr: float, name: str, steps: int, folder: Path) -> dict[str, Any]:
    """Train with parameters stored in one format; shares over all parameters and steps."""
    torch.manual_seed(0)
    task, dtype, fmt = gpt(size), DTYPES[name], ps.get_format(name)
    parameters = dict(task.model.named_parameters())
    made = OPTIMIZERS[optimizer](parameters.values(), lr=lr)
    swallowed = dict.fromkeys(parameters, 0)
    subnormal = dict.fromkeys(parameters, 0)
    with torch.no_grad():
        for p in parameters.values():
            p.copy_(p.to(dtype))
    with ps.record(task.model, folder, optimizer=made, every=1) as rec:
        for step in range(steps):
            made.zero_grad()
            task.loss(task.model, task.batch(step)).backward()
            before = {n: p.detach().clone() for n, p in parameters.items()}
            made.step()
            with torch.no_grad():
                for n, p in parameters.items():
                    stored = p.to(dtype).float()
                    swallowed[n] += int(((stored == before[n]) & (p != before[n])).sum())
                    subnormal[n] += int(((before[n].abs() < fmt.smallest_normal) & (p != before[n])).sum())
                    p.copy_(stored)
            rec.step()
    profile = ps.Profile.load(folder)
    total = lo = hi = expected = 0.0
    outside = []
    for n, p in parameters.items():
        module, _, tensor = n.rpartition(".")
        counts, unchanged, from_zero = profile.ratios[profile.sites.index(Site(module, Role.UPDATE, 0, tensor))]
        size_n = p.numel() * steps
        arguments = {"unchanged": unchanged, "from_zero": from_zero}
        low, high = swallowed_share(counts, fmt.precision, uncertain=subnormal[n] / size_n, **arguments)
        slack = 1e-9  # of the sums in float64
        if not low - subnormal[n] / size_n - slack <= swallowed[n] / size_n <= high + slack:
            outside.append(n)
        total += size_n
        lo, hi = lo + low * size_n, hi + high * size_n
        expected += swallowed_expected(counts, fmt.precision, **arguments) * size_n
    real = sum(swallowed.values())
    return {"optimizer": optimizer, "lr": lr, "format": name, "lo": lo / total, "expected": expected / total,
            "hi": hi / total, "real": real / total, "parameters": len(parameters), "outside": outside}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    print("optimizer      lr  format      lo  expected      hi    real  parameters outside their bounds")
    for optimizer, rates in (("adamw", (1e-5, 1e-4, 1e-3)), ("sgd", (1e-3, 1e-2, 1e-1))):
        for lr in rates:
            for name in DTYPES:
                with tempfile.TemporaryDirectory() as folder:
                    row = measure(options.size, optimizer, lr, name, options.steps, Path(folder) / "run")
                results.append(row)
                print(f"{optimizer:<9} {lr:7g}  {name:<6} {row['lo']:7.2%}  {row['expected']:8.2%} {row['hi']:7.2%} "
                      f"{row['real']:7.2%}  {len(row['outside'])} of {row['parameters']}")  # fmt: skip
    write_json(options.json, "swallowed", results, size=options.size, steps=options.steps)


if __name__ == "__main__":
    main()
