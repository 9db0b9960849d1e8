"""torch.compile in a run: the model is compiled once the plan is on it, and the run says what that did.

What is compiled is the model's forward and its backward; the loss function around it, clipping and the optimizer are
not. Names in state_dict, checkpoints included, are those of the model itself. Numbers differ a little from those of an
uncompiled run: a fused kernel keeps in fp32 what eager PyTorch rounds between two operations (with options
{"emulate_precision_casts": True} inductor rounds as eager does).

- Recorded steps run eager, since compiled code calls no hooks; what that costs is told from the run's own step times.
- A plan that changes (a phase, a promotion by the guard) makes torch.compile compile anew, at the first step after it;
  a plan that comes back finds its code again.
- Training and evaluation are compiled apart, each when it is first run.
- fp16 products on CPUs without fp16 arithmetic go through fp32 in compiled code too (halfmatmul.py).
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ..errors import TrainingError, UsageError, first_line, nearest
from ..preservation import backward_outside_autocast

if TYPE_CHECKING:
    from .log import Row

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class CompileConfig:
    """How to compile; the arguments of torch.compile by the same names.

    backend: "inductor" writes and compiles C++ or Triton; "aot_eager" and "eager" trace only and need no compiler (for
    tests). mode: one of MODES. dynamic: None compiles for the shapes seen, and for all when they change. fullgraph:
    refuse a model that does not compile whole. options: inductor's.

    Raises UsageError for an unknown mode, and where mode and options are both given.
    """

    backend: str = "inductor"
    mode: str | None = None
    dynamic: bool | None = None
    fullgraph: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mode is not None and self.mode not in MODES:
            raise UsageError(f"compile mode must be one of {', '.join(MODES)}, or None, not {self.mode!r}")
        if self.mode is not None and self.options:
            raise UsageError("give a compile mode or options, not both: a mode is a set of options")


class Compiler:
    """Runs the model as it is: what a run without torch.compile does. active: whether there is anything compiled."""

    active = False
    config: CompileConfig | None = None

    def wrap(self, model: nn.Module) -> nn.Module:
        """What is called in place of `model`."""
        return model

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Around the whole run."""
        yield

    def stepped(self, step: int, *, eager: bool) -> None:
        """Note that `step` was run, `eager` because a recorder was at work."""

    def replanned(self, step: int) -> None:
        """Note that another plan is on the model from `step` on."""

    def describe(self, rows: list[Row]) -> dict[str, Any]:
        """For run.json, from the log of the run."""
        return {}

    def notes(self, rows: list[Row]) -> tuple[str, ...]:
        """The same in words."""
        return ()


