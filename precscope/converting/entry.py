"""`ps.convert`: which engine, and where to."""

from __future__ import annotations

import dataclasses
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PlanError, UsageError, nearest
from ..plans import PrecisionPlan
from ..store import replacing
from .result import Converted

if TYPE_CHECKING:
    from torch import nn

TARGETS = {
    "torchao": "a module_filter_fn, or a Python file with it and the names of its modules",
    "transformer-engine": "YAML for nvdlfw-inspect",
    "deepspeed": "settings for a DeepSpeed configuration, JSON",
    "keras": "a keras.dtype_policies.DTypePolicyMap, or its JSON",
    "snippet": "a Python file of plain PyTorch code",
}
"""Engine -> what comes out."""


def convert(
    plan: PrecisionPlan | str | os.PathLike[str],
    target: str,
    *,
    model: nn.Module | Any = None,
    out: str | os.PathLike[str] | None = None,
) -> Converted:
    """A plan as the engine `target` takes it: "torchao", "transformer-engine", "deepspeed", "keras" or "snippet".

    model: the model that the plan is for; needed by "torchao" and "snippet", and elsewhere where the plan has
    patterns. out: file to write `text` to, whole or not at all. Warns (UserWarning) of what the engine cannot express.

    Raises UsageError for another target, PlanError where the plan does not fit the model, has phases (convert
    `plan.at_step(step)`), or holds nothing that the engine is for; RunDirectoryError where `out` cannot be written.
    """
    made = converted(plan, target, model=model, out=out)
    if made.lost:
        warnings.warn(f"{target} cannot express all of the plan: {'; '.join(made.lost)}", UserWarning, stacklevel=2)
    return made


def converted(
    plan: PrecisionPlan | str | os.PathLike[str], target: str, *, model: Any = None, out: Any = None
) -> Converted:
    """`convert` without its warning, for those who say it in another way."""
    if target not in TARGETS:
        near = nearest(target, TARGETS)
        raise UsageError(
            f"no engine {target!r}" + (f" (did you mean {near}?)" if near else "") + f"; known: {', '.join(TARGETS)}"
        )
    if not isinstance(plan, PrecisionPlan):
        plan = PrecisionPlan.load(plan)
    if plan.phases:
        raise PlanError(
            f"the plan changes over time ({len(plan.phases)} phases), which {target} cannot do by itself: convert each "
            "part with plan.at_step(STEP), or --step on the command line"
        )
    made = _made(plan, target, model)
    if out is None:
        return made
    path = Path(out)
    with replacing(path) as temporary:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(made.text, encoding="utf-8")
    return dataclasses.replace(made, path=path)


def from_keras(policies: Any, *, model: Any = None) -> PrecisionPlan:
    """The plan that a `keras.dtype_policies.DTypePolicyMap` says; see `kerasmap.from_policies`."""
    from .kerasmap import from_policies

    return from_policies(policies, model=model)


def _made(plan: PrecisionPlan, target: str, model: Any) -> Converted:
    if target == "torchao":
        from .torchao import to_torchao as make
    elif target == "transformer-engine":
        from .transformer_engine import to_transformer_engine as make
    elif target == "deepspeed":
        from .deepspeed import to_deepspeed as make
    elif target == "keras":
        from .kerasmap import to_keras as make
    else:
        from .snippet import to_snippet as make
    return make(plan, model)
