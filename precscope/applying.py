"""Put a precision plan on a model, and take it off again.

    with ps.apply(plan, model):              # or: handle = ps.apply(plan, model); ...; handle.remove()
        loss(model(x)).backward()

How. Every module that has a forward gets an instance attribute `forward`, bound to the module (so that deepcopy binds
the copy's to the copy). Classes, parameters and state_dict keys stay. Modules of equal precision that lie within each
other form a *region*; the outermost one that is called sets the autocast state, those inside leave it alone. So a
module's own `with torch.autocast(enabled=False)` keeps its meaning, and a module called past its parent's forward still
runs as planned. Outputs stay in the format they have: whoever takes them casts on entry, so that neighbours of equal
precision exchange tensors without a cast.

    compute        within the region
    fp32, tf32     autocast off; low inputs cast up to fp32 (fp64 stays); tf32 sets the CUDA switch for the forward
    autocast       torch.autocast of the dtype; 16-bit inputs of another dtype cast up to fp32
    cast           autocast off; floating inputs, parameters and buffers in the dtype, without a copy where stored in it
    e4m3, e5m2     bf16, with the operands and output gradients of linear and convolution modules rounded: emulated

Parameters are *stored* as the plan says: converted in place (`p.data`), the unrounded values kept aside. Where storage
and compute differ, the forward sees cast tensors in place of the stored ones; autograd leads gradients back to those.
BatchNorm in fp32 storage stays fp32 inside low regions: its kernels take low inputs, and running statistics need it.

Two threads must not run the forward of one planned model at once.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
import types
import weakref
from collections import UserDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import ModelError, PlanError
from .fp8 import fake_quantise, quantise_gradient
from .plans import LayerPrecision, PrecisionPlan, casts

__all__ = ["PlanHandle", "apply", "casts", "remove"]

_MARK = "_precscope_plan"
_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CONVERTED = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes whose storage a plan decides; fp64, 8-bit, integer and complex tensors stay as they are."""
_MATMULS = (nn.Linear, nn.modules.conv._ConvNd)
_BATCHNORM = nn.modules.batchnorm._BatchNorm
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Names that torch.compile, checkpoint_wrapper and FSDP put between a module and its parent."""
_TABLES = ("_parameters", "_buffers")


class _Now:
    """Which region is running; one per applied plan."""

    def __init__(self) -> None:
        self.region = -1


@dataclasses.dataclass(eq=False)
class _Spec:
    """What the planned forward of one module does.

    kind: "fp32", "autocast" or "cast". dtype: that of the compute. fp8: format of the operands of this matmul module,
    else None. tf32: how the CUDA switch must stand, None where it is left alone. region: a number. target: the dtype
    in which the forward sees the tensors of the modules in `swap`, which are stored in another. previous: the
    instance's own forward before, if it had one. stored: (table, name) -> the tensor before its storage was converted.
    """

    kind: str
    dtype: torch.dtype
    fp8: str | None
    tf32: bool | None
    region: int
    now: _Now
    target: torch.dtype
    swap: tuple[nn.Module, ...] = ()
    previous: Callable[..., Any] | None = None
    stored: dict[tuple[str, str], Tensor] = dataclasses.field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Spec:
        return _Spec(**{f.name: copy.deepcopy(getattr(self, f.name), memo) for f in dataclasses.fields(self)})

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise PlanError(
            "a model with a plan on it cannot be pickled: save model.state_dict() and plan.save(), "
            "or remove the plan first"
        )


@dataclasses.dataclass(frozen=True)
class RegionRun:
    """How a region runs. module: its outermost name. modules: how many it has. how: "native" or "emulated"."""

    module: str
    precision: LayerPrecision
    modules: int
    how: str
    note: str = ""

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        return f"{self.precision}, {self.how}{note}, {self.modules} module{'s' if self.modules > 1 else ''}"


class PlanHandle:
    """A plan on a model. Ends with `remove()` or with its `with` block. runs: a RegionRun for each region."""

    def __init__(self, plan: PrecisionPlan, model: nn.Module, runs: list[RegionRun], notes: list[str]) -> None:
        self.plan, self.model, self.runs, self.notes = plan, model, tuple(runs), tuple(notes)

    def remove(self) -> None:
        """Restore the model exactly; parameters that training changed in low storage are cast up. Again: nothing."""
        remove(self.model)

    def autocast(self, device_type: str = "cpu") -> AbstractContextManager[Any]:
        """For code outside the model, mostly the loss: torch.autocast where the plan's default computes in 16 bits or
        less, so that losses see the same as under plain autocast; else a context that does nothing."""
        dtype = _dtype(self.plan.default)
        return nullcontext() if dtype is torch.float32 else torch.autocast(device_type, dtype=dtype)

    def describe(self) -> str:
        """What runs natively and what is emulated, a line per region; then where storage differs from the plan."""
        width = max(len(r.module or "(root)") for r in self.runs)
        lines = [f"{r.module or '(root)':<{width}}  {r}" for r in self.runs]
        return "\n".join([*lines, *self.notes])

    def __enter__(self) -> PlanHandle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def apply(plan: PrecisionPlan, model: nn.Module) -> PlanHandle:
    """Make `model` run as `plan` says until the handle is removed.

    Build the optimizer afterwards where the plan stores parameters below fp32: its state takes their dtype. A model
    under torch.compile or DDP may be given as it is. Raises PlanError where the plan does not fit the model, where a
    shared module would need two precisions, or where a plan is applied already; ModelError for what is no model.
    """
    if not isinstance(plan, PrecisionPlan):
        raise PlanError(f"apply takes a PrecisionPlan, not {type(plan).__name__}; PrecisionPlan.load(path) reads one")
    root = _unwrap(model)
    layout = _Layout(plan, root)
    storage = _storage_changes(layout)
    if storage and isinstance(model, nn.parallel.DistributedDataParallel):
        raise PlanError(
            "the plan changes how parameters are stored, and DDP has laid out its buckets already: "
            "apply the plan first, then wrap the model in DDP"
        )
    now = _Now()
    try:
        for module in layout.names:
            module.__dict__[_MARK] = layout.spec(module, now)
        for owners, dtype in storage:
            _convert(owners, dtype)
        layout.find_unlike()
        for module in layout.names:
            module.__dict__[_MARK].swap = layout.swap(module)
            if module in layout.planned:
                _install(module)
    except BaseException:
        remove(root)
        raise
    return PlanHandle(plan, root, layout.runs(), layout.notes)


def remove(model: nn.Module) -> None:
    """Take the plan off `model`, which may be a deepcopy of a planned model; where there is none, nothing happens."""
    for module in _unwrap(model).modules():
        spec = module.__dict__.pop(_MARK, None)
        if spec is None:
            continue
        if hasattr(module.__dict__.get("forward"), _MARK):
            del module.__dict__["forward"]
            if spec.previous is not None:
                module.__dict__["forward"] = spec.previous
        for (table, name), original in spec.stored.items():
            _restore(getattr(module, table).get(name), original)


def _unwrap(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ModelError(f"a plan is applied to a torch.nn.Module, not to {type(model).__name__}")
    if isinstance(model, nn.DataParallel):
        raise ModelError("nn.DataParallel copies its modules at every step and would lose the plan; use DDP instead")
    while "_orig_mod" in model._modules or isinstance(model, nn.parallel.DistributedDataParallel):
        inner = model._modules["_orig_mod" if "_orig_mod" in model._modules else "module"]
        assert inner is not None
        model = inner
    return model


# Who runs in what


def _dtype(layer: LayerPrecision) -> torch.dtype:
    """Dtype of the arithmetic; 8-bit formats are emulated on bf16."""
    return _DTYPES.get(layer.compute, torch.bfloat16)


def _kind(layer: LayerPrecision) -> str:
    return "fp32" if layer.compute in ("fp32", "tf32") else layer.policy


class _Layout:
    """A plan spread over the modules of a model.

    names: module -> its names, parents before children. planned: modules that get a planned forward: those that have
    a forward of their own. precision: module -> LayerPrecision; key: what of it makes modules run alike. region: module
    -> number of its region.
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
        self.has_tf32 = any(layer.compute == "tf32" for layer in self.precision.values())
        self.region: dict[nn.Module, int] = {}
        self._numbers = itertools.count()
        for module in self.names:
            self._region_of(module)

    def _walk(self, module: nn.Module, name: str, above: nn.Module | None) -> None:
        """above: the nearest module around this one that has a forward, through which it is normally called."""
        if _MARK in module.__dict__:
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

    def spec(self, module: nn.Module, now: _Now) -> _Spec:
        layer = self.precision[module]
        kind, dtype = _kind(layer), _dtype(layer)
        return _Spec(
            kind=kind,
            dtype=dtype,
            fp8=layer.compute if layer.compute in ("e4m3", "e5m2") and _is_matmul(module) else None,
            tf32=layer.compute == "tf32" if self.has_tf32 and kind == "fp32" else None,
            region=self.region[module],
            now=now,
            target=dtype if kind == "cast" else torch.float32,
        )

    def find_unlike(self) -> None:
        """Once storage is as planned: which modules hold tensors that are not stored as their forward needs them."""
        self.unlike = {m for m, layer in self.precision.items() if _needs_swap(m, layer)}

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
            rounded = sum(map(_is_matmul, modules))
            how = "emulated"
            note = f"operands of {rounded} linear or convolution modules rounded to {layer.compute}, the rest in bf16"
        elif layer.compute == "tf32":
            note = "on CUDA, forward only: the backward has the process-wide switch; fp32 elsewhere"
        elif _kind(layer) == "cast" and any(isinstance(m, _BATCHNORM) and not _needs_swap(m, layer) for m in modules):
            note = "batch norms keep fp32 statistics" if layer.params == "fp32" else ""
        return RegionRun(self.names[modules[0]][0], layer, len(modules), how, note)


