"""Two models, two optimizers, one loop: a GAN, recorded as one run and trained with one plan.

    python examples/gan_two_models.py --steps 400

`nn.ModuleDict` puts the two under one roof, which is never called itself: names are then "g.0", "d.2". Both optimizers
are given, and a step is a round of both. Each model may as well have a recorder (and a plan) of its own. The generator
learns a ring of radius 2. The plan is only predicted: whether a GAN ends as well with it, runs over several seeds tell.
Seconds on two CPU cores.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import precscope as ps


def ring(count: int, generator: torch.Generator) -> torch.Tensor:
    """Points [count, 2] on a circle of radius 2, a little off it."""
    angle = 6.283185 * torch.rand(count, generator=generator)
    return 2 * torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(count, 2, generator=generator)


def make() -> nn.ModuleDict:
    torch.manual_seed(0)
    g = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    d = nn.Sequential(nn.Linear(2, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
    return nn.ModuleDict({"g": g, "d": d})


def train(steps: int, out: Path | None = None, plan: ps.PrecisionPlan | None = None) -> tuple[float, torch.Tensor]:
    """How far generated points are from the ring, on average, and all weights."""
    both = make()
    g, d = both["g"], both["d"]
    of_g = torch.optim.Adam(g.parameters(), lr=2e-3, betas=(0.0, 0.9))
    of_d = torch.optim.Adam(d.parameters(), lr=2e-3, betas=(0.0, 0.9))
    draw = torch.Generator().manual_seed(1)
    with (
        ps.apply(plan, both) if plan else nullcontext(),
        ps.record(both, out, optimizer=[of_g, of_d], every=50) if out else nullcontext() as rec,
    ):
        for _ in range(steps):
            fake = g(torch.randn(128, 2, generator=draw))
            d.requires_grad_(True)
            of_d.zero_grad()
            (F.softplus(-d(ring(128, draw)).float()) + F.softplus(d(fake.detach()).float())).mean().backward()
            of_d.step()

            d.requires_grad_(False)
            of_g.zero_grad()
            F.softplus(-d(fake).float()).mean().backward()
            of_g.step()
            if rec is not None:
                rec.step()
        with torch.no_grad():
            points = g(torch.randn(2048, 2, generator=draw)).float()
    return float((points.norm(dim=1) - 2).abs().mean()), torch.cat([p.detach().flatten() for p in both.parameters()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "fp32"
        (off, weights), (_, alone) = train(steps, out), train(steps)
        print(f"fp32        off the ring by {off:.3f}; unwatched the same: {torch.equal(weights, alone)}")
        profile = ps.Profile.load(out)
        rows = profile.ask("fp16", roles=["grad_output", "update"])
        for (role, model), row in rows.groupby(["role", rows.module.str[0]])[["amax", "flushed"]].max().iterrows():
            print(f"  {role:<11} of {model}: up to {row.amax:.1e}, in fp16 up to {row.flushed:.2%} of a layer flushed")
        plan = ps.recommend(profile, formats=("bf16", "fp32"))
    computes = [f"{n}: {plan[n].compute}" for n, m in make().named_modules() if isinstance(m, nn.Linear)]
    print(f"the plan    {', '.join(computes)}")
    print(f"with it     off the ring by {train(steps, plan=plan)[0]:.3f}")


if __name__ == "__main__":
    main()