class TorchCompile(Compiler):
    """A model under torch.compile, and the account of what that took."""

    active = True

    def __init__(self, config: CompileConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        require_compiler(config.backend, device)
        self._called = False  # whether the loss function has called what `wrap` made
        self._eager: set[int] = set()  # steps
        self._compiled: dict[int, int] = {}  # step -> how many graphs were compiled in it
        self._replanned: list[int] = []

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model` under torch.compile. Its parameters, state_dict and class stay what they are."""
        config = self.config
        options: dict[str, Any] = {"mode": config.mode, "options": dict(config.options) or None}
        backend: Any = config.backend
        if backend == "inductor" and self.device.type == "cpu":
            from .halfmatmul import inductor_through_fp32, needs_half_matmul

            if needs_half_matmul():
                backend, options = functools.partial(inductor_through_fp32, **options), {}
        compiled: Any = torch.compile(  # type: ignore[call-overload]
            model, backend=backend, dynamic=config.dynamic, fullgraph=config.fullgraph, **options
        )
        self._hook = compiled.register_forward_pre_hook(self._note_call)
        return compiled

    def _note_call(self, model: nn.Module, args: Any) -> None:
        self._called = True
        self._hook.remove()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count from here on. A failure to compile becomes a TrainingError of one sentence."""
        self._first = _counted()
        self._graphs = self._first.graphs
        try:
            with _more_recompilations() as self._one_more_plan, backward_outside_autocast(), _failures_in_words():
                yield
        finally:
            self._hook.remove()

    def stepped(self, step: int, *, eager: bool) -> None:
        graphs = _counted().graphs
        if eager:
            self._eager.add(step)
        else:
            self._eager.discard(step)
        if graphs > self._graphs:
            self._compiled[step] = self._compiled.get(step, 0) + graphs - self._graphs
        self._graphs = graphs

    def replanned(self, step: int) -> None:
        self._replanned.append(step)
        self._one_more_plan()

    def describe(self, rows: list[Row]) -> dict[str, Any]:
        """backend, mode; graphs compiled, by step and in all (evaluation included), graph breaks of the model, steps
        from which on another plan was in force, recorded steps (eager), median milliseconds of either kind of step, and
        milliseconds that steps took longer because something was compiled in them."""
        now = _counted()
        known = {row.step: row.time_ms for row in rows}
        compiled = [t for s, t in known.items() if s not in self._eager and s not in self._compiled]
        eager = [known[s] for s in sorted(self._eager & known.keys())]
        compiled_ms = statistics.median(compiled) if compiled else None
        return {
            "compile": {
                **{name: value for name, value in asdict(self.config).items() if value not in (None, {})},
                "graphs": now.graphs - self._first.graphs,
                "graph_breaks": now.breaks - self._first.breaks,
                "graphs_at_step": {str(step): count for step, count in sorted(self._compiled.items())},
                "replanned_at": list(self._replanned),
                "eager_steps": len(eager),
                "eager_ms": statistics.median(eager[1:] or eager) if eager else None,
                "compiled_ms": compiled_ms,
                "compiling_ms": sum(known[s] - (compiled_ms or 0.0) for s in self._compiled if s in known),
            }
        }

    def notes(self, rows: list[Row]) -> tuple[str, ...]:
        said = self.describe(rows)["compile"]
        if said["eager_steps"] >= len(rows):
            return tuple(_words(said))
        tried = _counted().tried > self._first.tried
        if not said["graphs"] and self._called and not tried:
            return (f"compiled with {said['backend']}: all code was there from an earlier run of this process",)
        if not said["graphs"]:
            return (
                "compile=True compiled nothing: the loss function calls no forward of the model that torch.compile "
                "can trace (TORCH_LOGS=graph_breaks tells why)",
            )
        return tuple(_words(said))


def make_compiler(wanted: bool | CompileConfig, device: torch.device) -> Compiler:
    """The Compiler for `compile=`. Raises UsageError for what it cannot be, or where no C++ compiler is found."""
    if wanted is False:
        return Compiler()
    if wanted is True:
        wanted = CompileConfig()
    if not isinstance(wanted, CompileConfig):
        raise UsageError(f"compile must be True, False or a precscope.training.CompileConfig, not {wanted!r}")
    return TorchCompile(wanted, device)


def require_compiler(backend: str, device: torch.device) -> None:
    """Raises UsageError where `backend` is unknown, or is "inductor" on a CPU and no C++ compiler is found."""
    from torch import _dynamo

    known = _dynamo.list_backends(None)
    if backend not in known:
        hint = nearest(backend, known)
        raise UsageError(
            f"torch.compile has no backend {backend!r}"
            + (f" (did you mean {hint}?)" if hint else "")
            + f"; it offers {', '.join(sorted(known))}"
        )
    if backend == "inductor" and device.type == "cpu" and not _has_cxx():
        raise UsageError(_NO_COMPILER)


_NO_COMPILER = (
    "compile=True needs a C++ compiler on the CPU, and none was found: install g++ or clang++ (with Python's headers: "
    "python3-dev), or name one in the environment variable CXX, or train without compile"
)


def _has_cxx() -> bool:
    from torch._inductor import config

    if sys.platform == "win32":
        return True  # inductor looks for it in ways of its own, and says what it misses
    names = config.cpp.cxx if isinstance(config.cpp.cxx, list | tuple) else (config.cpp.cxx,)
    return any(name and shutil.which(name) for name in names)


@contextlib.contextmanager
def _failures_in_words() -> Iterator[None]:
    from torch._dynamo.exc import BackendCompilerFailed, Unsupported
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        yield
    except Unsupported as error:
        raise TrainingError(
            f"the model does not compile whole ({first_line(error):.200}): train with fullgraph=False, or "
            "without compile; TORCH_LOGS=graph_breaks shows where"
        ) from error
    except (BackendCompilerFailed, CppCompileError, InvalidCxxCompiler) as error:
        cause = getattr(error, "inner_exception", error)
        if isinstance(cause, InvalidCxxCompiler):
            raise TrainingError(_NO_COMPILER) from error
        lines = [line for line in str(cause).strip().splitlines() if line.strip()] or [""]
        wanted = next((line for line in lines if "error:" in line), lines[0])
        advice = " (install Python's headers: python3-dev)" if "Python.h" in str(cause) else ""
        raise TrainingError(
            f"torch.compile failed: {type(cause).__name__}: {wanted.strip():.200}{advice}; train without compile, or "
            "with another backend, CompileConfig(backend='aot_eager')"
        ) from error


class _Counts(NamedTuple):
    """What this process has done so far: graphs compiled, graph breaks met, functions it tried to compile."""

    graphs: int
    breaks: int
    tried: int


def _counted() -> _Counts:
    from torch._dynamo.utils import counters

    breaks = sum(counters["graph_break"].values())
    return _Counts(counters["stats"]["unique_graphs"], breaks, counters["frames"]["total"])


_plans = 0
"""How many plans the runs of this process have compiled."""


@contextlib.contextmanager
def _more_recompilations() -> Iterator[Callable[[], None]]:
    """PyTorch compiles a function anew so many times in a process, whichever model it is called with, and then runs it
    uncompiled: inside, every plan of every run has that many. Yields what is to be called for each further plan."""
    from torch._dynamo import config

    limits = before, most = config.recompile_limit, config.accumulated_recompile_limit

    def one_more() -> None:
        global _plans
        _plans += 1
        config.recompile_limit = before * _plans
        config.accumulated_recompile_limit = max(most, before * _plans)

    one_more()
    try:
        yield one_more
    finally:
        config.recompile_limit, config.accumulated_recompile_limit = limits


def _words(said: dict[str, Any]) -> Iterator[str]:
    graphs, breaks = said["graphs"], said["graph_breaks"]
    yield (
        f"compiled with {said['backend']}: {graphs} graph{'s' * (graphs != 1)} in training and evaluation, "
        f"{breaks} graph break{'s' * (breaks != 1)}, {said['compiling_ms'] / 1e3:.1f} s of the training steps "
        "went into compiling"
        + ("" if said["backend"] in ("eager", "aot_eager") else "; numbers differ a little from an uncompiled run's")
    )
    if said["replanned_at"]:
        steps = ", ".join(map(str, said["replanned_at"]))
        again = sum(int(step) in said["replanned_at"] for step in said["graphs_at_step"])
        yield f"another plan from step {steps} on: compiled anew at {again} of these steps"
    if said["eager_steps"] and said["compiled_ms"]:
        yield (
            f"{said['eager_steps']} recorded steps ran eager, not compiled: {said['eager_ms']:.1f} ms against "
            f"{said['compiled_ms']:.1f} ms, {said['eager_ms'] / said['compiled_ms']:.2f} times as long; "
            "their numbers are those of eager mode"
        )