def _is_matmul(module: nn.Module) -> bool:
    """Whether an 8-bit format applies to it: a linear or convolution module that holds its weight itself."""
    known = isinstance(module, _MATMULS) or type(module).__name__ == "Conv1D"  # Hugging Face's transposed linear
    return known and module._parameters.get("weight") is not None


def _needs_swap(module: nn.Module, layer: LayerPrecision) -> bool:
    if _kind(layer) == "autocast" and layer.params == "fp32":
        return False
    tensors = [t for table in _TABLES for t in getattr(module, table).values() if t is not None]
    tensors = [t for t in tensors if t.is_floating_point()]
    if _kind(layer) == "cast":
        if isinstance(module, _BATCHNORM) and all(t.dtype is torch.float32 for t in tensors):
            return False  # its kernels take low inputs with fp32 parameters and statistics
        return any(_differs(t, _dtype(layer), doubles=True) for t in tensors)
    if _kind(layer) == "autocast" and isinstance(module, _MATMULS) and layer.params == layer.compute:
        return False  # autocast would cast them to just that
    return any(_differs(t, torch.float32, doubles=False) for t in tensors)


def _differs(tensor: Tensor, target: torch.dtype, *, doubles: bool) -> bool:
    """Whether the forward must see a cast of this tensor. doubles: fp64 is cast too."""
    dtype = tensor.dtype
    return dtype is not target and (dtype in _CONVERTED or (doubles and dtype is torch.float64))


