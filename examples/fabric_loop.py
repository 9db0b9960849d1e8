"""A loop with Lightning Fabric, recorded, and trained with a plan that holds fp16: what has to be written.

    python examples/fabric_loop.py --steps 100

`ps.record` takes what `fabric.setup` returns. FabricPlanPrecision stands in for Fabric(precision=...), and scales the
loss as the plan says, on the CPU, too, where Fabric itself has no fp16. This loss is small, as where it is one of
several: without the scale most gradients are flushed to zero. Needs `pip install "precscope[lightning]"`. Seconds on
two CPU cores.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric

import precscope as ps
from precscope.integrations.lightning import FabricPlanPrecision

WEIGHT = 1e-6


def batch(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points in 8 dimensions [64, 8], and the sine of four of them."""
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(index))
    return x, torch.sin(x[:, :4])


def train(steps: int, out: Path, plan: ps.PrecisionPlan | None = None) -> float:
    """Loss on a held-out batch, relative to its variance."""
    torch.manual_seed(0)
    precision = FabricPlanPrecision(plan or ps.PrecisionPlan(default="fp32"))
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[precision])
    inner = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.GELU(), torch.nn.Linear(64, 4))
    model, optimizer = fabric.setup(inner, torch.optim.Adam(inner.parameters(), lr=1e-2, eps=1e-16))
    with ps.record(model, out, optimizer=optimizer, scaler=precision.scaler, every=10) as rec:
        for step in range(steps):
            x, y = batch(step)
            fabric.backward(WEIGHT * F.mse_loss(model(x), y))
            fabric.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=False)
            optimizer.step()
            optimizer.zero_grad()
            rec.step()
    precision.remove()  # the model is plain again: this is how it would be saved
    x, y = batch(10**6)
    with torch.no_grad():
        return float(F.mse_loss(inner(x), y) / y.var())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args().steps
    warnings.filterwarnings("ignore", module="lightning")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"fp32                     relative loss {train(steps, folder / 'fp32'):.4f}")
        profile = ps.Profile.load(folder / "fp32")
        lost = profile.ask("fp16", roles=["grad_output"]).flushed.max()
        print(f"asked for fp16           {lost:.0%} of a layer's gradients would be flushed without a loss scale")
        scale = ps.recommend(profile, formats=("fp16", "fp32")).loss_scale
        for words, loss_scale in (
            ("no loss scale", {"initial": 1.0, "growth_interval": 10**6}),
            (f"scale 2^{math.log2(scale['initial']):.0f}", scale),
        ):
            plan = ps.PrecisionPlan.uniform("fp16").replace(loss_scale=loss_scale)
            print(f"fp16, {words:<18} relative loss {train(steps, folder / words, plan):.4f}")


if __name__ == "__main__":
    main()
