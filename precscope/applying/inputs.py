"""Changing the tensors in what a module is called with."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .fp8 import fake_quantise


def cast_input(tensor: Tensor, *, kind: str, dtype: torch.dtype) -> Tensor:
    """A tensor as a module of this kind takes it: under "cast" in `dtype`, else low ones of another dtype cast up."""
    if not tensor.is_floating_point() or tensor.dtype is dtype:
        return tensor
    if kind == "cast":
        return tensor.to(dtype)
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def cast_up(tensor: Tensor) -> Tensor:
    """16-bit tensors in fp32, which is exact; others as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def round_input(tensor: Tensor, *, fmt: str) -> Tensor:
    """An operand rounded to the values of `fmt`; integers stay."""
    return fake_quantise(tensor, fmt) if tensor.is_floating_point() else tensor


def fit(args: tuple, dtype: torch.dtype) -> bool:
    """Whether all are tensors of the dtype already: the common case, worth a short cut."""
    for value in args:  # noqa: SIM110 (torch.compile and speed: no generator)
        if not isinstance(value, Tensor) or value.dtype is not dtype:
            return False
    return True


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `change` made to every tensor in it: nested tuples, lists, dicts, namedtuples and dataclasses.
    What holds no tensor that changes is passed on as the same object, so that caches stay shared."""
    return _mapped(value, change)[0]


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> tuple[Any, bool]:
    """The value, and whether anything in it changed (torch.compile of torch 2.11 cannot compare dicts by identity)."""
    if isinstance(value, Tensor):
        new = change(value)
        return new, new is not value
    if isinstance(value, (dict, UserDict)):
        changed = _changes(dict(value), change)
        return (_with_items(value, changed), True) if changed else (value, False)
    if isinstance(value, (list, tuple)):
        pairs = [_mapped(v, change) for v in value]
        if not any([changed for _, changed in pairs]):  # noqa: C419 (torch.compile: no generator)
            return value, False
        items = [new for new, _ in pairs]
        if isinstance(value, list):
            return (items if type(value) is list else _with_items(value, dict(enumerate(items)))), True
        return (type(value)._make(items) if hasattr(value, "_make") else type(value)(items)), True
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = _changes({f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)}, change)
        return (_with_fields(value, changed), True) if changed else (value, False)
    return value, False


def _changes(items: dict[Any, Any], change: Callable[[Tensor], Tensor]) -> dict[Any, Any]:
    """The items that change, as they become."""
    found = {}
    for key, item in items.items():
        new, changed = _mapped(item, change)
        if changed:
            found[key] = new
    return found


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
