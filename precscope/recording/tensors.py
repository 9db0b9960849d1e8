"""Finding the tensors in what modules take and give."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

_DEPTH = 6
_DTYPES = {torch.float64, torch.float32, torch.bfloat16, torch.float16} | {
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    if hasattr(torch, name)
}
_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def named_tensors(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (path, tensor) for every tensor inside tuples, lists, dicts, namedtuples and dataclasses.

    Paths join field names and indices with dots; a bare tensor has the path it was given.
    """
    if isinstance(value, torch.Tensor):
        yield path, value
    elif value is None or isinstance(value, str | bytes | int | float | bool) or depth >= _DEPTH:
        return
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from named_tensors(item, _join(path, key), depth + 1)
    elif isinstance(value, tuple | list):
        names = getattr(value, "_fields", range(len(value)))
        for key, item in zip(names, value, strict=False):
            yield from named_tensors(item, _join(path, key), depth + 1)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from named_tensors(getattr(value, field.name, None), _join(path, field.name), depth + 1)


def call_tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    """Tensors of a call's arguments; a single one has the path ""."""
    found = [*named_tensors(args), *named_tensors(kwargs)] if kwargs else list(named_tensors(args))
    return [("", found[0][1])] if len(found) == 1 else found


@contextlib.contextmanager
def modes_off() -> Iterator[None]:
    """Without the dispatch modes that are on (emulation, op recorder, tracer, the user's), so that what a watcher
    computes is not rounded, counted or traced by them."""
    if torch._C._len_torch_dispatch_stack() == 0:
        yield
        return
    with _disable_current_modes():
        yield


def unseen(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, run with `modes_off`."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch._C._len_torch_dispatch_stack() == 0:
            return function(*args, **kwargs)
        with _disable_current_modes():
            return function(*args, **kwargs)

    return run


def dense(x: torch.Tensor) -> torch.Tensor | None:
    """The values to reduce: `x` without autograd, its stored values if sparse, its local shard if distributed; None
    where there is nothing to see (integers, meta, fake or functorch tensors, unknown dtypes, layouts, subclasses)."""
    if x.dtype not in _DTYPES or x.device.type == "meta":
        return None
    if x.layout != torch.strided:
        return dense(_sparse_values(x)) if x.layout in _SPARSE else None
    if type(x) is torch.Tensor or type(x) is torch.nn.Parameter:
        if torch._C._functorch.is_functorch_wrapped_tensor(x):
            return None
        return x.detach()
    to_local = getattr(x, "to_local", None)
    if to_local is not None:
        return dense(x._local_tensor)  # type: ignore[attr-defined]  # to_local() would record itself in autograd
    return x.detach() if isinstance(x, torch.nn.Parameter) and type(x.data) is torch.Tensor else None


def _sparse_values(x: torch.Tensor) -> torch.Tensor:
    return x.detach()._values() if x.layout == torch.sparse_coo else x.detach().values()


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)
