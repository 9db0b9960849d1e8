"""A plan spread over the modules of a model: who runs in what, and which of them together."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from ..errors import PlanError
from ..plans import LayerPrecision, PrecisionPlan
from . import scaled
from .dtypes import BATCHNORM, dtype_of, is_matmul, kind_of, needs_swap
from .lookups import is_lookup
from .spec import MARK, Now, Spec

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Names that torch.compile, checkpoint_wrapper and FSDP put between a module and its parent."""


@dataclasses.dataclass(frozen=True)
class RegionRun:
    """How a region runs. module: its outermost name. modules: how many it has. how: "native" or
    "emulated", or "partly native" where some products are; note: what exactly, and why."""

    module: str
    precision: LayerPrecision
    modules: int
    how: str
    note: str = ""

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        return f"{self.precision}, {self.how}{note}, {self.modules} module{'s' if self.modules > 1 else ''}"


class Layout:
    """A plan spread over the modules of a model.

    names: module -> its names, parents before children. planned: modules that get a planned forward: those that have
    a forward of their own. precision: module -> LayerPrecision; key: what of it makes modules run alike. region: module
    -> number of its region. emulated: modules whose 8-bit products are -> why. lookups: embeddings that give low rows
    of tables that stay fp32.
    """

    def __init__(self, plan: PrecisionPlan, root: nn.Module) -> None:
        self.plan, self.root = plan, root
        self.names: dict[nn.Module, list[str]] = defaultdict(list)
        self.above: dict[nn.Module, list[nn.Module | None]] = defaultdict(list)
        self.planned: set[nn.Module] = set()
        self.notes: list[str] = []
        self._walk(root, "", None)
        every = [name for names in self.names.values() for name in names]
        plan.check(every)
        sources = plan.sources(every)
        self.precision = {m: self._agreed(names, sources) for m, names in self.names.items()}
        self.key = {m: layer.precision for m, layer in self.precision.items()}
        self.lookups = {m for m in self.names if self._is_lookup(m)}
        self.has_tf32 = any(layer.compute == "tf32" for layer in self.precision.values())
        self.emulated: dict[nn.Module, str] = {}
        self.region: dict[nn.Module, int] = {}
        self._numbers = itertools.count()
        for module in self.names:
            self._region_of(module)

    def _walk(self, module: nn.Module, name: str, above: nn.Module | None) -> None:
        """above: the nearest module around this one that has a forward, through which it is normally called."""
        if MARK in module.__dict__:
            raise PlanError(f"a plan is applied to {name or 'this model'} already; remove it first (handle.remove())")
        if name not in self.names[module]:
            self.names[module].append(name)
        self.above[module].append(above)
        wrapper = any(child in _WRAPPERS for child in module._modules)
        own = "forward" in module.__dict__ or type(module).forward is not nn.Module.forward
        if own and not wrapper and not isinstance(module, torch.jit.ScriptModule):
            self.planned.add(module)
            above = module
        for key, child in module._modules.items():
            if child is not None:
                self._walk(child, name if key in _WRAPPERS else f"{name}.{key}".lstrip("."), above)

    def _agreed(self, names: list[str], sources: dict[str, str | None]) -> LayerPrecision:
        """The precision of a module with these names. An entry under its own name counts more than a parent's or a
        pattern's, and any entry more than the default: plans name a shared module once."""
        own = [n for n in names if sources[n] == n]
        deciding = own or [n for n in names if sources[n] is not None] or names
        first = self.plan[deciding[0]]
        for other in deciding[1:]:
            if self.plan[other].precision != first.precision:
                raise PlanError(
                    f"{deciding[0]!r} ({first}) and {other!r} ({self.plan[other]}) are one shared module: "
                    "give both names the same precision"
                )
        return first

    def _region_of(self, module: nn.Module) -> int:
        """The region of the modules around it where they are all in one and of its precision, else a new one."""
        if module not in self.region:
            around = self.above[module]
            same = all(a is not None and self.key[a] == self.key[module] for a in around)
            regions = {self._region_of(a) for a in around if a is not None and same}
            number = regions.pop() if len(regions) == 1 else next(self._numbers)
            self.region[module] = number
        return self.region[module]

    def spec(self, module: nn.Module, now: Now) -> Spec:
        layer = self.precision[module]
        kind, dtype = kind_of(layer), dtype_of(layer)
        fp8 = layer.compute if layer.compute in ("e4m3", "e5m2") and is_matmul(module) else None
        native = ""
        if fp8 is not None:
            if why := scaled.missing_for(module, fp8):
                self.emulated[module] = why
            else:
                native = module._parameters["weight"].device.type
        return Spec(
            kind=kind,
            dtype=dtype,
            fp8=fp8,
            native=native,
            tf32=layer.compute == "tf32" if self.has_tf32 and kind == "fp32" else None,
            region=self.region[module],
            now=now,
            target=dtype if kind == "cast" else torch.float32,
            lookup=module in self.lookups,
            weight=isinstance(module, ParametrizationList),
            attention=kind == "cast" and layer.params == "fp32" and dtype is torch.bfloat16,
        )

    def _is_lookup(self, module: nn.Module) -> bool:
        """Whether the rows that it looks up are cast, and its fp32 table is not."""
        layer = self.precision[module]
        if kind_of(layer) != "cast" or layer.params != "fp32" or not isinstance(module, nn.Embedding):
            return False
        own = self.names[module]
        above = {name[:i] for name in own for i, letter in enumerate(name) if letter == "."} | {""}
        return is_lookup(module, [m for m, names in self.names.items() if m is not module and above & set(names)])

    def find_unlike(self) -> None:
        """Once storage is as planned: which modules hold tensors that are not stored as their forward needs them."""
        self.unlike = {m for m, p in self.precision.items() if needs_swap(m, p) and m not in self.lookups}

    def swap(self, module: nn.Module) -> tuple[nn.Module, ...]:
        """The unlike modules of its precision in and under `module`."""
        if not self.unlike:
            return ()
        return tuple(m for m in module.modules() if self.key[m] == self.key[module] and m in self.unlike)

    def runs(self) -> list[RegionRun]:
        members: dict[int, list[nn.Module]] = defaultdict(list)
        for module in self.names:
            if module in self.planned or module is self.root:
                members[self.region[module]].append(module)
        return [self._run(modules) for modules in members.values()]

    def _run(self, modules: list[nn.Module]) -> RegionRun:
        layer = self.precision[modules[0]]
        how, note = "native", ""
        if layer.compute in ("e4m3", "e5m2"):
            how, note = self._products(layer.compute, [m for m in modules if is_matmul(m)])
        elif layer.compute == "tf32":
            note = "on CUDA, forward only: the backward has the process-wide switch; fp32 elsewhere"
        elif kind_of(layer) == "cast" and any(isinstance(m, BATCHNORM) and not needs_swap(m, layer) for m in modules):
            note = "batch norms keep fp32 statistics" if layer.params == "fp32" else ""
        return RegionRun(self.names[modules[0]][0], layer, len(modules), how, note)

    def _products(self, compute: str, modules: list[nn.Module]) -> tuple[str, str]:
        """How these modules multiply in 8 bits, and why not natively."""
        why: dict[str, list[str]] = defaultdict(list)
        for module in modules:
            if module in self.emulated:
                why[self.emulated[module]].append(self.names[module][0] or "the model itself")
        absent = sum(map(len, why.values()))
        parts = [f"{len(modules) - absent} linear modules multiply {compute} natively (torch._scaled_mm)"]
        if absent or not modules:
            rounded = f"operands of {absent} linear or convolution modules rounded to {compute}, the rest in bf16"
            reasons = "; ".join(w if len(why) == 1 else f"{_some(names)}: {w}" for w, names in why.items())
            parts = [*(parts if absent < len(modules) else []), rounded + (f": {reasons}" if reasons else "")]
        how = "emulated" if absent == len(modules) else "partly native" if absent else "native"
        return how, "; ".join(parts)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
