"""FSDP2: each process holds a part of every parameter, and units gather their own when they run.

A unit is a block: a child of a ModuleList or Sequential; what is left belongs to the root. fully_shard's
MixedPrecisionPolicy says per unit in which dtype parameters are gathered and gradients reduced. A plan maps to it where
that means the same: a unit under policy "cast" in one format, or one under "autocast" whose parameters are all those of
matrix products, which autocast would cast anyway. Everything else (operations that autocast's lists tell apart inside a
unit, 8-bit formats, units of several precisions, parameters stored low) stays with the plan's own hooks, and the notes
say so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..applying.dtypes import MATMULS, dtype_of, kind_of
from ..applying.spec import MARK
from ..errors import TaskError
from .engine import Processes, Strategy

_FSDP = "torch.distributed.fsdp"
_TABLES = (
    "_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)  # fmt: skip

if TYPE_CHECKING:
    from ..plans import LayerPrecision
    from .precision import Precision


class Shards(Processes):
    """fully_shard per unit over all processes. Checkpoints are whole, as those of one process; so is the model in the
    end."""

    def __init__(self, device: torch.device, strategy: Strategy) -> None:
        super().__init__(device, strategy)
        self._handles: list[Any] = []
        self._model: nn.Module | None = None
        self._classes: dict[nn.Module, type] = {}
        self._stored: dict[tuple[nn.Module, str], torch.dtype] = {}
        self._unit_of: dict[nn.Module, nn.Module] = {}

    def wrap(self, model: nn.Module, precision: Precision, *, fixed: bool = True) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self._note_batchnorm(model)
        self._same_everywhere(model)
        self._model, self._classes = model, {m: type(m) for m in model.modules()}
        self._stored = _take_storage(model)
        mesh = init_device_mesh(self.device.type, (self.world,))
        group_of = groups(model)
        layers = _layers(model, precision) if fixed else {}
        if precision.plan is not None and not fixed:
            self.notes.append("FSDP2 leaves the plan, which may change or be lifted for a step, to the plan's hooks")
        mapped, kept = [], defaultdict(list)
        for unit, members in reversed(group_of.items()):  # inner ones first
            policy, why = policy_of(members, layers)
            name = layers_name(model, unit)
            if why:
                kept[why].append(name)
            elif policy.param_dtype is not None:
                mapped.append(name)
            fully_shard(unit, mesh=mesh, mp_policy=policy)
        self._unit_of = {m: unit for unit, members in group_of.items() for m in members}
        self.replanned(model)
        self.notes += _in_words(mapped, kept, len(group_of))
        if any(buffer.is_floating_point() for buffer in model.buffers()):
            self._handles.append(model.register_forward_pre_hook(self._buffers_of_the_first))
        return model

    def replanned(self, model: nn.Module) -> None:
        _keep_regions_inside(self._unit_of)

    def check(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        own = {id(p) for p in model.parameters()}
        held = [p for group in optimizer.param_groups for p in group["params"]]
        if not any(id(p) in own for p in held):
            raise TaskError(
                "the task's optimizer holds the parameters as they were before FSDP2 sharded them: give the task a "
                "function that makes it, Task(optimizer=lambda params: torch.optim.AdamW(params))"
            )

    @contextmanager
    def accumulating(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        root: Any = getattr(model, "_orig_mod", model)
        root.set_requires_gradient_sync(last)
        yield

    def total_norm(self, grads: list[Tensor]) -> Tensor:
        """Shards add up their squares over the processes (in fp64, so that their split does not show); gradients that
        every process holds whole count once."""
        squares = torch.zeros(2, dtype=torch.float64, device=self.device)
        for grad in grads:
            own = getattr(grad, "_local_tensor", None)
            squares[0 if own is not None else 1] += torch.linalg.vector_norm(
                grad if own is None else own, dtype=torch.float64
            ).square()
        sharded = squares[0].clone()
        dist.all_reduce(sharded)
        return (sharded + squares[1]).sqrt().float()

    def model_state(self, model: nn.Module) -> dict[str, Any]:
        return self._whole(model.state_dict())

    def optimizer_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return self._whole(optimizer.state_dict())

    def load_state(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, model_state: Any, optimizer_state: Any
    ) -> None:
        own = model.state_dict()
        model.load_state_dict({name: _as(value, own.get(name)) for name, value in model_state.items()})
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state = {
            index: {key: _as(value, parameters[index]) for key, value in entries.items()}
            for index, entries in optimizer_state["state"].items()
        }
        optimizer.load_state_dict({**optimizer_state, "state": state})

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: Any) -> None:
        if value is None and self._model is not None:
            self._put_together(self._model)
        super().__exit__(kind, value, trace)

    def _put_together(self, model: nn.Module) -> None:
        """Leave a whole model of its own classes on every process, as "ddp" does. What FSDP2 hung on it is taken off:
        it has no way of its own to do so."""
        for module in model.modules():
            if hasattr(module, "reshard"):
                module.reshard()  # what the last pass left gathered
        whole: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and hasattr(parameter, "full_tensor"):
                    if id(parameter) not in whole:
                        values = parameter.detach().full_tensor()
                        values = values.to(self._stored.get((module, name), values.dtype))
                        whole[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
                    module._parameters[name] = whole[id(parameter)]
        for module, own in self._classes.items():
            module.__class__ = own
            for table in _TABLES:
                hooks = getattr(module, table, {})
                for key in [k for k, hook in hooks.items() if getattr(hook, "__module__", "").startswith(_FSDP)]:
                    del hooks[key]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        super().close()

    def _whole(self, state: Any) -> Any:
        """Nested containers with shards gathered, on the host; all processes must call it."""
        if isinstance(state, dict):
            return {key: self._whole(value) for key, value in state.items()}
        if isinstance(state, list | tuple):
            return type(state)(self._whole(value) for value in state)
        if not hasattr(state, "full_tensor"):
            return state
        whole = state.detach().full_tensor()
        return whole.cpu() if self.main else torch.empty(0)

    def _same_everywhere(self, model: nn.Module) -> None:
        """Start from the first process's values, as DDP does."""
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.data, src=0)

    @torch.no_grad()
    def _buffers_of_the_first(self, model: nn.Module, args: Any) -> None:
        """As DDP does: running statistics would drift apart."""
        for buffer in model.buffers():
            if buffer.is_floating_point():
                dist.broadcast(buffer, src=0)


