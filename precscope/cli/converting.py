"""The command that translates a plan for another engine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .printing import SizeOption, next_command, with_size, wrote

_NEXT = {
    "torchao": "from {module} import module_filter_fn, then convert_to_float8_training(model, module_filter_fn=...)",
    "transformer-engine": "debug_api.initialize({path!r}, feature_dirs=[...]) of nvdlfw_inspect.api",
    "deepspeed": "put its sections into your DeepSpeed configuration",
    "keras": "precscope.converting.from_keras reads it back",
    "snippet": "from {module} import apply_plan, then apply_plan(model)",
}


def convert(
    plan: Annotated[Path, typer.Argument(help="plan.json to translate")],
    to: Annotated[str, typer.Option(help="torchao, transformer-engine, deepspeed, keras or snippet")],
    out: Annotated[Path | None, typer.Option(help="file to write; default: print it")] = None,
    task: Annotated[
        str | None, typer.Option(help="task whose model the plan is for: needed where names of modules are")
    ] = None,
    size: SizeOption = None,
    step: Annotated[int | None, typer.Option(help="of a plan with phases: what is in force at this step")] = None,
) -> None:
    """Translate a plan for another engine, and say what that engine cannot express.

    Example: precscope convert plan.json --to deepspeed --out ds.json
    """
    from ..converting import converted
    from ..plans import PrecisionPlan

    loaded = PrecisionPlan.load(plan)
    if step is not None:
        loaded = loaded.at_step(step)
    task, model = with_size(task, size), None
    if task is not None and to == "keras":
        raise UsageError(
            "--task does not go with --to keras: tasks make torch models, and a policy map is for a Keras model; leave "
            'it out, or ps.convert(plan, "keras", model=...) in Python'
        )
    if task is not None:
        from ..tasks import make_task

        model = make_task(task).model
    made = converted(loaded, to, model=model, out=out)
    for sentence in made.lost:
        print(f"not expressed: {sentence}", file=sys.stderr)
    if out is None:
        print(made.text, end="")
        return
    wrote(out)
    next_command(_NEXT[to].format(module=out.stem, path=str(out)))
