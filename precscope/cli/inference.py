"""Commands that run a model without training it, and write it to a file that other programs run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .printing import SeedOption, SizeOption, TaskArgument, next_command, wrote


def infer(
    task: TaskArgument,
    size: SizeOption = None,
    plan: Annotated[Path | None, typer.Option(help="plan.json to run with")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, tf32, bf16 or fp16, where no plan is")] = None,
    batches: Annotated[int, typer.Option(help="held-out batches at most; 0 for all")] = 8,
    repeats: Annotated[int, typer.Option(help="timed runs of each, in turns; 0 for none")] = 10,
    answer: Annotated[str, typer.Option(help="what must agree: auto, top-1, sign or none")] = "auto",
    run: Annotated[Path | None, typer.Option(help="training run whose newest checkpoint gives the weights")] = None,
    out: Annotated[Path | None, typer.Option(help="directory for infer.json")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: the GPU where there is one")] = None,
    seed: SeedOption = 0,
) -> None:
    """Run a model with a plan beside fp32: error, agreement of the answers, loss, latency, memory.

    Example: precscope infer gpt --plan plan.json --run runs/plan --out runs/infer
    """
    from ..inference import infer as run_it
    from ..tasks import sized

    task = sized(task, size)
    result = run_it(
        task, plan=plan, precision=precision, batches=batches or None, repeats=repeats, answer=answer, run=run,
        out=out, device=device, seed=seed,
    )  # fmt: skip
    print(result)
    weights = f" --run {run}" if run is not None else ""
    following = f"precscope export {task} --plan {plan or 'plan.json'}{weights} --out model.pt2"
    if out is not None:
        wrote(out / "infer.json", next=following)
    else:
        next_command(following)


def export(
    task: TaskArgument,
    plan: Annotated[Path, typer.Option(help="plan.json that the file is to follow")],
    size: SizeOption = None,
    out: Annotated[Path, typer.Option(help="file to write: .pt2 (torch.export) or .onnx")] = Path("model.pt2"),
    run: Annotated[Path | None, typer.Option(help="training run whose newest checkpoint gives the weights")] = None,
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch", help="leave the batch dimension open")] = False,
    opset: Annotated[int | None, typer.Option(help="ONNX opset; default: torch's")] = None,
    check: Annotated[bool, typer.Option(help="run the file here and write none that fails or disagrees")] = True,
    seed: SeedOption = 0,
) -> None:
    """Write a model as it runs with a plan to one file that needs no precscope: torch.export or ONNX.

    Example: precscope export gpt --plan plan.json --run runs/plan --out model.pt2
    """
    from ..exporting import export as run_it
    from ..tasks import make_task, sized

    task = sized(task, size)
    result = run_it(
        plan, make_task(task, seed=seed), out=out, run=run, dynamic_batch=dynamic_batch, opset=opset, check=check
    )
    print(result)
    weights = f" --run {run}" if run is not None else ""
    wrote(out, next=f"precscope infer {task} --plan {plan}{weights}")
