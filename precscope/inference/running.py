"""The run itself: fp32 and low precision, batch by batch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..applying.spec import MARK
from ..attribution import unwrap
from ..batches import copy_containers, preserved_rng, seed_everything
from ..errors import PlanError, RunDirectoryError, TaskError, UsageError, one_line
from ..plans import PrecisionPlan
from ..preservation import preserved
from ..recording.provenance import provenance
from ..replaying.saved import weights_of
from ..store import write_json
from ..tasks import Task, make_task
from ..training import make_precision
from ..training.checkpoint import latest
from ..training.devices import own_device, pick_device, to_device
from ..training.precision import Precision
from .answers import Agreement, find_rule
from .calls import Call, called_with, find_call
from .differences import Differences, floating, named_tensors
from .measuring import in_turns, weight_bytes, working_bytes
from .result import InferResult, Latency, Loss, Memory

_LOW = (torch.float16, torch.bfloat16)


def infer(
    task: Task | str,
    *,
    plan: PrecisionPlan | str | Path | None = None,
    precision: str | None = None,
    batches: int | None = 8,
    repeats: int = 10,
    answer: str = "auto",
    keep: int = 1,
    run: str | Path | None = None,
    out: str | Path | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
) -> InferResult:
    """Run the task's model with a plan, or in one precision, beside fp32 on its held-out batches.

    task: a Task, or what `make_task` takes ("gpt", "my_task.py:make"). plan: a PrecisionPlan or its file; or precision:
    "fp32", "tf32", "bf16", "fp16" (autocast). batches: at most so many of eval_batches, of the training batches where
    there are none; None: all of eval_batches (8 where they have no end). repeats: timed runs of each, in turns over the
    batches; 0: none. answer: what must agree, "auto" (found out, see answers.py), "top-1" over the last dimension,
    "sign" or "none". keep: batches whose outputs are kept in the result. run: a training run whose newest checkpoint
    gives the weights. out: directory for infer.json. device: as in `ps.train`. seed: of what is random in the forward.

    The model is in evaluation mode and without gradients meanwhile; its parameters, buffers, modes and device and the
    random generators are left as found.
    Raises UsageError, TaskError, PlanError for what cannot be done as asked, RunDirectoryError for files.
    """
    plan = PrecisionPlan.load(plan) if isinstance(plan, str | Path) else plan
    _check(plan, precision, batches, repeats)
    task = task if isinstance(task, Task) else make_task(task, seed=seed)
    if any(MARK in module.__dict__ for module in task.model.modules()):
        raise PlanError("a plan is applied to this model already: remove it (handle.remove()) and pass it as plan=")
    found = checkpoint_of(run)
    state, step = (found["model"], found["step"]) if found else (None, None)
    with _on_device(task.model, device), preserved_rng(cuda=True), weights_of(task.model, state, str(run)):
        with preserved(task.model), torch.no_grad():
            task.model.eval()
            seed_everything(seed)
            result = _Side(task, plan, precision, seed).run(batches, repeats, answer, keep, step)
    if out is not None:
        _write(Path(out), result)
    return result


class _Side:
    """fp32 and the other precision on one model, side by side."""

    def __init__(self, task: Task, plan: PrecisionPlan | None, word: str | None, seed: int) -> None:
        self.task, self.model, self.plan, self.seed = task, task.model, plan, seed
        self.device = own_device(self.model)
        stored_low = any(p.dtype in _LOW for p in self.model.parameters())
        options: dict[str, Any] = {"model": self.model, "device": self.device}
        wide = PrecisionPlan.uniform("fp32") if stored_low else None
        self.reference = make_precision(None if stored_low else "fp32", plan=wide, **options)
        self.low = make_precision(word, plan=plan, **options)
        self.notes: list[str] = []
        if stored_low:
            self.notes.append("the model is stored in 16 bits: for the fp32 reference its parameters are cast up")

    def run(self, limit: int | None, repeats: int, answer: str, keep: int, step: int | None) -> InferResult:
        """Compare on every batch, then time."""
        calls: list[Call] = []
        differences, losses = Differences(), []
        kept: list[tuple[Any, Any]] = []
        agreement: Agreement | None = None
        for batch in self._batches(limit):
            call, outputs, arguments = self._both(batch)
            r, y = (floating(named_tensors(o)) for o in outputs)
            differences.add(r, y)
            agreement = agreement or Agreement(find_rule(r, batch, arguments, answer))
            agreement.add(r, y, batch)
            losses.append(self._losses(batch))
            kept += [outputs] if len(kept) < keep else []
            calls += [call] if len(calls) < max(repeats, 1) else []
        if agreement is None:
            raise TaskError("eval_batches is empty: give at least one held-out batch, or None")
        memory, notes = self._memory(calls[0])
        latency = in_turns(self.model, calls, (self.reference, self.low), pairs=repeats)
        return InferResult(
            task=self.task.name, precision=self.low.word, modules=self._modules(), batches=len(losses),
            held_out=self.held_out, device=self.device.type, outputs=differences.results(), answer=agreement.result(),
            loss=self._mean(losses), latency=latency, memory=memory, step=step, call=calls[0].how,
            notes=(*self.notes, *_about_latency(notes, latency)), kept=tuple(kept), about=self._about(),
        )  # fmt: skip

    def _batches(self, limit: int | None) -> Iterator[Any]:
        self.held_out = self.task.eval_batches is not None
        if self.held_out:
            source = self.task.evaluation(limit=limit)
        else:
            self.notes.append("the task has no eval_batches: these are training batches")
            source = (self.task.batch(step) for step in range(8 if limit is None else limit))
        return (to_device(copy_containers(batch), self.device) for batch in source)

    def _both(self, batch: Any) -> tuple[Call, tuple[Any, Any], Any]:
        """How the model is called on `batch`, (fp32's, the plan's) output, and what the model was called with."""
        with self.reference.applied(self.model):
            seed_everything(self.seed)
            with self.reference.forward_context():
                call = find_call(self.task, batch)
            with called_with(self.model) as seen:
                reference = self._own(self._output(call, self.reference))
        with self.low.applied(self.model):
            return call, (reference, self._own(self._output(call, self.low))), seen[0] if seen else None

    def _output(self, call: Call, precision: Precision) -> Any:
        seed_everything(self.seed)
        data = call.fresh()
        with precision.forward_context():
            return call.function(data)

    def _own(self, output: Any) -> Any:
        """The output, where a tensor of it is memory of the model (a cache in a buffer): with copies of it."""
        memory = {t.untyped_storage().data_ptr() for t in self.model.buffers() if t.layout is torch.strided}
        tensors = [t for t in named_tensors(output).values() if t.layout is torch.strided]
        if not any(t.untyped_storage().data_ptr() in memory for t in tensors if t.numel()):
            return output
        from ..applying.inputs import map_tensors

        return map_tensors(output, torch.Tensor.clone)

    def _losses(self, batch: Any) -> tuple[float, float] | str:
        """The loss in both; a text where it cannot be had."""
        found = []
        for precision in (self.reference, self.low):
            seed_everything(self.seed)
            with precision.applied(self.model), precision.forward_context():
                data = Call(lambda data: None, batch, "").fresh()
                try:
                    found.append(float(self.task.checked_loss(data, needs_grad=False).detach().double()))
                except Exception as error:  # the user's loss: inference can do without
                    return one_line(error)
        return found[0], found[1]

    def _mean(self, losses: list[tuple[float, float] | str]) -> Loss | None:
        failed = [x for x in losses if isinstance(x, str)]
        if failed:
            self.notes.append(f"no loss: it fails without gradients or in this precision ({failed[0]})")
            return None
        pairs = [x for x in losses if not isinstance(x, str)]
        reference, value = (math.fsum(side) / len(pairs) for side in zip(*pairs, strict=True))
        return Loss(reference, value)

    def _memory(self, call: Call) -> tuple[Memory, list[str]]:
        """What both need, and what the low one says about itself while it is applied."""
        sizes = []
        for precision in (self.reference, self.low):
            data = call.fresh()
            with precision.applied(self.model):
                run = working_bytes(lambda: call.function(data), precision)  # noqa: B023
                sizes.append((weight_bytes(unwrap(self.model)), run))
                notes = list(precision.describe()["notes"])
                handle = getattr(precision, "handle", None)
        notes += dict.fromkeys(f"emulated: {r.note}" for r in (handle.runs if handle else ()) if r.how != "native")
        (a, b), (c, d) = sizes
        return Memory(a, c, b, d), notes

    def _modules(self) -> dict[str, int]:
        if self.plan is None:
            return {}
        return dict(self.plan.counts(name for name, _ in unwrap(self.model).named_modules()))

    def _about(self) -> dict[str, Any]:
        about = {**provenance(unwrap(self.model)), "seed": self.seed, "task_ref": self.task.reference}
        about.pop("device")
        return {"about": about, "plan": json.loads(self.plan.to_json()) if self.plan is not None else None}


def _about_latency(notes: list[str], latency: Latency) -> list[str]:
    """Notes of a precision, with what they mean for the latency."""
    slow = any("through fp32" in n or "emulated" in n for n in notes)
    if slow and latency.pairs:
        return [*notes, "its latency is that of computing it so, not that of hardware with the format"]
    return notes


def _check(plan: PrecisionPlan | None, precision: str | None, batches: int | None, repeats: int) -> None:
    if plan is None and precision is None:
        raise UsageError("give what to infer with: plan= (--plan plan.json) or precision= (--precision bf16)")
    if plan is not None and not isinstance(plan, PrecisionPlan):
        raise UsageError(f"plan must be a PrecisionPlan or its file, not {type(plan).__name__}")
    if plan is not None and plan.phases:
        raise UsageError("this plan has phases: infer with that of one step, plan=plan.at_step(step)")
    if batches is not None and batches < 1:
        raise UsageError(f"batches must be 1 or more, or None for all, not {batches}")
    if repeats < 0:
        raise UsageError(f"repeats must be 0 (nothing is timed) or more, not {repeats}")


def checkpoint_of(run: str | Path | None) -> dict[str, Any] | None:
    """The newest checkpoint of a training run, None where no run is given. Raises RunDirectoryError."""
    if run is None:
        return None
    found = latest(run)
    if found is None:
        raise RunDirectoryError(f"{run} has no checkpoint: train with --checkpoint-every N, or leave --run out")
    return found


@contextmanager
def _on_device(model: nn.Module, device: str | torch.device | None) -> Iterator[None]:
    """The model on the device asked for; back on its own on leaving."""
    own, place = own_device(model), pick_device(model, device)
    if own == place:
        yield
        return
    model.to(place)
    try:
        yield
    finally:
        model.to(own)


def _write(out: Path, result: InferResult) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(f"cannot make {out} ({error.strerror}): choose another directory") from error
    write_json(out / "infer.json", result.to_dict())
