"""Plans over time: which precision is in force at which step, and what must follow where it changes.

    plan = parse(["0:fp16", "100:fp32", "120:fp16"])      # what `precscope train --phase 0:fp16 ...` makes

A switch lies between two optimizer steps. The plan is taken off the model and the next one put on. Parameters that were
stored low go on from the stored values, cast up: a switch invents no precision, and a run that was resumed within a
phase ends where one that was not ends. The optimizer keeps its state, in the dtype of the parameter it belongs to;
the loss scale rests while no phase needs one, and goes on from where it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import PlanError, UsageError
from ..plans import LayerPrecision, Phase, PrecisionPlan

if TYPE_CHECKING:
    from .precision import Precision

_WORDS = ("fp32", "tf32", "bf16", "fp16", "e4m3", "e5m2")


def parse(texts: Sequence[str], *, plan: PrecisionPlan | None = None) -> PrecisionPlan:
    """The plan with a phase for each "STEP:PRECISION" of `texts`.

    PRECISION: a format, for the whole model by autocast; "plan", for the modules' own entries in `plan`; or the path of
    a plan file. plan: what is trained with before the first phase; where there is none the first must begin at step 0.
    Raises UsageError for another form and PlanError for steps that do not rise.
    """
    phases = [_phase(text, plan) for text in texts]
    if plan is None and (not phases or phases[0].from_step != 0):
        given = f"begins at step {phases[0].from_step}" if phases else "is missing"
        raise UsageError(f"the first phase {given}: let it begin at step 0 (--phase 0:fp16), or give a plan as well")
    if plan is not None:
        if plan.phases and phases:
            raise UsageError("the plan has phases of its own: leave --phase out, or take them out of the plan")
        return plan.replace(phases=phases)
    first = phases[0].plan
    default = first.default if first is not None else LayerPrecision(str(phases[0].precision))
    return PrecisionPlan(default=default, phases=phases)


def _phase(text: str, plan: PrecisionPlan | None) -> Phase:
    step, colon, what = text.partition(":")
    if not colon or not step.strip().isdigit() or not what.strip():
        raise UsageError(
            f"a phase is STEP:PRECISION, for instance 100:fp32, not {text!r}; PRECISION is one of {', '.join(_WORDS)}, "
            "the path of a plan file, or plan"
        )
    number, what = int(step), what.strip()
    if what == "plan" and plan is None:
        raise UsageError(f"phase {text!r} asks for the plan, and none is given: add --plan plan.json, or name a format")
    if what.endswith(".json"):
        return Phase(from_step=number, plan=PrecisionPlan.load(Path(what)))
    try:
        return Phase(from_step=number, precision=what)
    except PlanError as error:
        raise UsageError(
            f"phase {text!r}: {what!r} is not one of {', '.join(_WORDS)}, the path of a plan file (.json), or plan"
        ) from error


def starts(plan: PrecisionPlan) -> tuple[int, ...]:
    """Steps at which another part of the plan comes into force, 0 included; also of phases within phases."""
    found = {0}
    for index, phase in enumerate(plan.phases):
        end = plan.phases[index + 1].from_step if index + 1 < len(plan.phases) else None
        inner = starts(phase.plan) if phase.plan is not None else ()
        found |= {phase.from_step, *(s for s in inner if s > phase.from_step and (end is None or s < end))}
    return tuple(sorted(found))


def check(plan: PrecisionPlan, model: nn.Module, *, steps: int, processes: int = 1) -> list[str]:
    """Whether every phase fits the model, before the first step and not at the hundredth; notes in words.

    Raises PlanError as `ps.apply` does, naming the phase; and where phases store parameters in different formats and
    several processes train, because their engines have laid out gradients by then.
    """
    from ..applying.handle import unwrap
    from ..applying.layout import Layout

    late = [s for s in starts(plan) if s >= steps]
    stored: dict[nn.Module, str] = {}
    for step in starts(plan):
        try:
            layout = Layout(plan.at_step(step), unwrap(model))
        except PlanError as error:
            raise PlanError(f"phase from step {step}: {error}" if plan.phases else str(error)) from None
        now = {module: layer.params for module, layer in layout.precision.items()}
        if processes > 1 and stored and now != stored:
            raise PlanError(
                f"the phase from step {step} stores parameters in another format than the one before, which a run of "
                f"{processes} processes cannot switch: give all phases the same params, or train on one process"
            )
        stored = now
    return [f"the phase from step {late[0]} on is never reached: the run ends after {steps} steps"] if late else []


def word_of(plan: PrecisionPlan) -> str:
    """A plan without phases in a few words: "fp16", "bf16 cast", "fp32, 3 entries otherwise"."""
    others = sum(layer.precision != plan.default.precision for layer in plan.modules.values())
    return str(plan.default) + (f", {others} entr{'ies' if others > 1 else 'y'} otherwise" if others else "")


def entry(step: int, precision: Precision, why: str) -> dict[str, Any]:
    """What run.json's list "phases" says of a precision that is in force from `step` on. why: "start", "phase", ..."""
    word = word_of(precision.plan) if precision.plan is not None else precision.word
    return {"from_step": step, "precision": word, "why": why}


def dtypes_of(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, torch.dtype]:
    """How the optimizer's parameters are stored now."""
    return {p: p.dtype for group in optimizer.param_groups for p in group["params"]}


def match_state(optimizer: torch.optim.Optimizer, before: Mapping[torch.Tensor, torch.dtype]) -> None:
    """Cast the optimizer's state to the dtypes of its parameters, where these have changed since `before`.

    State in a dtype of its own (8-bit moments) stays, and so do scalars (step counts). A LowPrecisionOptimizer, whose
    state is in fp32 whatever the parameters are stored in, follows them by itself.
    """
    from .parameters import LowPrecisionOptimizer

    if isinstance(optimizer, LowPrecisionOptimizer):
        optimizer.prepare_gradients()
        return
    for parameter, dtype in before.items():
        if parameter.dtype is dtype:
            continue
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if follows(parameter, dtype, key, value):
                state[key] = value.to(parameter.dtype)


def follows(parameter: torch.Tensor, dtype: torch.dtype, key: str, value: Any) -> bool:
    """Whether an entry of the optimizer's state has its dtype from its parameter, which is stored in `dtype`."""
    if type(value) is not torch.Tensor or key == "step" or value.dtype is not dtype:
        return False
    return value.is_floating_point() and (value.dim() > 0 or parameter.dim() == 0)
