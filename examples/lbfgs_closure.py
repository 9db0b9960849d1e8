"""An optimizer that calls the loss itself (LBFGS): several forward and backward passes within one step, all recorded.

    python examples/lbfgs_closure.py --steps 20

A small network is fitted to a curve. The closure is as it was; `rec.step()` follows `optimizer.step(closure)`. Line
searches compare losses that differ little: in bf16 they see noise, and the fit comes no further. Where the plan is
taken off after half of the steps, by `handle.remove()`, it does. Seconds on two CPU cores.
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

X = torch.linspace(-3, 3, 256).unsqueeze(1)
Y = torch.sin(2 * X) * torch.exp(-X.square() / 4)


def train(steps: int, out: Path | None = None, low: int = 0) -> tuple[float, int]:
    """Mean squared error after `steps` steps of LBFGS, `low` of them in bf16, and how often it was computed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=10, line_search_fn="strong_wolfe")
    handle = ps.apply(ps.PrecisionPlan(default="bf16"), model) if low else None
    calls = 0

    def closure() -> torch.Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = F.mse_loss(model(X).float(), Y)
        loss.backward()
        return loss

    with ps.record(model, out, optimizer=optimizer, every=5) if out else nullcontext() as rec:
        for step in range(steps):
            if handle is not None and step == low:
                handle.remove()
            optimizer.step(closure)
            if rec is not None:
                rec.step()
    if handle is not None:
        handle.remove()  # once more does no harm
    with torch.no_grad():
        return float(F.mse_loss(model(X), Y)), calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "fp32"
        (error, calls), (alone, _) = train(steps, out), train(steps)
        print(f"fp32             loss {error:.2e} in {steps} steps, {calls} evaluations")
        print(f"unwatched        loss {alone:.2e}, the same: {error == alone}")
        rows = ps.Profile.load(out).history().query("module == '0' and role == 'output' and call == 0")
        seen = rows["count"] // (256 * 32)
        print("recorded         " + ", ".join(f"step {s}: {n} passes" for s, n in zip(rows.step, seen, strict=True)))
    for words, low in (("bf16", steps), ("bf16, then fp32", steps // 2)):
        error, calls = train(steps, low=low)
        print(f"{words:<16} loss {error:.2e} in {steps} steps, {calls} evaluations")


if __name__ == "__main__":
    main()
