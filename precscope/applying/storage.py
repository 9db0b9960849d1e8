"""Parameters and buffers stored as the plan says, and as they were again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .dtypes import CONVERTED, DTYPES, TABLES, kind_of
from .layout import Layout
from .spec import MARK


def storage_changes(layout: Layout) -> list[tuple[list[tuple[nn.Module, str, str]], torch.dtype]]:
    """Tensors to be stored in another dtype: (owners, dtype) each, an owner being (module, table, name). Parameters
    go where the plan says; buffers only under policy "cast". Tied tensors take the widest that an owner asks for."""
    owners: dict[int, list[tuple[nn.Module, str, str]]] = defaultdict(list)
    asked: dict[int, set[str]] = defaultdict(set)
    tensors: dict[int, Tensor] = {}
    for module, layer in layout.precision.items():
        for table in TABLES:
            for name, tensor in getattr(module, table).items():
                if tensor is None or nn.parameter.is_lazy(tensor) or tensor.dtype not in CONVERTED:
                    _refuse_lazy(tensor, layout.names[module][0], name)
                    continue
                owners[id(tensor)].append((module, table, name))
                tensors[id(tensor)] = tensor
                if table == "_parameters" or kind_of(layer) == "cast":
                    asked[id(tensor)].add(layer.params)
    changes = []
    for key, formats in asked.items():
        fmt = formats.pop() if len(formats) == 1 else "fp32"
        where = " and ".join(f"{layout.names[m][0]}.{name}".lstrip(".") for m, _, name in owners[key])
        if formats:
            layout.notes.append(f"{where} are one tensor for which the plan asks two formats: stored in fp32")
        if tensors[key].dtype is not DTYPES[fmt]:
            if fmt == "fp32":
                layout.notes.append(f"{where} was stored in {tensors[key].dtype}: stored in fp32 while the plan is on")
            changes.append((owners[key], DTYPES[fmt]))
    return changes


def _refuse_lazy(tensor: Tensor | None, module: str, name: str) -> None:
    if tensor is not None and nn.parameter.is_lazy(tensor):
        raise ModelError(f"{module}.{name} has no values yet (a lazy module): run one batch first, then apply the plan")


def convert(owners: list[tuple[nn.Module, str, str]], dtype: torch.dtype) -> None:
    """Store one tensor in `dtype`, in place so that optimizers keep it, and keep the unrounded values aside."""
    module, table, name = owners[0]
    tensor = getattr(module, table)[name]
    original = tensor.data
    _set_data(tensor, original.to(dtype))
    for module, table, name in owners:
        spec = getattr(module, MARK)
        spec.stored[table, name], spec.stored_in[table, name] = original, dtype


def restore(tensor: Tensor | None, original: Tensor | torch.dtype, stored_in: torch.dtype) -> None:
    """Undo `convert`: elements that still are the rounding of the original become the original, others are cast. Where
    the original was let go, and its dtype alone is known, all are cast. Code of the model may have changed the dtype
    since (routers that call `.to(torch.float32)` in their forward)."""
    if tensor is None:
        return
    if isinstance(original, torch.dtype):
        if tensor.dtype is not original:
            _set_data(tensor, tensor.data.to(original))
        return
    now = tensor.data
    if now.shape == original.shape:
        original = original.to(now.device)
        changed = _bits(now) != _bits(original.to(stored_in).to(now.dtype))
        if changed.any():
            original.copy_(torch.where(changed, now.to(original.dtype), original))
        now = original
    _set_data(tensor, now.to(original.dtype))


def settle(root: nn.Module) -> None:
    """Let the unrounded values of trainable parameters go; their dtypes stay known."""
    for module, stored in _stored(root):
        for (table, name), original in stored.items():
            tensor = getattr(module, table).get(name)
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad and isinstance(original, Tensor):
                stored[table, name] = original.dtype


def unrounded(root: nn.Module) -> dict[str, Tensor]:
    """The unrounded values that are kept aside: name of the tensor -> values."""
    prefixes = {module: f"{name}." if name else "" for name, module in root.named_modules()}
    return {
        prefixes[module] + name: original
        for module, stored in _stored(root)
        for (_, name), original in stored.items()
        if isinstance(original, Tensor)
    }


def load_unrounded(root: nn.Module, values: dict[str, Tensor]) -> None:
    """Inverse of `unrounded`, for those of `values` that are kept aside here, too."""
    for name, original in unrounded(root).items():
        if name in values and values[name].shape == original.shape:
            original.copy_(values[name])


def _stored(root: nn.Module) -> Iterator[tuple[nn.Module, dict[tuple[str, str], Tensor | torch.dtype]]]:
    for module in root.modules():
        spec = module.__dict__.get(MARK)
        if spec is not None and spec.stored:
            yield module, spec.stored


def _set_data(tensor: Tensor, data: Tensor) -> None:
    before, gradient = tensor.dtype, tensor.grad if tensor.is_leaf else None
    if gradient is not None:
        tensor.grad = None
    tensor.data = data
    if before is not data.dtype and getattr(tensor, "grad_dtype", None) is before:
        tensor.grad_dtype = data.dtype  # somebody had set it, and it does not follow any more
    if gradient is not None:
        tensor.grad = gradient.to(getattr(tensor, "grad_dtype", None) or data.dtype)


def _bits(tensor: Tensor) -> Tensor:
    """The bit patterns: NaN equals itself, -0 differs from 0."""
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)
