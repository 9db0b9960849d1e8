"""A loop with Accelerate, recorded and trained with a plan that holds fp16: what has to be written.

    python examples/accelerate_loop.py --steps 100

`ps.record` takes what `accelerator.prepare` returns. `planned` puts a plan in force for all that is prepared inside it:
fp16 gradients are then scaled by the plan's loss scale, on the CPU too, where Accelerate itself has none. Needs
`pip install "precscope[hf]"`. Seconds on two CPU cores.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator

import precscope as ps
from precscope.integrations.accelerate import planned

WEIGHT = 1e-6  # of this loss, as where it is one of several: its gradients are small


def batch(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points in 8 dimensions, and the sine of four of them."""
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(index))
    return x, torch.sin(x[:, :4])


def train(steps: int, out: Path, plan: ps.PrecisionPlan | None = None) -> float:
    """Loss on a held-out batch after `steps` optimizer steps of two micro-batches, relative to its variance."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.GELU(), torch.nn.Linear(64, 4))
    with planned(accelerator, plan, model) if plan else nullcontext():
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, eps=1e-16)
        prepared, optimizer = accelerator.prepare(model, optimizer)
        with ps.record(prepared, out, optimizer=optimizer, scaler=accelerator.scaler, every=10) as rec:
            for index in range(2 * steps):
                x, y = batch(index)
                with accelerator.accumulate(prepared):
                    accelerator.backward(WEIGHT * F.mse_loss(prepared(x), y))
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients:
                    rec.step()
        x, y = batch(10**6)
        with torch.no_grad():
            return float(F.mse_loss(prepared(x), y) / y.var())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"fp32                     relative loss {train(steps, folder / 'fp32'):.4f}")
        profile = ps.Profile.load(folder / "fp32")
        lost = profile.ask("fp16", roles=["grad_output"]).flushed.max()
        print(f"fp16, asked              {lost:.0%} of a layer's gradients would be flushed without a loss scale")
        scale = ps.recommend(profile, formats=("fp16", "fp32")).loss_scale
        plan = ps.PrecisionPlan.uniform("fp16").replace(loss_scale=scale)
        for name, half in (
            ("no loss scale", plan.replace(loss_scale={"initial": 1.0, "growth_interval": 10**6})),
            (f"scale 2^{math.log2(plan.loss_scale['initial']):.0f}", plan),
        ):
            print(f"plan, {name:<19}relative loss {train(steps, folder / name, half):.4f}")


if __name__ == "__main__":
    main()
