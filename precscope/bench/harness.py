"""Train one case: in fp32, in a low format, or in that format as a plan has it; and judge how it ended."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..applying import PlanHandle, apply
from ..batches import preserved_rng, seed_everything
from ..errors import one_line
from ..plans import LayerPrecision, PrecisionPlan
from ..tasks import Task
from ..training.halfmatmul import half_matmul_through_fp32, needs_half_matmul
from ..training.precision import LossScaler
from .cases import Case

INITIAL_SCALE = 2.0**12
"""Loss scale of fp16 runs under autocast, where no plan says another."""

EVALUATION_BATCH = 10_000
"""Number of the batch that ends a run: one that no training step has seen, where the case draws batches."""

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Outcome:
    """How a run ended. value: the final loss, or what the case evaluates; for inference the relative error of the
    output. finite: whether loss and parameters are, at the end. skipped: steps that the loss scale left out. error:
    what it raised."""

    value: float
    finite: bool = True
    steps: int = 0
    skipped: int = 0
    error: str | None = None
    seconds: float = 0.0

    @property
    def usable(self) -> bool:
        """Whether something was trained, and can be evaluated."""
        return self.error is None and self.finite and not (self.steps and self.skipped == self.steps)

    def __str__(self) -> str:
        if self.error is not None:
            return "error"
        return f"{self.value:.2g}" + ("" if self.usable else "!")


def fails(case: Case, outcome: Outcome, reference: Outcome) -> bool:
    """Whether a run is a failure beside the fp32 run `reference`."""
    if not outcome.usable or not math.isfinite(outcome.value):
        return True
    if case.steps == 0:
        return outcome.value > case.rel_tol
    return outcome.value - reference.value > case.tol * abs(reference.value) + case.atol


def islands(case: Case, fmt: str, modules: Iterable[str]) -> PrecisionPlan:
    """The plan that keeps `modules` (and what is in them) in fp32, and everything else in `fmt`."""
    low = LayerPrecision(fmt, policy="cast" if case.mode == "pure" else "autocast")
    kept = {name: LayerPrecision("fp32") for name in modules}
    if case.mode == "pure" and not case.cast_batch and kept:
        # the model's inputs reach the islands as they are: the root's own code must not round them on the way
        with preserved_rng():
            model = case.build()[0]
        return PrecisionPlan(modules={**{name: low for name, _ in model.named_children()}, **kept})
    return PrecisionPlan(default=low, modules=kept)


def run_case(
    case: Case,
    *,
    fmt: str | None = None,
    plan: PrecisionPlan | None = None,
    seed: int = 0,
    through_fp32: bool | None = None,
) -> Outcome:
    """Train `case` from a fresh build under `seed`: in fp32; in `fmt` as its mode has it; or in `fmt` with a `plan`.

    through_fp32: compute fp16 matrix products in fp32 and round once, which is faster on most CPUs (None: where this
    one needs it). Never raises for what the case's code raises: that is an outcome. For inference the reference is
    computed here, too, in fp32 from a build of its own.
    """
    started = time.perf_counter()
    through = fmt == "fp16" and (needs_half_matmul() if through_fp32 is None else through_fp32)
    with half_matmul_through_fp32() if through else nullcontext():
        try:
            outcome = _infer(case, fmt, plan, seed) if case.steps == 0 else _train(case, fmt, plan, seed)
        except Exception as error:
            outcome = Outcome(math.nan, finite=False, steps=case.steps, error=one_line(error, limit=1000))
    return Outcome(**{**vars(outcome), "seconds": time.perf_counter() - started})


class _Setting:
    """A fresh build of a case, made ready for a run: model, batches, loss, and the context of its forward passes."""

    def __init__(self, case: Case, fmt: str | None, plan: PrecisionPlan | None, seed: int) -> None:
        seed_everything(seed)
        self.case, self.fmt = case, fmt
        self.model, self.batch_fn, self.loss_fn = case.build()
        self.dtype = _DTYPES[fmt] if fmt else torch.float32
        self.handle: PlanHandle | None = None
        if plan is None and fmt and case.mode == "pure" and not case.cast_batch:
            plan = islands(case, fmt, ())  # modules take full-precision inputs, and cast them
        if plan is not None:
            self.handle = apply(plan, self.model)
        elif fmt and case.mode == "pure":
            self.model.to(self.dtype)
        self.plan = plan

    def forward_context(self) -> AbstractContextManager[Any]:
        if not self.fmt or self.case.mode == "pure":
            return nullcontext()
        if self.handle is not None:
            return self.handle.autocast("cpu")
        return torch.autocast("cpu", dtype=self.dtype)

    def batch(self, step: int) -> tuple:
        batch = self.batch_fn(step)
        if self.fmt and self.case.mode == "pure" and self.case.cast_batch:
            batch = tuple(t.to(self.dtype) if torch.is_tensor(t) and t.is_floating_point() else t for t in batch)
        return batch

    def scaler(self) -> LossScaler | None:
        if self.fmt != "fp16" or not self.case.has_loss_scale:
            return None
        initial = self.plan.loss_scale.get("initial") if self.plan is not None else None
        return LossScaler("cpu", init_scale=initial or INITIAL_SCALE)

    def remove(self) -> None:
        if self.handle is not None:
            self.handle.remove()


@contextmanager
def _setting(case: Case, fmt: str | None, plan: PrecisionPlan | None, seed: int) -> Iterator[_Setting]:
    setting = _Setting(case, fmt, plan, seed)
    try:
        yield setting
    finally:
        setting.remove()


def _train(case: Case, fmt: str | None, plan: PrecisionPlan | None, seed: int) -> Outcome:
    with _setting(case, fmt, plan, seed) as run:
        model = run.model
        optimizer = make_optimizer(case)(model)
        scaler = run.scaler()
        skipped = 0
        for step in range(case.steps):
            batch = run.batch(step)
            optimizer.zero_grad()
            with run.forward_context():
                loss = run.loss_fn(model, batch)
            skipped += _step(loss, optimizer, scaler)
            if case.after_step is not None:
                case.after_step(model, step)
        value = _final(run)
        finite = math.isfinite(value) and all(bool(torch.isfinite(p).all()) for p in model.parameters())
        return Outcome(value, finite=finite, steps=case.steps, skipped=skipped)


def _final(run: _Setting) -> float:
    """The loss after the last update on the evaluation batch, or what the case evaluates there."""
    batch = run.batch(EVALUATION_BATCH)
    if run.case.evaluate is None:
        with run.forward_context():
            return float(run.loss_fn(run.model, batch).detach())
    with torch.set_grad_enabled(run.case.eval_grad), run.forward_context():
        return float(run.case.evaluate(run.model, batch))


def _step(loss: torch.Tensor, optimizer: torch.optim.Optimizer, scaler: LossScaler | None) -> bool:
    """Backward and update; whether the loss scale skipped the update."""
    if scaler is None:
        loss.backward()
        optimizer.step()
        return False
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    skipped = bool(scaler.found_nonfinite(optimizer))
    scaler.step(optimizer)
    scaler.update()
    return skipped


def _infer(case: Case, fmt: str | None, plan: PrecisionPlan | None, seed: int) -> Outcome:
    with _setting(case, None, None, seed) as run:
        reference = _output(run)
    with _setting(case, fmt, plan, seed) as run:
        output = _output(run)
    error = float((output - reference).norm() / reference.norm().clamp_min(1e-30))
    return Outcome(error, finite=bool(torch.isfinite(output).all()))


@torch.no_grad()
def _output(run: _Setting) -> torch.Tensor:
    with run.forward_context():
        return run.model(*run.batch(0)).float()


def make_optimizer(case: Case) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """The function (model) -> optimizer of a case."""
    if case.make_optimizer is not None:
        return case.make_optimizer
    kind = torch.optim.SGD if case.opt == "sgd" else torch.optim.Adam

    def make(model: nn.Module) -> torch.optim.Optimizer:
        return kind([p for p in model.parameters() if p.requires_grad], lr=case.lr)

    return make


def make_task(case: Case, *, seed: int = 0) -> Task:
    """A fresh build of a case as a precscope task."""
    seed_everything(seed)
    model, batch_fn, loss_fn = case.build()
    return Task(
        model=model, loss=loss_fn, batches=batch_fn, optimizer=make_optimizer(case), after_step=case.after_step,
        name=case.name, seed=seed,
    )  # fmt: skip
