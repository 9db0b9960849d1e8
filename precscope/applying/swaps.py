"""Cast tensors in place of the stored ones while a forward runs, and what it wrote to them brought back."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .dtypes import BATCHNORM, differs
from .spec import Spec


class Swap(NamedTuple):
    """`seen` stands for `stored` in table[name] for a while. version: of `seen` at first, None where writes leave no
    count. merge: writes to it are brought back."""

    table: dict[str, Any]  # a module's _parameters or _buffers
    name: str
    stored: Tensor
    seen: Tensor
    version: int | None
    merge: bool = True


def strayed(module: nn.Module, spec: Spec) -> bool:
    """Whether its parameters are no longer stored as they were when the plan was applied: some models convert a module
    in their forward (mixtures of experts keep routers in fp32 so)."""
    if spec.kind != "cast" or spec.lookup or isinstance(module, BATCHNORM) or torch.compiler.is_compiling():
        return False
    for tensor in module._parameters.values():
        if tensor is not None and differs(tensor, spec.target, doubles=True):
            return True
    return False


def swap_in(modules: tuple[nn.Module, ...], spec: Spec, swapped: list[Swap]) -> None:
    """Put casts in place of what is not stored in the target dtype; nothing to do where a module around has done it."""
    doubles = spec.kind == "cast"
    for module in modules:
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in list(table.items()):
                if tensor is not None and differs(tensor, spec.target, doubles=doubles):
                    seen = tensor.to(spec.target)
                    swapped.append(Swap(table, name, tensor, seen, _version(seen)))
                    table[name] = seen
        if isinstance(module, nn.RNNBase):
            refresh_flat_weights(module)


def _version(tensor: Tensor) -> int | None:
    """How often it was written to in place; None where that is not counted or cannot be looked at."""
    return None if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def swap_back(module: nn.Module, modules: tuple[nn.Module, ...], swapped: list[Swap]) -> None:
    """Put the stored tensors back, with what the forward wrote to its casts (running statistics, say)."""
    for swap in reversed(swapped):
        now = swap.table.get(swap.name)
        if now is swap.seen:
            swap.table[swap.name] = swap.stored
            if swap.merge and _was_written(swap, training=module.training):
                _merge(swap.stored, swap.seen)
        elif now is not None:  # assigned anew in the forward
            swap.table[swap.name] = now if isinstance(now, nn.Parameter) else now.to(swap.stored.dtype)
    for owner in modules:
        if isinstance(owner, nn.RNNBase):
            refresh_flat_weights(owner)


def _was_written(swap: Swap, *, training: bool) -> bool:
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


def refresh_flat_weights(module: nn.RNNBase) -> None:
    """Recurrent modules keep a second list of their weights, and weak references to see that it is up to date."""
    weights = [getattr(module, name, None) for name in module._flat_weights_names]
    module._flat_weights = weights
    if hasattr(module, "_flat_weight_refs"):
        module._flat_weight_refs = [None if w is None else weakref.ref(w) for w in weights]
