"""ps.export, and the check of what is written."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from .. import __version__
from ..applying import apply
from ..attribution import unwrap
from ..batches import preserved_rng
from ..errors import ModelError, RunDirectoryError, RunError, UsageError
from ..formats import get_format
from ..inference.calls import called_with, find_call
from ..inference.running import checkpoint_of
from ..plans import PrecisionPlan
from ..preservation import preserved
from ..replaying.saved import weights_of
from ..tasks import Task
from ..training.devices import own_device, to_device
from ..training.halfmatmul import half_matmul_through_fp32, needs_half_matmul
from . import onnxfile, program
from .result import Exported

KINDS = (".pt2", ".onnx")
_EMULATED = ("e4m3", "e5m2")


def export(
    plan: PrecisionPlan | str | Path,
    model: nn.Module | Task,
    example_inputs: Any = None,
    *,
    out: str | Path,
    run: str | Path | None = None,
    dynamic_shapes: Any = None,
    dynamic_batch: bool = False,
    opset: int | None = None,
    check: bool = True,
) -> Exported:
    """Write `model` as it runs under `plan` to one file, which needs no precscope.

    plan: a PrecisionPlan or its file. model: a module; or a Task, whose first held-out (or training) batch then gives
    the example inputs. example_inputs: a tuple of arguments, a dict of keyword arguments or one tensor. out: .pt2 (a
    torch.export archive) or .onnx (needs onnx and onnxscript). run: a training run whose newest checkpoint gives the
    weights. dynamic_shapes: as torch.export.export takes them; dynamic_batch: the first dimension of each tensor input
    may change. opset: of ONNX; None: torch's default. check: run the file on the example inputs, and write none that
    fails or disagrees; without it a .pt2 is written although it disagrees, and an .onnx is not run.

    8-bit formats are emulated: a .pt2 holds their rounding as plain operations (fake quantisation), ONNX has no
    operations for it. The model is exported in evaluation mode and left as found.
    Raises UsageError, PlanError and ModelError for what cannot be exported, RunError for missing packages or a file
    that does not run or compute as planned, RunDirectoryError where it cannot be written.
    """
    path = Path(out)
    plan = PrecisionPlan.load(plan) if isinstance(plan, str | Path) else plan
    _check(plan, path, model, example_inputs, dynamic_shapes is not None and dynamic_batch)
    if path.suffix == ".onnx":
        onnxfile.need_packages()
    own = model.model if isinstance(model, Task) else model
    root = unwrap(own)
    found = checkpoint_of(run)
    with preserved_rng(cuda=True), weights_of(root, found["model"] if found else None, str(run)):
        with preserved(own), torch.no_grad():
            own.eval()
            arguments = _inputs_of(model) if isinstance(model, Task) else program.is_arguments(example_inputs)
            shapes = program.dynamic_first(root, arguments) if dynamic_batch else dynamic_shapes
            return _Job(plan, root, arguments, path, check).run(shapes, opset)


class _Job:
    def __init__(
        self, plan: PrecisionPlan, model: nn.Module, arguments: program.Arguments, path: Path, check: bool
    ) -> None:
        self.plan, self.model, self.arguments, self.path, self.check = plan, model, arguments, path, check
        self.notes: list[str] = []
        self.unfused = False

    def run(self, shapes: Any, opset: int | None) -> Exported:
        layers = self.plan.resolve(name for name, _ in self.model.named_modules())
        self.formats = {layer.compute for layer in layers.values()}
        emulated = [f for f in _EMULATED if f in self.formats]
        wide: list[Tensor] = []
        if self.path.suffix == ".onnx":
            if emulated:
                raise UsageError(
                    f"the plan has {emulated[0]} modules, whose emulated rounding ONNX has no operations for: "
                    "export to a .pt2 file, or give these modules bf16 or fp16"
                )
            with apply(PrecisionPlan.uniform("fp32"), self.model):
                wide = program.planned_outputs(self.model, self.arguments)
        elif emulated:
            self.notes.append(f"{emulated[0]} is emulated: the file rounds to it by plain operations, at their cost")
        self.through = self._half_products()
        with apply(self.plan, self.model) as handle:
            self.notes += handle.notes
            planned = program.planned_outputs(self.model, self.arguments, self.through)
        if not planned:
            raise ModelError("the model returns no tensor on the example inputs: a file of it would have no output")
        with apply(program.traceable(self.plan, self.model), self.model):
            traced = program.trace(self.model, self.arguments, dynamic_shapes=shapes)
            chosen, got = self._with_casts(traced, planned)
            self._must_agree(planned, got)
            return self._onnx(chosen, planned, wide, opset) if wide else self._pt2(chosen, planned)

    def _half_products(self) -> program.Around:
        """What goes around each run here: fp16 products on a CPU without them are computed as the trainer does."""
        if "fp16" not in self.formats or own_device(self.model).type != "cpu" or not needs_half_matmul():
            return contextlib.nullcontext
        if self.check:
            self.notes.append("fp16 products were computed through fp32 for the check: this CPU has none of its own")
        return half_matmul_through_fp32

    def _must_agree(self, planned: list[Tensor], got: list[Tensor] | None) -> None:
        """Raises RunError where the program does not return what the planned model does: bit for bit on the CPU, within
        rounding elsewhere, where kernels may be chosen anew."""
        apart = float("inf") if got is None else program.distance(planned, got)
        allowed = 0.0 if own_device(self.model).type == "cpu" else self._rounding()
        if self.check and not (self.unfused or program.same(planned, got) or 0 < apart <= allowed):
            raise RunError(
                "the exported program does not compute what the planned model does"
                + ("" if got is None else f" (relative difference {apart:.2g})")
                + ": not written; check=False (--no-check) writes it all the same"
            )

    def _pt2(self, chosen: ExportedProgram, planned: list[Tensor]) -> Exported:
        chosen.example_inputs = None  # the user's data is no part of the model
        with _beside(self.path) as temporary:
            with open(temporary, "wb") as file:
                torch.export.save(chosen, file, extra_files={"precscope.json": json.dumps(self._about(), indent=1)})
            with open(temporary, "rb") as file, warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The given buffer is not writable")  # torch 2.11
                got = program.run(torch.export.load(file), self.arguments, self.through)
            self._must_agree(planned, got)
        return Exported(
            self.path, "pt2", program.casts(chosen), program.regions(chosen), program.weights(chosen),
            f"torch {torch.__version__}" if got is not None else "",
            program.same(planned, got) if got is not None else None,
            program.distance(planned, got) if got is not None else None, tuple(self.notes),
        )  # fmt: skip

    def _with_casts(
        self, traced: ExportedProgram, planned: list[Tensor]
    ) -> tuple[ExportedProgram, list[Tensor] | None]:
        """The program with plain casts where that computes the same, else with autocast regions; and what it returns.

        PyTorch's encoder layers and LSTMs have fused kernels in eager inference that no graph holds and that round at
        other places: without these they must agree.
        """
        plain = program.with_casts(traced)
        got = program.run(plain, self.arguments, self.through) if plain is not None else None
        if plain is not None and program.same(planned, got):
            return plain, got
        whole = program.run(traced, self.arguments, self.through)
        if program.same(planned, whole):
            self.notes.append("autocast regions are kept whole in the graph: taken apart into casts they differ")
            return traced, whole
        with _no_fused_encoder():
            unfused = program.planned_outputs(self.model, self.arguments, self.through)
        if got is not None and program.same(unfused, got) and program.distance(planned, got) <= self._rounding():
            self.unfused = True
            self.notes.append(
                "equal, bit for bit, to the planned model without PyTorch's fused kernels (encoder layers, LSTM)"
            )
            return plain, got  # type: ignore[return-value]
        return (traced, whole) if whole is not None or plain is None else (plain, got)

    def _rounding(self) -> float:
        """Relative error that rounding a few values elsewhere explains: 4 ulp of the plan's coarsest format."""
        return 4 * max(get_format(f).eps for f in self.formats)

    def _onnx(self, chosen: ExportedProgram, planned: list[Tensor], wide: list[Tensor], opset: int | None) -> Exported:
        checked, apart = "", None
        with _beside(self.path) as temporary:
            proto = onnxfile.write(
                chosen, temporary, opset=opset, about={"precscope": json.dumps(self._about(), sort_keys=True)}
            )
            if self.check and onnxfile.has_runtime():
                apart = self._run_onnx(temporary, planned, wide)
                checked = onnxfile.runtime_name()
            elif not self.check:
                self.notes.append("the file was not run (check=False)")
            else:
                self.notes.append("the file was not run: pip install onnxruntime to have it checked")
            if not checked and "bf16" in self.formats:
                self.notes.append("bf16: onnxruntime has few bf16 operations on CPUs; this file may run on GPUs only")
        return Exported(
            self.path, "onnx", onnxfile.casts(proto), 0, onnxfile.weights(proto), checked,
            apart == 0 if apart is not None else None, apart, tuple(self.notes),
        )  # fmt: skip

    def _run_onnx(self, path: Path, planned: list[Tensor], wide: list[Tensor]) -> float:
        """How far onnxruntime is from the planned model. Raises RunError where that is more than the formats explain:
        twice the plan's own distance from fp32, and some ulp."""
        try:
            got = onnxfile.run(path, self.arguments)
        except RunError as error:
            hint = "" if "bf16" not in self.formats else "; it has few bf16 operations on CPUs: use fp16 in the plan"
            raise RunError(f"{error}{hint}; check=False (--no-check) writes the file all the same") from error
        apart = program.distance(planned, got)
        allowed = 2 * program.distance(planned, wide) + self._rounding()
        if not apart <= allowed:
            raise RunError(
                f"{onnxfile.runtime_name()} is {apart:.2g} off the planned model, more than its formats explain "
                f"({allowed:.2g}): not written; check=False (--no-check) writes it all the same"
            )
        return apart

    def _about(self) -> dict[str, Any]:
        return {"schema": 1, "precscope": __version__, "torch": torch.__version__, "model": type(self.model).__name__,
                "plan": json.loads(self.plan.to_json())}  # fmt: skip


