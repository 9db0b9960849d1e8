"""The training loop: forward, backward, unscale, clip, step; what surrounds a step is named and lives elsewhere.

Precision enters through one object (precision.py), several processes through another (engine.py), and a guard is told
of what was read from the device (guard/). Two runs of the same task and seed are equal bit for bit, watched or not,
stopped and resumed or not (on one device and thread count). The host reads the device once every `sync_every` steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..batches import seed_everything
from ..errors import TaskError
from ..store import prepare_directory
from ..tasks import Task
from . import continuing, persistence, phases
from .compiling import CompileConfig, make_compiler
from .config import TrainConfig
from .devices import to_device
from .engine import Engine
from .evaluation import evaluate, in_mode
from .log import TrainLog, write_run_json
from .optim import clip, gradients, make_optimizer, set_lr
from .precision import LossScaler, Precision, make_precision
from .readings import Readings
from .result import TrainResult
from .shadowing import ShadowSteps, entered, may_shadow

if TYPE_CHECKING:
    from ..plans import PrecisionPlan
    from .guard import Guard

Progress = Callable[[int, int, float], None]
"""Called as progress(steps done, steps in all, last loss read), at each reading of the device. One that has read(rows)
is told of the rows of the log first."""


class Trainer:
    """One run. task, config: what and how. precision, engine, guard: see their files. out, exist, compile: see `train`.

    model is the task's own and forward_model what the loss function calls: the model within its wrappers. scaler is
    that of the precision in force. plan: the whole plan, with its phases, as the guard may have amended it. The
    optimizer is there from `run` on, when the plan is on the model.
    """

    optimizer: torch.optim.Optimizer
    forward_model: torch.nn.Module

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        *,
        precision: Precision,
        out: str | Path | None,
        exist: str = "error",
        engine: Engine | None = None,
        compile: bool | CompileConfig = False,
        guard: Guard | None = None,
    ) -> None:
        self.task, self.config, self.precision, self.guard = task, config, precision, guard
        self.model, self.plan = task.model, precision.plan
        self.engine = engine or Engine(precision.device)
        self.compiler = make_compiler(compile, self.engine.device)
        self.out = prepare_directory(out, exist=exist if self.engine.main else "append") if out is not None else None
        self.log = TrainLog(self.out if self.engine.main else None, flush_seconds=config.flush_seconds)
        self.readings, self.shadows = Readings(self), ShadowSteps()
        self.sync_every = config.sync_every or (1 if self.engine.device.type == "cpu" else 10)
        self.evaluations: list[tuple[int, float]] = []
        self.notes: list[str] = []  # what a reader should know
        self.history: list[dict[str, Any]] = []  # which precision from which step on, see phases.entry
        self.repeated_until = 0  # steps before it have had their after_step, see `repeat`
        self.in_force = 0  # the step whose entry of the plan is on the model
        self.best: tuple[Path, int, float] | None = None  # checkpoint, its steps and held-out loss
        self.saved: tuple[int, Path] | None = None  # the last state written: steps and file
        self.progress: Progress | None = None
        self.watch: Any = None
        self._applied = ExitStack()

    @property
    def scaler(self) -> LossScaler | None:
        """The loss scaler in force, None where there is none."""
        return self.precision.scaler

    def run(self, *, resume: bool = False, recorder: Any = None, progress: Progress | None = None) -> TrainResult:
        """Train to the last step, evaluate, and return the result. See `train` for the arguments and errors."""
        self.progress = progress
        seed_everything(self.config.seed + 1000003 * self.engine.rank)
        persistence.check(self)
        state = persistence.latest(self, resume=resume)
        with ExitStack() as stack:
            stack.enter_context(in_mode(self.model, training=True))
            stack.callback(self._applied.close)
            self._begin(state, recorder)
            stack.enter_context(persistence.outcome(self))
            stack.enter_context(self.compiler.running())
            with entered(recorder, self) as self.watch:
                persistence.announce(self, self.first_step)
                self.next_step = self.first_step
                while self.next_step < self.config.steps:
                    self._go_on(self.next_step)
            eval_loss = self._final_evaluation()
            self.log.flush()
            result = self._result(eval_loss)
            described = {**result.to_dict(), "note": "; ".join(result.notes), **self.compiler.describe(self.log.rows)}
            write_run_json(self.out if self.engine.main else None, described)
            persistence.save_model(self)
        return result

    def _begin(self, state: dict[str, Any] | None, recorder: Any) -> None:
        """Precision on the model, optimizer, wrappers; where `state` is given, on from there."""
        if state is not None:
            self.plan = continuing.plan(self, state)
        self.in_force = persistence.in_force(state)
        if self.plan is not None:
            self.notes += phases.check(self.plan, self.model, steps=self.config.steps, processes=self.engine.world)
            self.precision = self._precision_of(self.plan.at_step(self.in_force))
        self._put_on(self.precision)
        self.history.append(phases.entry(self.in_force, self.precision, "start"))
        fixed = self.guard is None and not may_shadow(recorder) and not (self.plan is not None and self.plan.phases)
        self.forward_model = self.compiler.wrap(self.engine.wrap(self.model, self.precision, fixed=fixed))
        # once the plan is on the model: it may store parameters low, and the optimizer's state follows them
        self.optimizer = make_optimizer(self.task, self.config, self.plan)
        self.engine.check(self.model, self.optimizer)
        lr = self.config.lr
        self.base_lrs = [float(g["lr"]) if lr is None else lr for g in self.optimizer.param_groups]
        self.first_step = persistence.restore(self, state) if state is not None else 0
        if self.guard is not None:
            self.guard.begin(self)

    def _go_on(self, step: int) -> None:
        """Step `step` and what is due after it; next_step is the one to go on with."""
        self._enter_phase(step)
        self.next_step = step + 1
        self._step(step)
        evaluate, save = self._due(step, self.config.eval_every), self._due(step, self.config.checkpoint_every)
        if evaluate or save or self._due(step, self.sync_every) or self._is_phase(step + 1):
            self.readings.read()
        if self.next_step != step + 1:
            return  # the guard went back: nothing that was due here counts
        if evaluate:
            self._evaluate_at(step)
        if save:
            persistence.save(self, step + 1)

    # one step

    def _step(self, step: int) -> None:
        self.readings.clock.start()
        lr = self._set_lr(step)
        shadowed = self.shadows.due(self.watch)
        loss = self._accumulate_gradients(step, keep=shadowed)
        scale = self.precision.scale()
        self.precision.unscale(self.optimizer)
        if shadowed:
            self.shadows.run(self.watch, self.loss_of, loss, self.engine)
        grads = gradients(self.optimizer)
        if not grads:
            raise TaskError("no parameter got a gradient: does the loss depend on what the optimizer holds?")
        norm = self.engine.total_norm(grads)
        clip(grads, norm, self.config.grad_clip)
        allowed = torch.isfinite(norm)
        if self.guard is not None:
            allowed = self.guard.allows(allowed, norm)
        skipped = self.precision.step(self.optimizer, allowed)
        self.optimizer.zero_grad(set_to_none=True)
        if self.task.after_step is not None and step >= self.repeated_until:
            self.task.after_step(self.model, step)
        self.compiler.stepped(step, eager=getattr(self.watch, "recording", False))
        if self.watch is not None:
            self.watch.step()
        self.readings.clock.stop()
        self.readings.add(step, lr, (self.engine.mean(loss), norm, scale, skipped))

    def _accumulate_gradients(self, step: int, *, keep: bool = False) -> torch.Tensor:
        """Gradients of the mean loss over the step's micro-batches; that mean, detached. keep: for a shadow step."""
        count = self.config.accumulate
        total: torch.Tensor | None = None
        for index, batch in enumerate(self.micro_batches(step)):
            if keep:
                self.shadows.keep(batch)
            with self.engine.accumulating(self.forward_model, last=index == count - 1):
                with self.precision.forward_context():
                    loss = self.loss_of(batch)
                self.precision.backward(loss / count if count > 1 else loss)
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total / count if count > 1 else total

    def micro_batches(self, step: int) -> Iterator[Any]:
        """Those of `step` that this process takes, on the device. Raises TaskError where a generator is used up."""
        for index in range(self.config.accumulate):
            batch = self.task.batch(self.engine.micro_index(step, index, self.config.accumulate))
            yield to_device(batch, self.engine.device)

    def loss_of(self, batch: Any) -> torch.Tensor:
        """The task's loss through the wrapped model."""
        return self.task.checked_loss(batch, model=self.forward_model)

    def _set_lr(self, step: int) -> float:
        if self.config.schedule != "none":
            factor = self.config.lr_factor(step)
            for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
                set_lr(group, base * factor)
        return float(self.optimizer.param_groups[0]["lr"])

    # changes of course

    def switch(self, plan: PrecisionPlan, *, step: int, why: str = "switched") -> None:
        """Train with `plan` from `step` on, between two steps; the optimizer keeps its state, the loss scale its
        value. why: for run.json; "": the plan is only tried, and not noted there."""
        self.plan = plan
        self._switch_precision(step, why)

    def rollback(self, state: dict[str, Any]) -> None:
        """Go back to `state`, the content of a checkpoint of this run, in the precision that the plan has there now.
        The guard keeps what it has learnt; checkpoints of later steps are removed, and what was recorded of them."""
        steps = self.next_step - state["step"]
        self.readings.forget()
        self.history = [entry for entry in self.history if entry["from_step"] < state["step"]] or self.history[:1]
        if self.plan is not None:
            self._switch_precision(persistence.in_force(state), "went back")
        self.next_step = persistence.restore(self, state, back=True)
        if hasattr(self.watch, "go_back"):
            self.watch.go_back(self.watch.index - steps)

    def on_leaving(self, callback: Callable[..., Any], *arguments: Any) -> None:
        """Have `callback` called when the precision in force is left: at a switch, and at the end, whatever ends it."""
        self._applied.callback(callback, *arguments)

    def repeat(self, step: int) -> None:
        """Take the steps from `step` on again, with the weights as they are: those since were all left out. Only
        task.after_step, which was called for them, is not called again. Checkpoints of the way stay: they lead here."""
        self.repeated_until = max(self.repeated_until, self.next_step)
        self.readings.forget()
        persistence.drop_from(self, step)
        if hasattr(self.watch, "go_back"):
            self.watch.go_back(self.watch.index - (self.next_step - step))
        self.next_step = step

    def _enter_phase(self, step: int) -> None:
        if self._is_phase(step) and self.in_force != step:
            self._switch_precision(step, "phase")

    def _is_phase(self, step: int) -> bool:
        return self.plan is not None and bool(self.plan.phases) and step in phases.starts(self.plan)

    def _precision_of(self, plan: PrecisionPlan) -> Precision:
        return make_precision(
            None, plan=plan, model=self.model, device=self.engine.device, initial_scale=self.precision.initial_scale
        )

    def _switch_precision(self, step: int, why: str) -> None:
        assert self.plan is not None
        precision, before = self._precision_of(self.plan.at_step(step)), phases.dtypes_of(self.optimizer)
        precision.take_over(self.precision)
        self._applied.close()
        self._put_on(precision)
        self.engine.replanned(self.model)
        phases.match_state(self.optimizer, before)
        self.in_force = step
        if why:
            self.history.append(phases.entry(step, precision, why))
            persistence.switched(self)
            self.compiler.replanned(self.next_step)
        if hasattr(self.watch, "scaler"):
            self.watch.scaler = self.scaler

    def _put_on(self, precision: Precision) -> None:
        self.precision, precision.compiled = precision, self.compiler.active
        self._applied.enter_context(precision.applied(self.model))
        precision.settle()

    # around the steps

    def _due(self, step: int, every: int | None) -> bool:
        return every is not None and ((step + 1) % every == 0 or step + 1 == self.config.steps)

    def _evaluate_at(self, step: int) -> None:
        if step + 1 == self.config.steps or self.task.eval_batches is None:
            return  # the last one is made after the loop, by _final_evaluation
        with getattr(self.watch, "paused", nullcontext)():
            loss = self.evaluate()
        self._evaluated(step + 1, loss)

    def _final_evaluation(self) -> float | None:
        if self.task.eval_batches is None:
            return None
        loss = self.evaluate()
        self._evaluated(self.config.steps, loss)
        return loss

    def _evaluated(self, steps: int, loss: float) -> None:
        self.evaluations.append((steps, loss))
        self.log.evaluated(loss)
        persistence.evaluated(self, steps, loss)

    def evaluate(self) -> float:
        """Mean loss over the held-out batches in this run's precision; random streams and modes are put back."""
        return evaluate(self.task, precision=self.precision, limit=self.config.eval_limit, model=self.forward_model)

    def said(self) -> list[str]:
        """What a reader should know of how it runs: of precision, processes, storage, and of this run."""
        return [
            *self.precision.describe()["notes"], *self.engine.notes, *getattr(self.optimizer, "notes", ()), *self.notes
        ]  # fmt: skip

    def _result(self, eval_loss: float | None) -> TrainResult:
        return TrainResult.from_rows(
            self.log.rows,
            scaled=any(row.scale != 1 for row in self.log.rows) or self.scaler is not None,
            eval_loss=eval_loss,
            peak_memory_bytes=self.readings.memory.peak(),
            precision=self.precision.word,
            steps=self.config.steps,
            evaluations=tuple(self.evaluations),
            notes=(*self.said(), *self.compiler.notes(self.log.rows)),
            out=self.out,
            best=self.best[0] if self.best is not None else None,
            plan=self.plan,
        )
