"""One training step under the tracer."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..attribution import unwrap
from ..batches import preserved_rng, seed_everything
from ..errors import RunDirectoryError
from ..plans import PrecisionPlan
from ..preservation import preserved
from ..tasks import Task, TaskRef, make_task
from ..tracing import trace
from ..tracing.saved import plain, save_step
from ..training.checkpoint import latest, random_states, set_random_states
from ..training.devices import own_device, pick_device, to_device
from ..training.evaluation import in_mode
from ..training.halfmatmul import half_matmul_through_fp32
from ..training.precision import make_precision
from .saved import weights_of

if TYPE_CHECKING:
    from ..tracing import Finding

AnyTask = Task | TaskRef | str | Callable[[], Task]


@dataclass(frozen=True)
class StepTrace:
    """One traced step. first: see `Tracer.first_nonfinite`; events: the first findings. loss: unscaled, None where the
    step raised. precision: word. scale: loss scale, 1.0 where there is none. ops: that ran. digest: of the loss and all
    gradients, bit for bit; "" where it was not asked for. notes: how it was computed, in words."""

    first: Finding | None
    events: tuple[Finding, ...]
    loss: float | None
    precision: str
    scale: float
    ops: int
    digest: str = ""
    notes: tuple[str, ...] = ()

    @property
    def by_scale(self) -> bool:
        """Whether the first finding is an overflow that is the loss scale's alone: a scaler halves it and goes on."""
        first = self.first
        if first is None or not first.loss_scale or first.wide_amax is None:
            return False
        return "smaller scale" in first.cause

    def __str__(self) -> str:
        scale = f", loss scale {self.scale:g}" if self.scale != 1.0 else ""
        what = f"{self.ops} ops in {self.precision}{scale}, " + (
            f"loss {self.loss:.6g}" if self.loss is not None else "raised"
        )
        if self.first is None:
            return f"every value was finite ({what})"
        lines = [str(self.first), f"({what}; findings: {len(self.events)})"]
        if self.by_scale:
            lines.append("A dynamic loss scale halves itself at such a step and goes on: expected while it settles.")
        return "\n".join(lines)


def trace_step(
    task: AnyTask,
    *,
    precision: str | None = None,
    plan: PrecisionPlan | str | Path | None = None,
    step: int = 0,
    scale: float | None = None,
    seed: int = 0,
    run: str | Path | None = None,
    device: str | torch.device | None = None,
    stop: bool = False,
    save: str | Path | None = None,
) -> StepTrace:
    """Forward, loss times the loss scale, and backward of one training step, with every op watched.

    task: as in `ps.train`. precision: "fp16" (default), "bf16", "fp32", "tf32", or a plan instead. step: whose batch,
    from 0. scale: loss scale; None: the precision's initial one, or that of the checkpoint. seed: of what is random in
    the step. run: directory of a training run, whose newest checkpoint gives weights, random states and, where step is
    0, the step. device: as in `ps.train`. stop: look no further than the first finding. save: file for the step as it
    began, for `replay`.

    An exception that an op raises for a value it cannot represent is a finding; any other is raised.
    Raises UsageError, TaskError and PlanError for what cannot be done as asked, RunDirectoryError for files.
    """
    task = as_task(task, seed=seed)
    plan = _as_plan(plan)
    precision = precision or (None if plan is not None else "fp16")
    place = pick_device(task.model, device)
    task.model.to(place)
    found = _checkpoint(run) if run is not None else None
    state = found["model"] if found else None
    with preserved_rng(cuda=True), weights_of(task.model, state, str(run)), in_mode(task.model, training=True):
        seed_everything(seed)
        if found is not None:
            set_random_states(found["random"])
            step = step or found["step"] * found.get("config", {}).get("accumulate", 1)
            scale = scale if scale is not None else found["precision"].get("scaler", {}).get("scale")
        batch = to_device(task.batch(step), place)
        rng, kept = (random_states(), plain(batch)) if save is not None else (None, None)
        result = run_traced(task, batch, precision, plan, scale, stop=stop, digest=save is not None)
        if save is not None:
            save_step(
                save, task.model, kept, rng, result.precision if plan is None else None, result.scale, plan=plan,
                step=step, found=result.first, digest=result.digest,
            )  # fmt: skip
    return result


def run_traced(
    task: Task,
    batch: Any,
    word: str | None,
    plan: PrecisionPlan | None,
    scale: float | None,
    *,
    stop: bool = False,
    digest: bool = False,
    modes: Mapping[str, bool] | None = None,
) -> StepTrace:
    """Forward, scaled loss and backward under the tracer; nothing of it stays. modes: of modules (train or eval), None:
    as they are."""
    model = task.model
    mode = make_precision(word, plan=plan, model=model, device=own_device(model))
    if scale is None:
        scale = mode.scaler.get_scale() if mode.scaler is not None else 1.0
    # fp16 products through fp32 go beneath the tracer, which is to see the model's ops
    through = getattr(mode, "through_fp32", False)
    with preserved(model), mode.applied(model):
        notes = tuple(mode.describe()["notes"])
        mode.through_fp32 = False  # type: ignore[attr-defined]
        for name, module in unwrap(model).named_modules():
            module.training = (modes or {}).get(name, module.training)
        below = half_matmul_through_fp32() if through else contextlib.nullcontext()
        loss = None
        with below, trace(model, stop=stop, scale=scale) as tracer:
            try:
                with mode.forward_context():
                    loss = task.checked_loss(batch)
                (loss * torch.tensor(scale, device=loss.device)).backward()
            except Exception:
                if tracer.raised is None or tracer.raised not in tracer.events:
                    raise
                loss = None
        return StepTrace(
            first=tracer.first_nonfinite,
            events=tuple(tracer.events),
            loss=None if loss is None else float(loss.detach()),
            precision=mode.word,
            scale=float(scale),
            ops=tracer.ops,
            digest=_digest(model, loss) if digest else "",
            notes=notes,
        )


def _digest(model: nn.Module, loss: torch.Tensor | None) -> str:
    """SHA-256 of the loss and of all gradients, in the order of the parameters."""
    total = hashlib.sha256()
    for x in [loss, *(p.grad for p in model.parameters())]:
        if x is not None:
            dense = x.detach().to_dense() if x.layout is not torch.strided else x.detach()
            total.update(dense.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _checkpoint(run: str | Path) -> dict[str, Any]:
    found = latest(run)
    if found is None:
        raise RunDirectoryError(f"{run} has no checkpoint: train with --checkpoint-every N, or leave --run out")
    return found


def as_task(task: AnyTask, *, seed: int) -> Task:
    """`task`, or the task that it names or makes."""
    return task if isinstance(task, Task) else make_task(task, seed=seed)


def _as_plan(plan: PrecisionPlan | str | Path | None) -> PrecisionPlan | None:
    return PrecisionPlan.load(plan) if isinstance(plan, str | Path) else plan