def _inputs_of(task: Task) -> program.Arguments:
    """What the task calls its model with on its first held-out batch, or training batch."""
    batch = next(iter(task.evaluation(limit=1)), None)
    batch = to_device(task.batch(0) if batch is None else batch, task.model)
    call = find_call(task, batch)
    with called_with(task.model) as seen:
        call.function(call.fresh())
    if len(seen) != 1:
        raise UsageError(
            f"the task's forward calls the model {len(seen)} times: export it with example inputs instead, "
            "ps.export(plan, task.model, example_inputs, out=...)"
        )
    return seen[0]


def _check(plan: Any, path: Path, model: Any, example_inputs: Any, both: bool) -> None:
    if not isinstance(plan, PrecisionPlan):
        raise UsageError(f"export takes a PrecisionPlan or its file first, not {type(plan).__name__}")
    if plan.phases:
        raise UsageError("this plan has phases: export that of one step, plan.at_step(step)")
    if path.suffix not in KINDS:
        raise UsageError(f"cannot tell the format of {path}: its name must end in {' or '.join(KINDS)}")
    if not isinstance(model, nn.Module | Task):
        raise UsageError(f"export takes a torch.nn.Module or a Task, not {type(model).__name__}")
    if isinstance(model, nn.Module) and example_inputs is None:
        raise UsageError("give example inputs for the model, for instance (x,), or a Task, which has batches")
    if isinstance(model, Task) and example_inputs is not None:
        raise UsageError("a Task's batches give the example inputs: leave them out, or pass task.model")
    if both:
        raise UsageError("give dynamic_shapes or dynamic_batch, not both")


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A file of that name in a directory beside `path`; on success it goes there, with others that came with it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
            yield Path(folder) / path.name
            for file in sorted(Path(folder).iterdir(), key=lambda f: f.name == path.name):
                os.replace(file, path.parent / file.name)
    except OSError as error:
        raise RunDirectoryError(f"cannot write {path} ({error.strerror or error}): choose another place") from error


@contextlib.contextmanager
def _no_fused_encoder() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
