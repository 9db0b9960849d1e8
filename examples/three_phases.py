"""Three phases: fp16, an fp32 stretch in the middle to calibrate, fp16 again.

A plan can say which precision is in force from which step on. The trainer switches between two steps: master weights,
optimizer state and the loss scale go on from where they were, so that no phase starts from scratch.

    python examples/three_phases.py            # or: precscope train gpt --phase 0:fp16 --phase 60:fp32 --phase 80:fp16
"""

import itertools

import torch

import precscope as ps
from precscope.training.tasks.gpt import gpt

STEPS = 120
NAMES = {torch.float16: "fp16", torch.float32: "fp32"}


def made() -> ps.Task:
    torch.manual_seed(0)
    return gpt("tiny")


def watched(task: ps.Task) -> list[str]:
    """The precision that the first attention projection computes in, a word per training step."""
    seen: list[str] = []

    def look(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        if module.training:
            seen.append(NAMES[output.dtype])

    task.model.blocks[0].attn.qkv.register_forward_hook(look)
    return seen


if __name__ == "__main__":
    plan = ps.PrecisionPlan(
        default="fp16",
        loss_scale={"initial": 2.0**14, "growth_interval": 25},
        phases=[
            {"from_step": 0, "precision": "plan"},  # the plan's own modules and default: fp16
            {"from_step": 60, "precision": "fp32"},
            {"from_step": 80, "precision": "plan"},
        ],
    )
    task = made()
    seen = watched(task)
    phased = ps.train(task, plan=plan, steps=STEPS, lr=3e-3)
    runs = ", then ".join(f"{len(list(steps))} steps of {word}" for word, steps in itertools.groupby(seen))
    print(f"computed in: {runs}")
    scales = ", ".join(f"{scale:g} from step {step}" for step, scale in phased.scale_history)
    print(f"loss scale: {scales}")
    exact = ps.train(made(), precision="fp32", steps=STEPS, lr=3e-3)
    for name, step in (("into fp32", 60), ("back to fp16", 80)):
        apart = max(abs(a - b) for a, b in zip(phased.losses[step:], exact.losses[step:], strict=True))
        print(f"{name} at step {step}: from there on the loss is within {apart:.4f} of fp32's at every step")
    print(f"fp32         held-out loss {exact.eval_loss:.4f}")
    print(f"three phases held-out loss {phased.eval_loss:.4f}")