def _as(value: Any, like: Any) -> Any:
    """`value`, whole, sharded as `like` is where shapes agree. Each process cuts out its own part."""
    if not isinstance(value, Tensor) or not hasattr(like, "placements") or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    local = value.to(like.device, copy=True)
    return distribute_tensor(local, like.device_mesh, like.placements, src_data_rank=None)


def groups(model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """Unit -> its modules (those of units inside it left out), the root first. A module whose parameters are stored in
    another dtype than the rest of its unit is one of its own: a unit has one dtype."""
    units = [model, *(child for child in _blocks(model) if _owns_alone(child, model))]
    inside = {m: unit for unit in units for m in unit.modules()}  # later units are further in
    found: dict[nn.Module, list[nn.Module]] = {unit: [] for unit in units}
    for module, unit in inside.items():
        found[unit].append(module)
    for unit, members in list(found.items()):
        dtypes = [p.dtype for m in members for p in m.parameters(recurse=False)]
        usual = max(set(dtypes), key=dtypes.count) if dtypes else None
        for module in [m for m in members if m is not unit]:
            if any(p.dtype is not usual for p in module.parameters(recurse=False)) and _owns_alone(module, model):
                members.remove(module)
                found[module] = [module]
    return found


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Children of lists and sequences that own parameters, outermost ones only, each once."""
    seen: set[nn.Module] = set()
    for module in model.modules():
        if module in seen or not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        for child in module.children():
            if child not in seen and not isinstance(child, nn.ModuleList | nn.ModuleDict):
                seen.update(child.modules())
                if next(child.parameters(), None) is not None:
                    yield child


def _owns_alone(unit: nn.Module, model: nn.Module) -> bool:
    """Whether no module outside holds one of its parameters: tied ones must be in one unit."""
    inside = set(unit.modules())
    own = {id(p) for p in unit.parameters()}
    outside = (p for m in model.modules() if m not in inside for p in m.parameters(recurse=False))
    return unit is not model and not any(id(p) in own for p in outside)


def policy_of(members: list[nn.Module], layers: dict[nn.Module, LayerPrecision]) -> tuple[Any, str]:
    """(MixedPrecisionPolicy of a unit, why its plan stays with the plan's hooks or "")."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    owners = [m for m in members if next(m.parameters(recurse=False), None) is not None and m in layers]
    kinds = {layers[m].precision for m in owners}
    if not kinds or {compute for compute, _, _ in kinds} <= {"fp32", "tf32"}:
        return MixedPrecisionPolicy(), ""
    if len(kinds) > 1:
        return MixedPrecisionPolicy(), "several precisions in one unit"
    layer = layers[owners[0]]
    if layer.params not in ("fp32", "tf32"):
        return MixedPrecisionPolicy(), f"parameters stored in {layer.params}, gradients reduced in it"
    if layer.compute in ("e4m3", "e5m2"):
        return MixedPrecisionPolicy(), f"{layer.compute} operands are cast by the plan"
    low = dtype_of(layer)
    if kind_of(layer) == "cast":
        return MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=True), ""
    if all(isinstance(m, MATMULS) for m in owners):
        return MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False), ""
    return MixedPrecisionPolicy(), "autocast tells the operations inside apart"