# Storage


def _storage_changes(layout: _Layout) -> list[tuple[list[tuple[nn.Module, str, str]], torch.dtype]]:
    """Tensors to be stored in another dtype: (owners, dtype) each, an owner being (module, table, name). Parameters
    go where the plan says; buffers only under policy "cast". Tied tensors take the widest that an owner asks for."""
    owners: dict[int, list[tuple[nn.Module, str, str]]] = defaultdict(list)
    asked: dict[int, set[str]] = defaultdict(set)
    tensors: dict[int, Tensor] = {}
    for module, layer in layout.precision.items():
        for table in _TABLES:
            for name, tensor in getattr(module, table).items():
                if tensor is None or nn.parameter.is_lazy(tensor) or tensor.dtype not in _CONVERTED:
                    _refuse_lazy(tensor, layout.names[module][0], name)
                    continue
                owners[id(tensor)].append((module, table, name))
                tensors[id(tensor)] = tensor
                if table == "_parameters" or _kind(layer) == "cast":
                    asked[id(tensor)].add(layer.params)
    changes = []
    for key, formats in asked.items():
        fmt = formats.pop() if len(formats) == 1 else "fp32"
        where = " and ".join(f"{layout.names[m][0]}.{name}".lstrip(".") for m, _, name in owners[key])
        if formats:
            layout.notes.append(f"{where} are one tensor for which the plan asks two formats: stored in fp32")
        if tensors[key].dtype is not _DTYPES[fmt]:
            if fmt == "fp32":
                layout.notes.append(f"{where} was stored in {tensors[key].dtype}: stored in fp32 while the plan is on")
            changes.append((owners[key], _DTYPES[fmt]))
    return changes


