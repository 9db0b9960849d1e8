"""Three lines in the loop you have: one records it, one ends each step, one trains with the plan that comes of it.

    python examples/three_lines.py --steps 60

The loop is plain PyTorch, with gradient accumulation and clipping. One module multiplies its inputs, lengths in metres:
areas pass 65504, so under plain fp16 autocast the loss is NaN. The recording of the fp32 loop says which module it is,
and with the plan everything else runs in fp16. Seconds on two CPU cores.
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


class Areas(nn.Module):
    """Products of all pairs of sizes, [batch, 4] -> [batch, 16]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x.unsqueeze(2), x.unsqueeze(1)).flatten(1)


class Logarithm(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.log(x)


def batch(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lengths in metres [64, 4], and whether the first two make the larger area."""
    x = 20 * torch.exp(2 * torch.randn(64, 4, generator=torch.Generator().manual_seed(index)))
    return x, (x[:, 0] * x[:, 1] > x[:, 2] * x[:, 3]).long()


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Areas(), Logarithm(), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 2))


def train(steps: int, out: Path | None = None, plan: ps.PrecisionPlan | None = None, autocast: bool = False) -> float:
    """Loss of the last ten steps."""
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=plan is not None or autocast)
    losses = []
    with (
        ps.apply(plan, model) if plan else nullcontext(),  # line three, once there is a plan
        ps.record(model, out, optimizer=optimizer, scaler=scaler, every=10)
        if out
        else nullcontext() as rec,  # line one
    ):
        for step in range(steps):
            for micro in range(2):
                x, y = batch(2 * step + micro)
                with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
                    loss = F.cross_entropy(model(x).float(), y) / 2
                scaler.scale(loss).backward()
                losses.append(2 * loss.item())
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if rec is not None:
                rec.step()  # line two
    return sum(losses[-20:]) / 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "fp32"
        print(f"fp32                loss {train(steps, out):.4f}")
        profile = ps.Profile.load(out)
        worst = profile.ask("fp16", roles=["output"]).sort_values("amax").iloc[-1]
        print(f"asked for fp16      module {worst.module!r} reaches {worst.amax:.3g}, {worst.overflow_lo:.2%} overflow")
        plan = ps.recommend(profile, formats=("fp16", "fp32"))
        names = [name for name, _ in make().named_modules() if name]
        print("the plan            " + ", ".join(f"{n}: {plan[n].compute}" for n in names))
        print(f"fp16 autocast       loss {train(steps, autocast=True):.4f}")
        print(f"with the plan       loss {train(steps, plan=plan):.4f}")


if __name__ == "__main__":
    main()
