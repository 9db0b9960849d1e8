"""bf16 weights at a learning rate of 1e-5 stand still, and three ways out.

Adam moves each weight by about the learning rate. A weight of 0.02 kept in bf16 has neighbours 1.2e-4 away, so that an
update of 1e-5 rounds to nothing, step after step, without any sign of it in the loss scale or in counts of inf. What
helps: fp32 master weights, Kahan compensation (the lost part is kept beside the weight), or stochastic rounding (one
update in twelve is taken whole, which is right on average).

    python examples/stalled_updates.py
"""

import tempfile
import textwrap

import torch
import torch.nn.functional as F
from torch import nn

import precscope as ps

STEPS, LR, WIDTH = 300, 1e-5, 1024
TRAINED = {"steps": STEPS, "lr": LR, "schedule": "constant", "warmup": 0}


def make() -> ps.Task:
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, 4, bias=False)
    with torch.no_grad():  # magnitudes from 0.02 to 0.03: no weight is so near 0 that bf16 is fine there
        model.weight.uniform_(0.02, 0.03).mul_(torch.randn_like(model.weight).sign())
    prototypes = torch.randn(4, WIDTH)  # one pattern per class

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(step)
        y = torch.randint(4, (64,), generator=generator)
        return 0.5 * prototypes[y] + torch.randn(64, WIDTH, generator=generator), y

    return ps.Task(
        model=model,
        loss=lambda model, b: F.cross_entropy(model(b[0]).float(), b[1]),
        batches=batch,
        eval_batches=[batch(10_000 + i) for i in range(16)],
    )


if __name__ == "__main__":
    # Beforehand: a short fp32 profile already tells.
    with tempfile.TemporaryDirectory() as out:
        settings = {**TRAINED, "steps": 20, "every": 4, "precision": "fp32", "costs": False, "ops": False}
        profile = ps.profile(make(), out=out, **settings)
        plan = ps.recommend(profile, formats=("bf16",), policy="cast")
    reason = next(r for r in plan[""].reasons if r.code == "swallowed")
    print(textwrap.fill(f"told beforehand: {reason.text}", 110, subsequent_indent="  "))

    low = ps.PrecisionPlan.uniform("bf16", policy="cast")  # weights stored in bf16, no fp32 copy
    task = make()
    with torch.no_grad():
        start = sum(float(task.loss(task.model, b)) for b in task.eval_batches) / 16
    exact = ps.train(task, **TRAINED)
    print(f"untrained             held-out loss {start:.4f}")
    print(f"fp32                  held-out loss {exact.eval_loss:.4f}")
    for updates in ("nearest", "stochastic", "kahan", "master"):
        result = ps.train(make(), plan=low, updates=updates, **TRAINED)
        print(
            f"bf16, {updates:14}  held-out loss {result.eval_loss:.4f}  ({result.eval_loss / exact.eval_loss - 1:+.2%})"
        )