def layers_name(model: nn.Module, module: nn.Module) -> str:
    """The module's name, "(root)" for the model itself."""
    return next(name for name, m in model.named_modules() if m is module) or "(root)"


def _layers(model: nn.Module, precision: Precision) -> dict[nn.Module, LayerPrecision]:
    if precision.plan is None:
        return {}
    names = dict(model.named_modules())
    resolved = precision.plan.resolve(names)
    return {names[name]: layer for name, layer in resolved.items()}


def _keep_regions_inside(unit_of: dict[nn.Module, nn.Module]) -> None:
    """The outermost planned forward of a region casts what is stored otherwise, for itself and the modules under it.
    Those of another unit are not gathered yet when it begins: a region ends where a unit does."""
    regions: dict[tuple[nn.Module, int], int] = {}
    for module, unit in unit_of.items():
        spec = module.__dict__.get(MARK)
        if spec is not None:
            spec.swap = tuple(m for m in spec.swap if unit_of.get(m) is unit)
            spec.region = regions.setdefault((unit, spec.region), len(regions))


def _take_storage(model: nn.Module) -> dict[tuple[nn.Module, str], torch.dtype]:
    """(module, parameter) -> its dtype before the plan, for those that it stores otherwise. The plan forgets them: it
    would change the dtype of a distributed tensor, and not that of its shard, when it is taken off."""
    found = {}
    for module in model.modules():
        spec = module.__dict__.get(MARK)
        for table, name in list(spec.stored) if spec is not None else ():
            if table == "_parameters":
                before = spec.stored.pop((table, name))
                found[module, name] = before.dtype if isinstance(before, Tensor) else before
    return found


def _in_words(mapped: list[str], kept: dict[str, list[str]], units: int) -> list[str]:
    notes = []
    if mapped:
        notes.append(f"FSDP2 gathers {len(mapped)} of {units} units in their planned format: {_some(mapped)}")
    notes += [f"FSDP2 leaves the precision of {_some(names)} to the plan's hooks: {why}" for why, names in kept.items()]
    return notes


def _some(names: list[str]) -> str:
    names = names[::-1]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