def _refuse_lazy(tensor: Tensor | None, module: str, name: str) -> None:
    if tensor is not None and nn.parameter.is_lazy(tensor):
        raise ModelError(f"{module}.{name} has no values yet (a lazy module): run one batch first, then apply the plan")


def _convert(owners: list[tuple[nn.Module, str, str]], dtype: torch.dtype) -> None:
    """Store one tensor in `dtype`, in place so that optimizers keep it, and keep the unrounded values aside."""
    module, table, name = owners[0]
    tensor = getattr(module, table)[name]
    original = tensor.data
    _set_data(tensor, original.to(dtype))
    for module, table, name in owners:
        getattr(module, _MARK).stored[table, name] = original


def _restore(tensor: Tensor | None, original: Tensor) -> None:
    """Undo `_convert`: elements that still are the rounding of the original become the original, others are cast."""
    if tensor is None or tensor.dtype is original.dtype:
        return
    now = tensor.data
    if now.shape == original.shape:
        original = original.to(now.device)
        changed = _bits(now) != _bits(original.to(now.dtype))
        if changed.any():
            original.copy_(torch.where(changed, now.to(original.dtype), original))
        now = original
    _set_data(tensor, now.to(original.dtype))


def _set_data(tensor: Tensor, data: Tensor) -> None:
    gradient = tensor.grad if tensor.is_leaf else None
    if gradient is not None:
        tensor.grad = None
    tensor.data = data
    if gradient is not None:
        tensor.grad = gradient.to(data.dtype)


def _bits(tensor: Tensor) -> Tensor:
    """The bit patterns: NaN equals itself, -0 differs from 0."""
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


# The planned forward


_functions: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""Forward of a class -> its planned forward."""


def _install(module: nn.Module) -> None:
    """Give `module` its planned forward, bound to it."""
    spec: _Spec = module.__dict__[_MARK]
    spec.previous = module.__dict__.get("forward")
    own = type(module).forward
    if spec.previous is not None:
        function = _planned_function(spec.previous, bound=True)
    elif (function := _functions.get(own)) is None:
        function = _functions[own] = _planned_function(own, bound=False)
    module.__dict__["forward"] = types.MethodType(function, module)


def _planned_function(own: Callable[..., Any], *, bound: bool) -> Any:
    """`_planned_forward` under the signature of `own`, which data collators and exporters read. All share one code
    object, so that torch.compile compiles it once for modules that run alike."""
    function: Any = types.FunctionType(_planned_forward.__code__, _planned_forward.__globals__, "forward")
    setattr(function, _MARK, True)
    function.__doc__ = own.__doc__
    try:
        signature = inspect.signature(own)
    except (TypeError, ValueError):
        return function  # a callable that does not tell its signature
    if bound:
        itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        signature = signature.replace(parameters=[itself, *signature.parameters.values()])
    function.__signature__ = signature
    return function


def _planned_forward(self, *args, **kwargs):
    """What runs instead of the module's forward. Written without anything torch.compile would have to break for."""
    spec, now = self._precscope_plan, self._precscope_plan.now
    around = now.region
    if around == spec.region:
        if spec.kind == "autocast" and spec.fp8 is None:
            return _own_forward(self, spec, args, kwargs)
        return _run(self, spec, args, kwargs)
    now.region = spec.region
    try:
        device = _device_type(self, args, kwargs)
        if spec.tf32 is not None and device == "cuda" and not torch.compiler.is_compiling():
            with _tf32(spec.tf32), torch.autocast(device, enabled=False):
                return _run(self, spec, args, kwargs)
        enabled = torch.is_autocast_enabled(device)
        if spec.kind == "autocast":
            if enabled and torch.get_autocast_dtype(device) == spec.dtype:
                return _run(self, spec, args, kwargs)
            with torch.autocast(device, dtype=spec.dtype):
                return _run(self, spec, args, kwargs)
        if enabled:
            with torch.autocast(device, enabled=False):
                return _run(self, spec, args, kwargs)
        return _run(self, spec, args, kwargs)
    finally:
        now.region = around


