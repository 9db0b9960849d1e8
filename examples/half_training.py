"""model.half() training, why it fails, and how the tool finds it.

Everything in fp16: weights, activations, gradients and Adam's moments. Two things go wrong here, as they do in
practice. The hand-written RMS norm squares activations of a few hundred, and 300^2 is beyond 65504. And Adam's epsilon
of 1e-8 is 0 in fp16, where second moments of small gradients are 0 too: 0/0.

    python examples/half_training.py
"""

import tempfile
import textwrap

import torch
import torch.nn.functional as F
from torch import nn

import precscope as ps

STEPS = 60


class RMSNorm(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.head = nn.Linear(16, 64), RMSNorm(), nn.Linear(64, 4)
        with torch.no_grad():
            self.inner.weight.mul_(400)  # large activations, as outlier channels of large models have

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.inner(x.to(self.head.weight.dtype))))


def make() -> ps.Task:
    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
        return x, x[:, :4].argmax(-1)

    return ps.Task(
        model=Net(),
        loss=lambda model, b: F.cross_entropy(model(b[0]).float(), b[1]),
        batches=batch,
        eval_batches=[batch(10_000 + i) for i in range(4)],
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2, betas=(0.9, 0.95)),
    )


def train_by_hand(task: ps.Task) -> float:
    """A bare loop; the held-out loss, NaN or inf where training broke."""
    optimizer = task.optimizer(task.model.parameters())
    for step in range(STEPS):
        task.loss(task.model, task.batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return sum(float(task.loss(task.model, b)) for b in task.eval_batches) / 4


def made(half: bool = False) -> ps.Task:
    torch.manual_seed(0)
    task = make()
    if half:
        task.model.half()
    return task


if __name__ == "__main__":
    print(f"fp32                 held-out loss {train_by_hand(made()):.4f}")
    print(f"model.half()         held-out loss {train_by_hand(made(half=True)):.4f}")

    # Where does the first inf come from? One forward pass under the tracer.
    task = made(half=True)
    with ps.trace(task.model) as trace:
        task.loss(task.model, task.batch(0))
    first = trace.first_nonfinite
    print(f"first inf            module {first.module!r}, op {first.op}")

    # What else stands against fp16 everywhere? Record an fp32 run and ask for a plan in which all of a module is cast.
    with tempfile.TemporaryDirectory() as out:
        profile = ps.profile(task := made(), out=out, steps=STEPS, precision="fp32", every=5, costs=False)
        plan = ps.recommend(profile, formats=("fp16", "fp32"), policy="cast", task=task, costs="model")
    for name in ("norm", "inner", "head"):
        layer = plan[name]
        text = f"{name}: compute {layer.compute}, params {layer.params}: {layer.reasons[0]}"
        print(textwrap.fill(text, 110, initial_indent="  ", subsequent_indent="    ", max_lines=3))
    for warning in plan.optimizer.get("warnings", [])[:1]:
        print(f"  optimizer: {warning}")
    result = ps.train(made(), steps=STEPS, plan=plan, schedule="none", grad_clip=None)
    print(f"with the plan        held-out loss {result.eval_loss:.4f}, skipped {result.skipped_steps}")
