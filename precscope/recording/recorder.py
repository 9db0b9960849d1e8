"""The recorder: `with ps.record(model, "runs/a", optimizer=opt, scaler=scaler, every=10) as rec: ...; rec.step()`.

Hooks are in place only during recorded steps (0, every, 2 every, ...), so that the other steps run as if precscope were
not there. Statistics stay on the device until a flush; a flush makes one copy and writes one part. The run's numbers
are untouched: hooks only read.

On several processes every one records, statistics are merged at each flush, and the first one writes (merging.py).
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..attribution import unwrap
from ..batches import RandomStates
from ..errors import ModelError, RunDirectoryError, UsageError
from ..preservation import ForcedEager
from . import graph, lossscale
from .distributed import ddp_in
from .eagerness import EagerCost
from .observations import Observations
from .output import Output
from .owners import watched_modules
from .updates import OptimizerWatcher, as_list
from .watcher import Watcher

if TYPE_CHECKING:
    from .shadow import Closure, Truth

_FLUSH_SLOTS = 4096  # of 2.3 kB each: the buffer stays near 10 MB however large the model
_FLUSH_SECONDS = 60.0


class Recorder:
    """Records activations, gradients, weights, updates and optimizer state of `model`; see `record`.

    index: the running step. scaler: the GradScaler (or number) whose scale is divided out of gradients; may be set
    between two steps. failed: why recording was stopped, None while it goes on.
    """

    def __init__(
        self,
        model: nn.Module,
        out: str | Path,
        *,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
        scaler: Any = None,
        every: int = 10,
        flush_every: int = 10,
        max_calls: int = 16,
        shadow_every: int | Collection[int] | None = None,
        ops: bool = False,
        on_error: str = "warn",
        exist: str = "error",
        first_step: int = 0,
        info: dict[str, Any] | None = None,
        merge: bool = True,
    ) -> None:
        if every < 1 or flush_every < 1 or max_calls < 1:
            raise UsageError(
                f"every, flush_every and max_calls must be 1 or more, not {every}, {flush_every}, {max_calls}"
            )
        if isinstance(shadow_every, int) and shadow_every < 1:
            raise UsageError(f"shadow_every must be 1 or more, a collection of steps, or None, not {shadow_every}")
        if on_error not in ("warn", "raise"):
            raise UsageError(f"on_error must be 'warn' or 'raise', not {on_error!r}")
        self.model = unwrap(model)
        self._ddp = ddp_in(model)
        self._cost = EagerCost(model)
        if not watched_modules(self.model):
            raise ModelError(f"{type(self.model).__name__} has no module that computes: there is nothing to record")
        self.every, self.flush_every, self.on_error = every, flush_every, on_error
        self.shadow_every, self.ops = shadow_every, ops
        self._out, self._exist, self._info, self._merge = Path(out), exist, info or {}, merge
        self._optimizers = as_list(optimizer)
        self.scaler = lossscale.checked(scaler)
        self._max_calls = max_calls
        self._eager = ForcedEager()
        self._open = False
        self.index = first_step
        self.failed: str | None = None
        self.flops: dict[str, int] = {}  # of one pass per module, counted; estimated from weights where empty
        self._recorded: list[int] = []  # steps

    # life cycle

    def __enter__(self) -> Recorder:
        self._output = Output(
            self.model, self._out, exist=self._exist, first_step=self.index, merge=self._merge,
            settings={"every": self.every, "flush_every": self.flush_every},
            group=None if self._ddp is None else self._ddp.process_group,
        )  # fmt: skip
        self._ranks, self.directory = self._output.ranks, self._output.directory
        try:
            self._begin()
        except BaseException:
            self._open = False
            self._detach()
            self._ranks.leave()
            raise
        return self

    def _begin(self) -> None:
        self._observations = Observations(self._ranks.world)
        self._watcher = Watcher(
            self.model, self._observations, scale=self._loss_scale, max_calls=self._max_calls,
            training=bool(self._optimizers),
        )  # fmt: skip
        self._updates = OptimizerWatcher(
            self._optimizers, self._observations, self._watcher.owners, self._watcher.names
        )
        self._since_flush = 0
        self._flushed_at = time.monotonic()
        self._graph_written = False
        self._output.begin({"every": self.every, **self._info, **self._described("running")})
        self._open = True
        self._begin_step()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        self._detach()
        failing = kind is not None
        if failing:
            self._ranks.leave()  # the other processes may never come to this point
        if failing and self.failed is None and isinstance(value, RunDirectoryError):
            self.failed = str(value)  # it is being raised: no second word about it
        raising = self.on_error == "raise" and not failing
        try:
            self._flush(raising=raising)
            self._guarded(self._write_graph, raising=raising)
            content = self._described("failed" if failing else "done")
            self._guarded(lambda: self._output.end(content, value), raising=raising)
        finally:
            self._ranks.leave()
            self._observations = Observations()

    def step(self) -> None:
        """End an optimizer step. Call it once after each `optimizer.step()`, `scaler.update()` included; where a round
        of the loop steps several optimizers, once after the last.

        Raises UsageError outside the `with` block.
        """
        if not self._open:
            raise UsageError("step() belongs inside the with block: with ps.record(model, out) as rec: ...; rec.step()")
        self._cost.end()
        if self.recording:
            self._recorded.append(self.index)
            self._since_flush += 1
            self._watcher.end_step()
            self._updates.end_step()
        if self.index % self.every == 0:
            self._flush_where_due()
        self.index += 1
        self._begin_step()

    def go_back(self, step: int) -> None:
        """The run goes back to `step`, to an earlier checkpoint: what was recorded from there on is dropped, on disk as
        well, and `step` is the running step now. Call it between two steps, on all processes.

        Raises UsageError outside the `with` block and for a step that is still to come.
        """
        if not self._open or step > self.index:
            raise UsageError(
                f"go_back() belongs inside the with block, and goes to an earlier step: this is step {self.index}, "
                f"not {step}"
            )
        self._detach()
        self._updates.forget()
        self._flush(raising=False)
        self._guarded(lambda: self._output.drop(step))
        self._recorded = [index for index in self._recorded if index < step]
        self.index = step
        self._begin_step()

    @property
    def shadow_due(self) -> bool:
        """Whether `shadow_every` asks for a shadow step in the present step, which must be a recorded one."""
        if not self._open or not self.recording or self.shadow_every is None:
            return False
        if isinstance(self.shadow_every, int):
            return self.index % self.shadow_every == 0
        return self.index in self.shadow_every

    def shadow(
        self,
        closure: Closure | Sequence[Closure],
        *,
        loss: torch.Tensor | float | None = None,
        random: Sequence[RandomStates] | None = None,
    ) -> Truth | None:
        """Run the present step's batch once more in true fp32, and leave nothing behind: a shadow step.

            scaler.scale(loss).backward()
            rec.shadow(lambda: loss_of(model, batch), loss=loss)    # before clipping and optimizer.step()

        closure: returns the loss as the running step computed it, without backward and without the loss scale; it need
        not enter autocast, and where it does, that has no effect. After several backward passes (gradient
        accumulation) a list of closures, one per micro-batch and each divided as it was there: .grad is the sum of
        all, and is compared with the sum of theirs. loss: of the running step, unscaled, for the comparison. random:
        states of the generators at the beginning of each closure; None: those at the beginning of the step, and for
        each pass of the model those of the step's own passes, so that dropout draws the same.

        Does nothing and returns None in steps that are not recorded or, where `shadow_every` is set, not due. Writes
        shadow-NNNNNN.parquet (statistics and gradient-weighted histograms of fp32 tensors) and truth-NNNNNN.parquet
        (how far the gradients in .grad are from the fp32 ones; they may still hold the loss scale); with ops=True also
        ops-NNNNNN.parquet, every op of one more fp32 pass. Model, gradients,
        buffers, generators and ordinary statistics are left as they were. Costs one fp32 step and an extra pass over
        each tensor; keeps a byte for each element of an activation until its gradient arrives.

        Under DistributedDataParallel, `record` is to be given the wrapped model, and all processes are to call shadow()
        in the same step, with gradients that were exchanged: those of fp32 are averaged over the processes, too.

        Raises UsageError after the optimizer's step, inside ps.emulate, and where a closure returns no loss; what a
        closure raises passes through. A directory that cannot be written is treated as `on_error` says.
        """
        if not self._open:
            raise UsageError("shadow() belongs inside the with block: with ps.record(model, out) as rec: ...")
        if not self.recording or (self.shadow_every is not None and not self.shadow_due):
            return None
        from ..emulation.emulator import is_emulating
        from .shadow import ShadowStep

        if is_emulating():
            raise UsageError(
                "shadow() runs the model in true fp32, and ps.emulate is active: leave its with block first, or record "
                "the emulated run without shadow steps"
            )

        watcher = self._watcher
        if watcher.versions and watcher.versions != watcher.parameter_versions():
            raise UsageError(
                "shadow() compares with the gradients of the running step: call it after backward() and before "
                "optimizer.step(), which has changed the parameters already"
            )
        if random is None:
            random = [watcher.began] if watcher.began is not None else []
        others = [p for o in self._optimizers for g in o.param_groups for p in g["params"] if p not in watcher.owners]
        scale_of = partial(lossscale.scale_of_gradient, self.scaler, self._optimizers)
        step = ShadowStep(
            self.index, scale_of, random, watcher.passes_began, others=others, max_calls=self._max_calls,
            ddp=self._ddp, ranks=self._ranks,
        )  # fmt: skip
        closures = [closure] if callable(closure) else list(closure)
        with self.paused():
            observations, truth = step.run(self.model, closures, loss)
            records = step.run_ops(self.model, closures) if self.ops else None

        def write() -> None:
            self._output.rows(observations, "shadow")
            self._output.truth(truth, records, self.index)

        self._guarded(write, raising=self.on_error == "raise")
        self._settle()
        return truth

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside, an evaluation in mid-run for instance, is not recorded."""
        before, self._watcher.paused = self._watcher.paused, True
        try:
            yield
        finally:
            self._watcher.paused = before

    def flush(self) -> None:
        """Write what was recorded so far; of several processes all must call it.

        Raises RunDirectoryError where the directory cannot be written.
        """
        self._flush(raising=True)

    @property
    def recording(self) -> bool:
        """Whether the present step is recorded."""
        return self._watcher.attached

    # internals

    def _begin_step(self) -> None:
        self._observations.begin_step()
        if self.failed is None and self.index % self.every == 0:
            self._eager.hold()
            self._watcher.attach(self.index)
            self._updates.attach(self.index)
        else:
            self._detach()
        self._cost.begin(recorded=self.recording)

    def _loss_scale(self) -> float | torch.Tensor | None:
        return lossscale.loss_scale(self.scaler)

    def _detach(self) -> None:
        self._watcher.detach()
        self._updates.detach()
        self._eager.release()

    def _flush_where_due(self) -> None:
        """Flush where the memory or the time of any process asks for it: all do so at the same step."""
        slow = time.monotonic() - self._flushed_at > _FLUSH_SECONDS
        due = self._since_flush >= self.flush_every or self._observations.used >= _FLUSH_SLOTS or slow
        if self._ranks.any(self.recording and due):
            self._flush(raising=self.on_error == "raise")

    def _flush(self, *, raising: bool) -> None:
        self._since_flush = 0
        self._flushed_at = time.monotonic()
        self._guarded(lambda: self._output.rows(self._observations), raising=raising)
        if not self._graph_written and self.failed is None:  # a killed run is to have one, too
            self._guarded(self._write_graph, raising=raising)
            self._graph_written = True
        self._settle()

    def _settle(self) -> None:
        """Where one process cannot write any more, all stop recording."""
        if self._ranks.any(self.failed is not None):
            self._ranks.leave()
            self.failed = self.failed or "another process stopped recording"

    def _guarded(self, action: Any, *, raising: bool = False) -> None:
        """Do `action`; where the directory cannot be written, raise, or warn once and stop recording: a full disk must
        not end a training run."""
        try:
            action()
        except RunDirectoryError as error:
            if raising:
                raise
            if self.failed is None:
                self.failed = str(error)
                warnings.warn(f"precscope stopped recording: {error}", RuntimeWarning, stacklevel=4)

    def _write_graph(self) -> None:
        self._output.graph(graph.describe(self._watcher, self.flops))

    def _described(self, status: str) -> dict[str, Any]:
        content: dict[str, Any] = {"status": status, "recorded_steps": len(self._recorded)}
        if self._optimizers:
            content["optimizers"] = self._updates.describe()
        return {**content, **self._cost.describe()}


