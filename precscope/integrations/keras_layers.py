"""The layers of a Keras model: their names, the variables they own, what they cost.

Keras layers are torch modules, and their hooks fire; but Sequential and Functional models keep their layers where
torch's named_modules() does not look, and all variables of a model hang below its root. So layers are found as Keras
has them (`model.layers`, and the sublayers of a layer), and named by the way that leads there, joined by dots:
"encoder.mha.query", "" for the model itself. Names do not hold the model's own, so that two models that are built alike
have equal names; the path that Keras gives a layer ("net/encoder/mha/query"), by which a DTypePolicyMap knows it, is
kept beside. Some layers have no path: those without a build of their own (Dropout, Activation, pooling).

Written for Keras 3.15. Sublayers of plain layers are read from `layer._layers`, which has no public name.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..sites import Role, Site


@dataclass(frozen=True)
class KerasLayers:
    """What was found in a model.

    names: layer (or torch module inside a TorchModuleWrapper) -> name, the root first, a shared layer under its first
    name. paths: name -> Keras path, None for layers that have none. skipped: layers that only hold others (a Sequential
    inside the model) or only stand for an input; they are in `paths` but are not watched. cells: LSTM or GRU layer ->
    its cell, which such a layer need not call: torch has all time steps in one operation. So the cell's variables are
    the layer's, too.
    """

    names: dict[nn.Module, str] = field(default_factory=dict)
    paths: dict[str, str | None] = field(default_factory=dict)
    skipped: dict[nn.Module, str] = field(default_factory=dict)
    cells: dict[nn.Module, nn.Module] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any) -> KerasLayers:
        """The layers of `model`, a keras.Model or any Layer, as it is built now."""
        found = cls()
        taken: Counter[str] = Counter()
        for layer, name in _walk(model, "", set()):
            taken[name] += 1
            if taken[name] > 1:  # "a.b" may be one layer's own name, or b inside a
                name = f"{name}_{taken[name]}"
            (found.skipped if name and _holds_only(layer) else found.names)[layer] = name
            found.paths[name] = getattr(layer, "path", None)
            if type(layer).__name__ in ("LSTM", "GRU"):
                found.cells[layer] = layer.cell  # type: ignore[assignment]
        return found

    def variables(self) -> Iterator[tuple[str, str, Any, bool]]:
        """(layer's name, name within the layer, tensor, whether it is kept by training and not learnt, such as a
        moving average) of every floating variable, at the layers that made them."""
        for layer, name in self.names.items():
            taken: Counter[str] = Counter()
            for local, tensor, kept in _own(layer):
                taken[local] += 1
                if tensor.is_floating_point():
                    yield name, local if taken[local] == 1 else f"{local}_{taken[local]}", tensor, kept

    def owners(self) -> dict[torch.Tensor, list[Site]]:
        """Tensor -> the weight sites of every layer that owns it."""
        owners: dict[torch.Tensor, list[Site]] = {}
        for name, local, tensor, _ in self.variables():
            owners.setdefault(tensor, []).append(Site(name, Role.WEIGHT, 0, local))
        for layer, cell in self.cells.items():
            for local, tensor, _ in _own(cell):
                if tensor in owners:
                    owners[tensor].append(Site(self.names[layer], Role.WEIGHT, 0, f"{cell.name}.{local}"))
        return owners

    def buffers(self) -> set[tuple[str, str]]:
        """(layer's name, name within the layer) of moving averages and the like."""
        return {(name, local) for name, local, _, kept in self.variables() if kept}


def _walk(layer: Any, name: str, seen: set[int]) -> Iterator[tuple[nn.Module, str]]:
    if id(layer) in seen:
        return
    seen.add(id(layer))
    yield layer, name
    children = getattr(layer, "layers", None)  # of models; a plain layer may use the name for something else
    if not (isinstance(children, list) and all(hasattr(child, "dtype_policy") for child in children)):
        children = getattr(layer, "_layers", None) or []
    for child in children:
        yield from _walk(child, _below(name, child.name), seen)
    for local, module in _torch_modules(layer):
        if id(module) not in seen:
            seen.add(id(module))
            yield module, _below(name, local)


def _torch_modules(layer: Any) -> Iterable[tuple[str, nn.Module]]:
    """The torch modules inside a TorchModuleWrapper, which stands for the outermost of them itself."""
    inner = getattr(layer, "module", None)
    if type(layer).__name__ != "TorchModuleWrapper" or not isinstance(inner, nn.Module):
        return []
    return [(local, module) for local, module in inner.named_modules() if local]


def _own(layer: Any) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """(name, tensor, whether it is no parameter) of what `layer` itself made."""
    inner = getattr(layer, "module", None) if type(layer).__name__ == "TorchModuleWrapper" else None
    if inner is None and hasattr(layer, "dtype_policy"):
        for variables, kept in ((layer._trainable_variables, False), (layer._non_trainable_variables, True)):
            yield from ((v.name, v.value, kept) for v in variables)
        return
    module = layer if inner is None else inner
    yield from ((local, tensor, False) for local, tensor in module.named_parameters(recurse=False))
    yield from ((local, tensor, True) for local, tensor in module.named_buffers(recurse=False))


def _holds_only(layer: Any) -> bool:
    return type(layer).__name__ in ("InputLayer", "Sequential") and not any(True for _ in _own(layer))


def _below(name: str, local: str) -> str:
    return f"{name}.{local}" if name else local


def estimated_flops(layer: Any, output: torch.Tensor) -> int:
    """2 per multiply-add of the layer's own matrices at every position of its output; estimated from shapes.

    Einsum layers by their equation; others by the number of output positions (all axes but the channels) times the
    size of the kernel, which holds for dense, convolution, depthwise and recurrent kernels, not for transposed ones
    with strides. A look-up table multiplies nothing.
    """
    if "Embedding" in type(layer).__name__:
        return 0
    matrices = [tensor for _, tensor, kept in _own(layer) if not kept and tensor.dim() >= 2]
    if not matrices or output.dim() == 0:
        return 0
    equation = getattr(layer, "equation", None)
    if isinstance(equation, str) and "->" in equation and len(matrices) == 1:
        operands, result = equation.replace(" ", "").split("->")
        kernel = operands.split(",")[1]
        contracted = [n for label, n in zip(kernel, matrices[0].shape, strict=False) if label not in result]
        return 2 * output.numel() * math.prod(contracted)
    first = getattr(layer, "data_format", None) == "channels_first" and output.dim() > 2
    positions = output.numel() // max(output.shape[1 if first else -1], 1)
    return 2 * positions * sum(m.numel() for m in matrices)