def _own_forward(module: nn.Module, spec: _Spec, args: tuple, kwargs: dict) -> Any:
    if spec.previous is not None:
        return spec.previous(*args, **kwargs)
    return type(module).forward(module, *args, **kwargs)


def _run(module: nn.Module, spec: _Spec, args: tuple, kwargs: dict) -> Any:
    """The module's forward on cast inputs, with cast tensors where storage and compute differ."""
    if kwargs or not _fit(args, spec.dtype):
        cast = partial(_cast_input, kind=spec.kind, dtype=spec.dtype)
        args, kwargs = _map(args, cast), _map(kwargs, cast)
    if not spec.swap and spec.fp8 is None:
        return _own_forward(module, spec, args, kwargs)
    swapped: list[_Swap] = []
    try:
        _swap_in(spec, swapped)
        if spec.fp8 is None:
            return _own_forward(module, spec, args, kwargs)
        parameters: dict[str, Any] = module._parameters
        weight = parameters["weight"]
        rounded = fake_quantise(weight, spec.fp8)
        swapped.append(_Swap(parameters, "weight", weight, rounded, None, merge=False))
        parameters["weight"] = rounded
        round_input = partial(_round_input, fmt=spec.fp8)
        args, kwargs = _map(args, round_input), _map(kwargs, round_input)
        return quantise_gradient(_own_forward(module, spec, args, kwargs))
    finally:
        _swap_back(module, spec, swapped)


class _Swap(NamedTuple):
    """`seen` stands for `stored` in table[name] for a while. version: of `seen` at first, None where writes leave no
    count. merge: writes to it are brought back."""

    table: dict[str, Any]  # a module's _parameters or _buffers
    name: str
    stored: Tensor
    seen: Tensor
    version: int | None
    merge: bool = True


def _swap_in(spec: _Spec, swapped: list[_Swap]) -> None:
    """Put casts in place of what is not stored in the target dtype; nothing to do where a module around has done it."""
    doubles = spec.kind == "cast"
    for module in spec.swap:
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in list(table.items()):
                if tensor is not None and _differs(tensor, spec.target, doubles=doubles):
                    seen = tensor.to(spec.target)
                    swapped.append(_Swap(table, name, tensor, seen, _version(seen)))
                    table[name] = seen
        if isinstance(module, nn.RNNBase):
            _refresh_flat_weights(module)


def _version(tensor: Tensor) -> int | None:
    """How often it was written to in place; None where that is not counted or cannot be looked at."""
    return None if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def _swap_back(module: nn.Module, spec: _Spec, swapped: list[_Swap]) -> None:
    """Put the stored tensors back, with what the forward wrote to its casts (running statistics, say)."""
    for swap in reversed(swapped):
        now = swap.table.get(swap.name)
        if now is swap.seen:
            swap.table[swap.name] = swap.stored
            if swap.merge and _was_written(swap, training=module.training):
                _merge(swap.stored, swap.seen)
        elif now is not None:  # assigned anew in the forward
            swap.table[swap.name] = now if isinstance(now, nn.Parameter) else now.to(swap.stored.dtype)
    for owner in spec.swap:
        if isinstance(owner, nn.RNNBase):
            _refresh_flat_weights(owner)


