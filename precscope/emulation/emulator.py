"""`emulate`: the context manager, which modules it concerns, and leaving things as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..attribution import Attribution, Where
from ..batches import preserved_rng
from ..errors import ModelError, UsageError, nearest
from ..formats import FloatFormat
from ..plans.lookup import Lookup, is_pattern
from ..preservation import preserved_buffers
from ..reference import check_rounding
from .casts import Casts
from .marker import marked
from .marks import Marks
from .mode import EmulationMode, Rounder, known_format

_POLICIES = ("cast", "autocast")
_active: list[Emulation] = []


def is_emulating() -> bool:
    """Whether an `emulate` block is entered."""
    return bool(_active)


def emulate(
    model: nn.Module,
    formats: str | FloatFormat | Mapping[str, str | FloatFormat],
    *,
    backward: bool = True,
    policy: str = "cast",
    rounding: str = "nearest_even",
    saturate: bool = False,
    device: str | None = None,
    outside: bool = False,
    seed: int = 0,
) -> Emulation:
    """A context manager inside which `model` computes as if in low precision, op by op, on any device.

        with ps.emulate(model, "fp16"):
            loss = task.loss(model, batch)                    # x * x beyond 65504 is inf
            loss.backward()
        with ps.emulate(model, {"blocks.3.*": "fp16", "head": "e4m3"}): ...

    What each op of the concerned modules takes and gives is rounded (overflow as the format has it), forward and, with
    backward=True, in the gradients that their backward ops make. Tensors keep their dtype. Code that asks for float32
    by name (`x.float()`, `softmax(dtype=torch.float32)`) gets it, until it casts back.

    formats: one for all modules, or by name: of exactly the module, else the one pattern that matches, else of its
    nearest parent; "fp32" leaves a module alone, and so does no entry. policy: "cast", every op (`.half()`), or
    "autocast": PyTorch's lists decide for each op, those of `device` ("cuda" or "cpu", by default where the model is),
    asked on whatever device runs; code that switches autocast off is heard. rounding, saturate: see quantize;
    "stochastic" draws from generators of its own, seeded with `seed`. outside: code outside every module, a functional
    loss, follows the root's format.

    Not rounded: views, integers, booleans, complex and sparse tensors, what runs in a torch.optim optimizer's step,
    statistics that kernels keep in float32 (LayerNorm's mean and rstd). Parameters are rounded where ops read them, not
    in place. As in half kernels, a matrix product, a sum or a fused attention adds up in the wide format and is rounded
    once; scatter and index additions round at every addition where the format is fp16 or bf16, once otherwise. Inside a
    concerned module `x.dtype` answers as it would in the real run, where the format has a torch dtype. Casts inside
    composite functions (multi_head_attention_forward, LSTM) are not seen: there a gradient may be rounded an op late.
    Where fp16 raises (masked_fill with -1e9) the emulated value is inf.

    On exit buffers and the random number generators are as they were; gradients are kept: they are results. Compiled
    code runs eagerly inside. Other dispatch modes are to be entered inside this one.
    Raises UsageError for an unknown policy, device or module, and where emulation, a tracer or an op recorder is active
    already; FormatError;
    PlanError where two patterns match.
    """
    return Emulation(
        model, formats, backward=backward, policy=policy, rounding=rounding, saturate=saturate, device=device,
        outside=outside, seed=seed,
    )  # fmt: skip


class Emulation:
    """What `emulate` returns. formats: module name -> format, for the modules that are rounded."""

    def __init__(
        self,
        model: nn.Module,
        formats: str | FloatFormat | Mapping[str, str | FloatFormat],
        *,
        backward: bool = True,
        policy: str = "cast",
        rounding: str = "nearest_even",
        saturate: bool = False,
        device: str | None = None,
        outside: bool = False,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ModelError(f"emulate takes a torch.nn.Module, got {type(model).__name__}")
        if policy not in _POLICIES:
            raise UsageError(f"policy must be 'cast' (every op) or 'autocast' (PyTorch's lists decide), not {policy!r}")
        self.who = Attribution(model)
        self.model = self.who.model
        self.policy, self.backward, self.outside = policy, backward, outside
        parameter = next(self.model.parameters(), None)
        self.device = "cpu" if parameter is None else parameter.device.type
        self.autocast_device = _autocast_device(device, self.device)
        self.formats = _by_module(self.model, formats, self.who.names)
        self.rounder = Rounder(check_rounding(rounding), bool(saturate), seed)
        self.marks = Marks()
        self.mode = EmulationMode(self, self.rounder, self.marks)
        self._optimizing = False

    def format_at(self, where: Where) -> FloatFormat | None:
        """The format of an op that runs there, None where it is not rounded."""
        if self._optimizing or (where.phase == "backward" and not self.backward):
            return None
        if not where.inside and not self.outside:
            return None
        return self.formats.get(where.module)

    def __enter__(self) -> Emulation:
        if _active:
            raise UsageError(
                "emulation is active already: give one emulate() the formats of all modules, "
                "emulate(model, {'blocks.3': 'fp16', 'head': 'e4m3'})"
            )
        if any(getattr(mode, "inside_emulation", False) for mode in _get_current_dispatch_mode_stack()):
            raise UsageError(
                "ps.trace and record_ops see emulated numbers only where they are entered inside: "
                "with ps.emulate(model, ...), ps.trace(model) as t: ..."
            )
        self.rounder.restart()
        with contextlib.ExitStack() as stack:
            stack.enter_context(preserved_rng(cuda=True))
            stack.enter_context(preserved_buffers(self.model))
            _active.append(self)
            stack.callback(_active.clear)
            stack.enter_context(self.who)
            stack.callback(self._optimizer_hooks())
            if self.policy == "autocast":
                stack.enter_context(marked(self.device))
            stack.enter_context(self.mode)
            stack.enter_context(Casts(self))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, value, trace)
        self.marks = self.mode._marks = Marks()
        self._optimizing = False

    def _optimizer_hooks(self) -> Any:
        def before(optimizer: Any, args: Any, kwargs: Any) -> None:
            self._optimizing = True

        def after(optimizer: Any, args: Any, kwargs: Any) -> None:
            self._optimizing = False

        handles = (register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after))

        def remove() -> None:
            for handle in handles:
                handle.remove()

        return remove


def _by_module(model: nn.Module, formats: Any, names: dict[nn.Module, str]) -> dict[str, FloatFormat]:
    """First name of each concerned module -> its format. An entry under any of a shared module's names counts."""
    entries = dict(formats) if isinstance(formats, Mapping) else {"": formats}
    known = {key: known_format(fmt) for key, fmt in entries.items()}
    every: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        every.setdefault(module, []).append(name)
    all_names = [name for several in every.values() for name in several]
    lookup = Lookup.of(known)
    _check(lookup, all_names)
    sources = lookup.sources(all_names)
    found = {}
    for module, several in every.items():
        deciding = [n for n in several if sources[n] == n] or [n for n in several if sources[n] is not None]
        fmt = known[sources[deciding[0]]] if deciding else None  # type: ignore[index]
        if fmt is not None:
            found[names[module]] = fmt
    return found


def _check(lookup: Lookup, names: list[str]) -> None:
    patterns = dict(lookup.patterns)
    for key in lookup.entries:
        if key in names or (key in patterns and any(patterns[key].match(name) for name in names)):
            continue
        if is_pattern(key):
            raise UsageError(f"emulate: pattern {key!r} matches no module of the model")
        near = nearest(key, names)
        hint = f" (did you mean {near}?)" if near else ""
        raise UsageError(f"emulate: the model has no module {key!r}{hint}; '' is the whole model")


def _autocast_device(device: str | None, own: str) -> str:
    if device is None:
        return "cuda" if own == "cuda" else "cpu"
    if device not in ("cuda", "cpu"):
        raise UsageError(f"device must be 'cuda' or 'cpu': whose autocast lists decide, not {device!r}")
    return device
