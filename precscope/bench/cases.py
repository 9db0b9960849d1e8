"""A folder of case files: small models, each with one numerical failure in fp16 or bf16, or a healthy look-alike.

A case is one Python file with a function `build() -> (model, batch_fn, loss_fn)`, where `batch_fn(step) -> tuple` and
`loss_fn(model, batch) -> scalar tensor`, and constants in capitals, which `Case` describes. Files whose name begins
with an underscore are no cases; those that begin with `ctl_` are controls, in which nothing is wrong. `accept.json`
beside them may name other modules that cure a case:
{case: {format: {"also_cures_alone": [names], "guilty_not_strictly_needed": [names]}}}.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..errors import TaskError, first_line, nearest

if TYPE_CHECKING:
    import torch
    from torch import nn

FORMATS = ("fp16", "bf16")
"""Formats a case can fail in."""

_MODES = ("autocast", "pure")
_OPTIMIZERS = ("adam", "sgd")
_FUNCTIONS = ("make_optimizer", "after_step", "evaluate")
_ACCEPTED = ("also_cures_alone", "guilty_not_strictly_needed")


@dataclass(frozen=True)
class Accepted:
    """Other answers to one (case, format). stand_ins: modules whose fp32 alone cures it, too. spared: guilty modules
    that need not be named."""

    stand_ins: tuple[str, ...] = ()
    spared: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """One case. Optional parts have the defaults that are given here.

    guilty: format -> names of modules that must not run in it; none: the format is harmless. mode: "autocast"
    (torch.autocast; with fp16 a loss scale of 2^12 to start with) or "pure" (weights, buffers and inputs in the format,
    no loss scale). steps: of training; 0: inference, scored by the relative error of the output, at most `rel_tol`.
    loss_scaling: False where the recipe has no loss scale. cast_batch: whether "pure" casts floating inputs, too. tol,
    atol: a run fails when its final value exceeds fp32's by more than tol |fp32| + atol. make_optimizer: (model) ->
    optimizer. after_step: (model, step). evaluate: (model, batch) -> float, in place of the final loss; eval_grad: it
    needs gradients. accepted: format -> Accepted.
    """

    name: str
    path: Path
    build: Callable[[], tuple[nn.Module, Callable[[int], tuple], Callable[[nn.Module, Any], torch.Tensor]]]
    guilty: dict[str, tuple[str, ...]]
    kind: str = ""
    phase: str = ""
    source: str = ""
    fix: str = ""
    mode: str = "autocast"
    steps: int = 20
    lr: float = 1e-2
    opt: str = "adam"
    loss_scaling: bool = True
    cast_batch: bool = True
    tol: float = 0.25
    atol: float = 0.02
    rel_tol: float = 0.05
    eval_grad: bool = False
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None
    after_step: Callable[[nn.Module, int], None] | None = None
    evaluate: Callable[[nn.Module, Any], float] | None = None
    accepted: dict[str, Accepted] | None = None

    @property
    def is_control(self) -> bool:
        """Whether it is a look-alike in which nothing is wrong."""
        return self.name.startswith("ctl_")

    @property
    def has_loss_scale(self) -> bool:
        """Whether its fp16 runs have a loss scale."""
        return self.loss_scaling and self.mode == "autocast"

    def fails_in(self, fmt: str) -> bool:
        """Whether training in `fmt` is to fail."""
        return bool(self.guilty[fmt]) and not self.is_control

    def accepts(self, fmt: str) -> Accepted:
        """Other answers that are right for `fmt`."""
        return (self.accepted or {}).get(fmt, Accepted())


_CONSTANTS: dict[str, tuple[str, type | tuple[type, ...]]] = {
    "KIND": ("kind", str), "PHASE": ("phase", str), "SOURCE": ("source", str), "FIX": ("fix", str),
    "MODE": ("mode", str), "STEPS": ("steps", int), "LR": ("lr", (int, float)), "OPT": ("opt", str),
    "LOSS_SCALING": ("loss_scaling", bool), "CAST_BATCH": ("cast_batch", bool), "TOL": ("tol", (int, float)),
    "ATOL": ("atol", (int, float)), "REL_TOL": ("rel_tol", (int, float)), "EVAL_GRAD": ("eval_grad", bool),
}  # fmt: skip


def load_cases(folder: str | Path, names: Sequence[str] = ()) -> list[Case]:
    """The cases of a folder in order of their names, or those of them that are called `names`.

    Raises TaskError: no such folder, no case in it, a name that no file has, and what `load_case` refuses.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TaskError(f"no folder {folder}: give one that holds case files (*.py with a function build())")
    files = {p.stem: p for p in sorted(folder.glob("*.py")) if not p.name.startswith("_")}
    if not files:
        raise TaskError(f"{folder} holds no case: a case is a Python file with a function build()")
    for name in names:
        if name not in files:
            hint = nearest(name, files) or ", ".join(list(files)[:5])
            raise TaskError(f"{folder} has no case {name!r}; it has {hint}")
    accepted = _read_accepted(folder / "accept.json")
    return [load_case(files[n], accepted=accepted.get(n)) for n in (dict.fromkeys(names) or files)]