def _was_written(swap: _Swap, *, training: bool) -> bool:
    """Whether the forward wrote to what it saw. Writes through `.data` are not counted, so buffers are compared while
    training. A compiled graph cannot look: there buffers always count as written, parameters never."""
    if swap.version is not None and swap.seen._version > swap.version:
        return True
    if isinstance(swap.stored, nn.Parameter):
        return False
    if torch.compiler.is_compiling():
        return True
    compare = training or swap.version is None
    return compare and not torch.equal(swap.seen, swap.stored.to(swap.seen.dtype))


def _merge(stored: Tensor, seen: Tensor) -> None:
    """Bring writes to `seen` back to `stored`; elements that were not written keep their full precision."""
    with torch.no_grad():
        unchanged = seen == stored.to(seen.dtype)
        stored.copy_(torch.where(unchanged, stored, seen.to(stored.dtype)))


def _refresh_flat_weights(module: nn.RNNBase) -> None:
    """Recurrent modules keep a second list of their weights, and weak references to see that it is up to date."""
    weights = [getattr(module, name, None) for name in module._flat_weights_names]
    module._flat_weights = weights
    if hasattr(module, "_flat_weight_refs"):
        module._flat_weight_refs = [None if w is None else weakref.ref(w) for w in weights]


def _device_type(module: nn.Module, args: tuple, kwargs: dict) -> str:
    """Device of the first tensor argument that is not on the CPU, else of the first parameter, else "cpu"."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.device.type not in ("cpu", "meta"):
            return value.device.type
    for parameter in module.parameters():
        return "cpu" if parameter.device.type == "meta" else parameter.device.type
    return "cpu"


@contextmanager
def _tf32(on: bool) -> Iterator[None]:
    """The process-wide CUDA switches for TF32 matrix products, convolutions and recurrences, for a while."""
    cudnn: Any = torch.backends.cudnn
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
    before = [s.fp32_precision for s in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "tf32" if on else "ieee"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


# Inputs


def _cast_input(tensor: Tensor, *, kind: str, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point() or tensor.dtype is dtype:
        return tensor
    if kind == "cast":
        return tensor.to(dtype)
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _round_input(tensor: Tensor, *, fmt: str) -> Tensor:
    return fake_quantise(tensor, fmt) if tensor.is_floating_point() else tensor


def _fit(args: tuple, dtype: torch.dtype) -> bool:
    """Whether all are tensors of the dtype already: the common case, worth a short cut."""
    for value in args:  # noqa: SIM110 (torch.compile and speed: no generator)
        if not isinstance(value, Tensor) or value.dtype is not dtype:
            return False
    return True


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `change` made to every tensor in it: nested tuples, lists, dicts, namedtuples and dataclasses.
    What holds no tensor that changes is passed on as the same object, so that caches stay shared."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (dict, UserDict)):
        changed = _changes(dict(value), change)
        return _with_items(value, changed) if changed else value
    if isinstance(value, (list, tuple)):
        items = [_map(v, change) for v in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        if isinstance(value, list):
            return items if type(value) is list else _with_items(value, dict(enumerate(items)))
        return type(value)._make(items) if hasattr(value, "_make") else type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = _changes({f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)}, change)
        return _with_fields(value, changed) if changed else value
    return value


def _changes(items: dict[Any, Any], change: Callable[[Tensor], Tensor]) -> dict[Any, Any]:
    """The items that change, as they become."""
    mapped = {key: _map(item, change) for key, item in items.items()}
    return {key: item for key, item in mapped.items() if item is not items[key]}


def _with_items(value: Any, changed: dict[Any, Any]) -> Any:
    if type(value) is dict:
        return {**value, **changed}
    value = copy.copy(value)
    for key, item in changed.items():
        value[key] = item
    return value


def _with_fields(value: Any, changed: dict[str, Any]) -> Any:
    """A copy with other fields. Not dataclasses.replace, which calls the constructor and its checks again."""
    value = copy.copy(value)
    for key, item in changed.items():
        object.__setattr__(value, key, item)
    return value
