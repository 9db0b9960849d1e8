"""One plan, four engines: what each takes, and what it cannot express.

A plan names modules and formats, so most engines can have it: torchao a filter function, TransformerEngine a YAML file,
DeepSpeed a section of its configuration. The last one is plain PyTorch: a file without precscope in it, which trains
exactly as ps.apply does.

    python examples/plan_elsewhere.py [--steps 6]             # or: precscope convert plan.json --to snippet --task gpt
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

import precscope as ps
from precscope.converting import converted, from_regexes
from precscope.training.tasks.gpt import gpt


def made() -> ps.Task:
    torch.manual_seed(0)
    return gpt("tiny")


def losses(task: ps.Task, around, steps: int) -> list[float]:
    """A loop without precscope: AdamW at lr 1e-3."""
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-3)
    found = []
    for step in range(steps):
        with around("cpu"):
            loss = task.loss(task.model, task.batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def show(plan: ps.PrecisionPlan, target: str, model: torch.nn.Module) -> None:
    result = converted(plan, target, model=model)  # ps.convert is the same and warns of what is lost
    if target == "torchao":
        chosen = [name for name, module in model.named_modules() if result.value(module, name)]
        print(f"torchao: Float8Linear for {len(chosen)} modules: {', '.join(chosen[:2])}, ...")
    else:
        print(f"{target}: {result.value}")
    for sentence in result.lost:
        print(f"  not expressed: {sentence}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="one plan, four engines")
    parser.add_argument("--steps", type=int, default=6)
    steps = parser.parse_known_args()[0].steps
    model = made().model
    fp8 = from_regexes([(r"^head$|ln", "bf16"), (r"\.attn$", "bf16"), (r"\.mlp$", "e4m3")], default="bf16", model=model)
    for target in ("torchao", "transformer-engine", "deepspeed"):
        show(fp8, target, model)
    half = ps.PrecisionPlan(default="fp16", modules={"head": "fp32"}, loss_scale={"initial": 2.0**12, "floor": 16.0})
    show(half, "deepspeed", model)

    plan = ps.PrecisionPlan(default="bf16", modules={"blocks.1.attn": "fp32", "head": "fp32"})
    with tempfile.TemporaryDirectory() as folder:
        code = converted(plan, "snippet", model=model, out=Path(folder, "planned.py")).text
        sys.path.insert(0, folder)
        import planned
    print(f"snippet: {len(code.splitlines())} lines, {code.count('import precscope')} imports of precscope")
    one, two = made(), made()
    with ps.apply(plan, one.model) as handle:
        applied = losses(one, handle.autocast, steps)
    planned.apply_plan(two.model)
    alone = losses(two, planned.loss_context, steps)
    print(f"with ps.apply    loss {applied[-1]:.6f}")
    print(f"with the snippet loss {alone[-1]:.6f}")
    pairs = zip(one.model.parameters(), two.model.parameters(), strict=True)
    print(f"weights equal bit for bit after {steps} steps: {all(torch.equal(a, b) for a, b in pairs)}")