def load_case(path: str | Path, *, accepted: dict[str, Accepted] | None = None) -> Case:
    """The case in the file `path`.

    Raises TaskError where it cannot be imported, has no build(), or a constant is not what it must be.
    """
    path = Path(path)
    module = _import(path)
    values: dict[str, Any] = {}
    for constant, (field, kind) in _CONSTANTS.items():
        if hasattr(module, constant):
            values[field] = _checked(path, constant, getattr(module, constant), kind)
    for name in ("build", *_FUNCTIONS):
        function = getattr(module, name, None)
        if function is not None and not callable(function):
            raise TaskError(f"{path}: {name} must be a function, not {type(function).__name__}")
        values[name] = function
    if values["build"] is None:
        raise TaskError(f"{path} has no build(): a case needs build() -> (model, batch_fn, loss_fn)")
    for constant, field, allowed in (("MODE", "mode", _MODES), ("OPT", "opt", _OPTIMIZERS)):
        if values.get(field, allowed[0]) not in allowed:
            raise TaskError(f"{path}: {constant} must be one of {', '.join(allowed)}, not {values[field]!r}")
    if values.get("steps", 0) < 0:
        raise TaskError(f"{path}: STEPS must be 0 (inference) or more, not {values['steps']}")
    guilty = {f: _names(path, module, c) for f, c in zip(FORMATS, ("GUILTY", "GUILTY_BF16"), strict=True)}
    return Case(name=path.stem, path=path, guilty=guilty, accepted=accepted, **values)


def _import(path: Path) -> ModuleType:
    if not path.is_file():
        raise TaskError(f"no case file {path}")
    spec = importlib.util.spec_from_file_location(f"_precscope_case_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise TaskError(f"{path} raised {type(error).__name__} on import: {first_line(error)}") from error
    return module


def _checked(path: Path, constant: str, value: Any, kind: type | tuple[type, ...]) -> Any:
    right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not right:
        wanted = kind.__name__ if isinstance(kind, type) else "a number"
        raise TaskError(f"{path}: {constant} must be {wanted}, not {value!r}")
    return value


def _names(path: Path, module: ModuleType, constant: str) -> tuple[str, ...]:
    value = getattr(module, constant, None)
    if not isinstance(value, list | tuple) or not all(isinstance(n, str) for n in value):
        raise TaskError(f"{path}: {constant} must be a list of module names (empty: harmless), not {value!r}")
    return tuple(value)


def _read_accepted(path: Path) -> dict[str, dict[str, Accepted]]:
    """accept.json, {} where there is none."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            case: {fmt: Accepted(*(tuple(said.get(key, ())) for key in _ACCEPTED)) for fmt, said in formats.items()}
            for case, formats in content.items()
        }
    except (ValueError, AttributeError, TypeError) as error:
        raise TaskError(
            f"cannot read {path} ({error}): it must hold {{case: {{format: {{{_ACCEPTED[0]!r}: [...], "
            f"{_ACCEPTED[1]!r}: [...]}}}}}}"
        ) from None
