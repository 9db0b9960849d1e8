"""fp64 as the reference of fp32: how many digits does each layer really have?

Errors of fp16 and bf16 are usually measured against fp32, as if that were the truth. Here fp32 itself is measured: a
copy of the model in fp64 sees the same batch, and the output and the weight gradient of each layer are compared. In
units of 2^-24 (half an ulp of 1 in fp32) a healthy layer is off by less than a few tens; one that subtracts nearly
equal numbers is off by thousands, and will be hopeless in bf16.

    python examples/fp64_reference.py
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import precscope as ps
from precscope.training.tasks.gpt import gpt

Tensors = dict[str, torch.Tensor]


class Variance(nn.Module):
    """mean(x^2) - mean(x)^2, the textbook formula, on values far from zero."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 100
        return (x * x).mean(-1, keepdim=True) - x.mean(-1, keepdim=True) ** 2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.variance, self.head = nn.Linear(32, 64), Variance(), nn.Linear(65, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.inner(x))
        return self.head(torch.cat([h, self.variance(h)], -1))


def layers(task: ps.Task, dtype: torch.dtype, batch: object) -> tuple[Tensors, Tensors]:
    """({module: output}, {parameter: gradient}) of one batch with a copy of the model in `dtype`."""
    model = copy.deepcopy(task.model).to(dtype)
    outputs: Tensors = {}
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda m, i, out, name=name: outputs.update({name: out.detach().double()}))
    cast = lambda b: tuple(t.to(dtype) if t.is_floating_point() else t for t in b)  # noqa: E731
    task.loss(model, cast(batch)).backward()
    return outputs, {n: p.grad.double() for n, p in model.named_parameters()}


def errors(low: Tensors, exact: Tensors) -> dict[str, float]:
    """Relative errors (2-norms) in units of 2^-24, largest first."""
    found = {n: float((low[n] - x).norm() / x.norm()) * 2**24 for n, x in exact.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def show(title: str, task: ps.Task) -> None:
    batch = task.batch(0)
    exact = layers(task, torch.float64, batch)
    print(f"{title}: error of fp32 against fp64, in units of 2^-24")
    for what, one, other in zip(("output", "gradient"), layers(task, torch.float32, batch), exact, strict=True):
        found = list(errors(one, other).items())
        worst, best = found[0], found[-1]
        print(f"  {what:8} worst {worst[0]}: {worst[1]:.1f}, best {best[0]}: {best[1]:.1f}")


if __name__ == "__main__":
    torch.manual_seed(0)
    show("byte-level GPT", gpt("tiny"))
    data = [(torch.randn(64, 32), torch.randint(4, (64,)))]
    task = ps.Task(model=Net(), loss=lambda model, b: F.cross_entropy(model(b[0]), b[1]), batches=data)
    show("a variance by subtraction", task)

    # What that means for bf16, with all ops of that one module rounded to it:
    reference = layers(task, torch.float64, data[0])[0]["variance"]
    with torch.no_grad(), ps.emulate(task.model, {"variance": "bf16"}):
        h = torch.tanh(task.model.inner(data[0][0]))
        low = task.model.variance(h).double()
    print(f"in bf16 the variance is off by {float((low - reference).norm() / reference.norm()):.0f} times its value")
