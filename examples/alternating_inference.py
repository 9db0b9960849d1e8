"""Inference with precision alternating from layer to layer: layer 1 in fp16, layer 2 in fp32, layer 3 in fp16, ...

A plan says it in one line per layer. `ps.infer` runs the model with the plan beside fp32 on the same held-out batches
and tells the error, whether the answers agree, and what it costs or gains here.

    python examples/alternating_inference.py   # or: precscope infer TASK --plan plan.json
"""

import torch
import torch.nn.functional as F
from torch import nn

import precscope as ps

LAYERS, WIDTH = 6, 128


def make() -> ps.Task:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(LAYERS - 1)]

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(128, WIDTH, generator=torch.Generator().manual_seed(step))
        return x, x[:, :8].argmax(-1)

    return ps.Task(
        model=nn.Sequential(*layers, nn.Linear(WIDTH, 8)),
        loss=lambda model, b: F.cross_entropy(model(b[0]).float(), b[1]),
        batches=batch,
        eval_batches=[batch(10_000 + i) for i in range(4)],
        forward=lambda model, b: model(b[0]),
    )


def dtypes(task: ps.Task, plan: ps.PrecisionPlan) -> list[str]:
    """What each layer's matrix product gives, with the plan on the model."""
    seen: list[str] = []
    linear = [m for m in task.model.modules() if isinstance(m, nn.Linear)]
    hooks = [m.register_forward_hook(lambda m, i, out: seen.append(str(out.dtype)[6:])) for m in linear]
    with torch.no_grad(), ps.apply(plan, task.model):
        task.model(task.eval_batches[0][0])
    for hook in hooks:
        hook.remove()
    return seen


if __name__ == "__main__":
    task = make()
    ps.train(task, steps=60)  # so that there is an answer to agree on
    alternating = ps.PrecisionPlan(
        default="fp32",
        modules={str(i): ps.LayerPrecision("fp16" if i % 2 == 0 else "fp32", policy="cast") for i in range(LAYERS)},
    )
    print(f"alternating: {', '.join(dtypes(task, alternating))}")
    plans = {"fp32": ps.PrecisionPlan.uniform("fp32"), "alternating": alternating,
             "fp16": ps.PrecisionPlan.uniform("fp16", policy="cast")}  # fmt: skip
    for name, plan in plans.items():
        result = ps.infer(task, plan=plan, repeats=3)
        agreement = f"same class at {result.answer.agreement:.2%} of {result.answer.count}"
        print(
            f"{name:12} relative error {result.relative_l2:.2e}   {agreement}   weights {result.memory.weights} bytes"
        )