def record(
    model: nn.Module,
    out: str | Path,
    *,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
    scaler: Any = None,
    every: int = 10,
    flush_every: int = 10,
    max_calls: int = 16,
    shadow_every: int | Collection[int] | None = None,
    ops: bool = False,
    on_error: str = "warn",
    exist: str = "error",
    first_step: int = 0,
    info: dict[str, Any] | None = None,
    merge: bool = True,
) -> Recorder:
    """A context manager that records `model` into the run directory `out` while any training loop runs.

        with ps.record(model, "runs/a", optimizer=opt, scaler=scaler, every=10) as rec:
            for batch in loader:
                ...
                rec.step()

    optimizer: one or several, `optimizer=[a, b]`; their updates and state are recorded, and passes without gradients of
    a model in eval mode are taken for evaluations and left out. scaler: the GradScaler (or a number) whose scale is
    divided out of gradients; a step has one. every: record steps 0, every, 2 every, ... flush_every: recorded steps per
    part. max_calls: call indices kept apart per module and pass. shadow_every: which recorded steps `rec.shadow(...)`
    takes: multiples of a number, the steps of a collection, or, with None, all in which it is called. ops: these steps
    also record the result of every op. on_error:
    "warn" stops recording when the directory cannot be written and lets the run go on; "raise" ends it. exist: see
    prepare_directory. first_step: index of the first step, for resumed runs. info: more keys for run.json.
    merge: under torch.distributed, enter it on all processes, with the same `out`: rows are merged over them at each
    flush, equal those of one process that takes their batches as micro-batches, and the first process writes. Where
    each has an `out` of its own, or with merge=False (one process alone; tensor and pipeline parallel models), nothing
    is exchanged.

    The losses and weights of the run are the same bit for bit with and without it; compiled models run their recorded
    steps eagerly. Raises UsageError, ModelError, RunDirectoryError.
    """
    return Recorder(
        model, out, optimizer=optimizer, scaler=scaler, every=every, flush_every=flush_every, max_calls=max_calls,
        shadow_every=shadow_every, ops=ops, on_error=on_error, exist=exist, first_step=first_step, info=info,
        merge=merge,
    )  # fmt: skip
