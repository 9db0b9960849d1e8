"""A planned model through torch.export: a graph of aten operations with the casts spelled out.

torch.export runs the planned forwards once (strict=False: plain Python), so that casts of inputs and weights are in the
graph as such, and each region under autocast becomes one higher-order operation, wrap_with_autocast. Taking that apart
leaves plain casts, which other programs understand and no device name is tied to; where the parts do not compute
what the whole does (PyTorch's fused LSTM), the region stays.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from ..applying import forward as planned_forward
from ..applying import inputs as planned_inputs
from ..applying.fp8 import round_scaled
from ..errors import ModelError, one_line
from ..plans import LayerPrecision, PrecisionPlan

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Around = Callable[[], contextlib.AbstractContextManager[Any]]
"""Makes a context to run something in."""


def traceable(plan: PrecisionPlan, model: nn.Module) -> PrecisionPlan:
    """The same arithmetic in a plan that torch.export sees rightly: its trace does not show that autocast changes the
    dtype of recurrent layers, so these are cast explicitly, as autocast would do it inside."""
    names = [n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.RNNBase)]
    changed = {}
    for name, layer in plan.resolve(names).items():
        if layer.policy == "autocast" and layer.compute not in ("fp32", "tf32"):
            compute = layer.compute if layer.compute in ("fp16", "bf16") else "bf16"
            changed[name] = LayerPrecision(compute, policy="cast", params=layer.params)
    return plan.replace(modules={**plan.modules, **changed}) if changed else plan


def trace(model: nn.Module, arguments: Arguments, *, dynamic_shapes: Any) -> ExportedProgram:
    """The planned `model` as a program of aten operations; autocast regions are whole. Raises ModelError."""
    args, kwargs = fresh(arguments)
    with _quiet(), _rounding_spelled_out():
        try:
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
        except Exception as error:  # torch raises many kinds for what it cannot trace
            raise ModelError(
                f"torch.export cannot trace this model on the example inputs ({one_line(error, limit=200)}): its "
                "forward must return tensors in plain containers and must not branch on values"
            ) from error


def with_casts(program: ExportedProgram) -> ExportedProgram | None:
    """`program` with its autocast regions taken apart into casts; None where torch cannot."""
    with _quiet():
        try:
            return program.run_decompositions({})
        except Exception:  # keep the regions
            return None


def run(program: ExportedProgram, arguments: Arguments, around: Around = contextlib.nullcontext) -> list[Tensor] | None:
    """The tensors that `program` returns; None where it cannot run (casts taken apart wrongly)."""
    args, kwargs = fresh(arguments)
    with torch.no_grad(), _quiet(), around():
        try:
            return tensors_of(program.module()(*args, **kwargs))
        except RuntimeError:
            return None


def planned_outputs(model: nn.Module, arguments: Arguments, around: Around = contextlib.nullcontext) -> list[Tensor]:
    """The tensors that the model returns as it is now."""
    args, kwargs = fresh(arguments)
    with torch.no_grad(), around():
        return tensors_of(model(*args, **kwargs))


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in an output, in torch.export's order."""
    return [t for t in tree_leaves(output) if isinstance(t, Tensor)]


def fresh(arguments: Arguments) -> Arguments:
    """The arguments with tensors of their own: a model may write to them."""
    return tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, arguments)


def same(ours: list[Tensor], theirs: list[Tensor] | None) -> bool:
    """Whether both are the same values in the same dtypes; NaN equals NaN."""
    if theirs is None or len(ours) != len(theirs):
        return False
    return all(
        a.dtype is b.dtype and a.shape == b.shape and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(0.0, torch.inf, -torch.inf), b.nan_to_num(0.0, torch.inf, -torch.inf))
        for a, b in zip(ours, theirs, strict=True)
    )  # fmt: skip


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """sqrt(sum (theirs - ours)^2 / sum ours^2) over all floating elements, in fp64; inf where one is not finite alone
    or the shapes differ."""
    error = signal = 0.0
    if [a.shape for a in ours] != [b.shape for b in theirs]:
        return float("inf")
    for a, b in zip(ours, theirs, strict=True):
        if not a.is_floating_point():
            continue
        x, y = a.double(), b.to(a.device).double()
        alike = (x == y) | (x.isnan() & y.isnan())
        error += float(torch.where(alike, 0.0, y - x).square().sum().nan_to_num(torch.inf))
        signal += float(torch.where(x.isfinite(), x, 0.0).square().sum())
    return (error / signal) ** 0.5 if signal else (0.0 if error == 0 else float("inf"))


def casts(program: ExportedProgram) -> dict[str, int]:
    """Conversions between floating dtypes in the graph, its autocast regions included, by the dtype they lead to."""
    found: Counter[str] = Counter()
    for graph in [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]:
        for node in graph.nodes:
            if node.op != "call_function":
                continue
            to = node.kwargs.get("dtype") or next((a for a in node.args[1:] if isinstance(a, torch.dtype)), None)
            source = node.args[0].meta.get("val") if node.args and isinstance(node.args[0], torch.fx.Node) else None
            if node.target in _CASTS and isinstance(source, Tensor) and source.dtype is not to and to in _FLOATS:
                found[str(to).removeprefix("torch.")] += 1
    return dict(found)


def regions(program: ExportedProgram) -> int:
    """Autocast regions that are whole in the graph."""
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    return sum("wrap_with_autocast" in str(node.target) for graph in graphs for node in graph.nodes)


_CASTS = (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype, torch.ops.aten.to.dtype_layout)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def weights(program: ExportedProgram) -> dict[str, int]:
    """Bytes of parameters, buffers and constants by dtype."""
    found: Counter[str] = Counter()
    seen: set[int] = set()
    for value in [*program.state_dict.values(), *program.constants.values()]:
        if isinstance(value, Tensor) and value.numel() and value.data_ptr() not in seen:
            seen.add(value.data_ptr())
            found[str(value.dtype).removeprefix("torch.")] += value.numel() * value.element_size()
    return dict(found)


def dynamic_first(model: nn.Module, arguments: Arguments) -> dict[str, Any]:
    """`dynamic_shapes` that leave the first dimension of every tensor argument open."""
    bound = inspect.signature(model.forward).bind(*arguments[0], **arguments[1]).arguments

    def shape(value: Any) -> Any:
        return {0: torch.export.Dim.DYNAMIC} if isinstance(value, Tensor) and value.ndim else None

    return {name: tree_map(shape, value) for name, value in bound.items()}


def is_arguments(value: Any) -> Arguments:
    """Example inputs as (args, kwargs): a tuple or list of arguments, a dict of keywords, or one tensor."""
    if isinstance(value, Tensor):
        return (value,), {}
    if isinstance(value, Mapping):
        return (), dict(value)
    if isinstance(value, tuple | list):
        return tuple(value), {}
    raise ModelError(
        f"example inputs are a tuple of arguments, a dict of keyword arguments or a tensor, not {type(value).__name__}"
    )


@contextlib.contextmanager
def _rounding_spelled_out() -> Iterator[None]:
    """Emulated 8-bit rounding as plain operations, in place of precscope's own, which no other program has."""
    places = [(planned_forward, "fake_quantise", round_scaled), (planned_inputs, "fake_quantise", round_scaled),
              (planned_forward, "quantise_gradient", lambda x: x)]  # fmt: skip
    own = [getattr(module, name) for module, name, _ in places]
    try:
        for module, name, plain in places:
            setattr(module, name, plain)
        yield
    finally:
        for (module, name, _), value in zip(places, own, strict=True):
            setattr(module, name, value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings about its own insides (deprecated pytree calls, flat LSTM weights)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
