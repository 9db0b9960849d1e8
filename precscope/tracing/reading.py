"""Reading tensors while an op is being dispatched. Each reading waits for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ..formats import get_format
from ..recording.tensors import dense, modes_off
from .finding import TensorRange

NAN, POS_INF, NEG_INF = 1, 2, 4
_MOST = 1 << 28  # elements beyond which nothing is computed again

_NAMES = {
    getattr(torch, long): get_format(long).name
    for long in (
        "float64", "float32", "bfloat16", "float16",
        "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
    )
    if hasattr(torch, long)
}  # fmt: skip


def format_of(x: torch.Tensor) -> str:
    """Short name of x's format ("fp16"), that of its parts for complex numbers, torch's own for other dtypes."""
    dtype = x.dtype.to_real() if x.dtype.is_complex else x.dtype
    return _NAMES.get(dtype, str(dtype).removeprefix("torch."))


def values(x: torch.Tensor) -> torch.Tensor | None:
    """The floating values of x to look at (fp8 as fp32), None where there are none."""
    if x.is_complex() and x.layout is torch.strided:
        x = torch.view_as_real(x.detach().resolve_conj())
    found = dense(x)
    if found is None or found.numel() == 0:
        return None
    return found.float() if found.element_size() == 1 else found


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Without the dispatch modes below ours, so that what we compute is not rounded, counted or recorded by them."""
    with torch.no_grad(), modes_off():
        yield


def nonfinite(x: torch.Tensor) -> int:
    """NAN, POS_INF and NEG_INF, or'ed; 0 where all is finite. One reduction, one wait. Infinities beside a NaN are not
    told."""
    found = values(x)
    if found is None:
        return 0
    low, high = torch.stack(torch.aminmax(found)).tolist()
    if low != low:
        return NAN
    return POS_INF * (high == float("inf")) | NEG_INF * (low == float("-inf"))


def read_range(x: torch.Tensor) -> TensorRange:
    """The range of x, in full: several passes, for tensors that are to be reported."""
    found = values(x)
    shape, name = tuple(x.shape), format_of(x)
    if found is None:
        return TensorRange(shape, name, x.numel(), 0.0, 0.0, 0.0, 0.0, 0, 0, 0, 0)
    finite = found[found.isfinite()].double()
    magnitudes = finite[finite != 0].abs()
    smallest, largest = (magnitudes.min().item(), magnitudes.max().item()) if len(magnitudes) else (0.0, 0.0)
    low, high = (finite.min().item(), finite.max().item()) if len(finite) else (0.0, 0.0)
    counts = [int(found.isnan().sum()), int((found == float("inf")).sum()), int((found == float("-inf")).sum())]
    return TensorRange(
        shape, name, x.numel(), largest, smallest, low, high, len(finite) - len(magnitudes), *counts
    )  # fmt: skip


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Tensors in an op's arguments or results: bare ones and those in lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [x for item in value for x in tensors_in(item)]
    return []


def scalars_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[float]:
    """Floats among an op's arguments."""
    return [float(v) for v in (*args, *kwargs.values()) if isinstance(v, float)]


def widened(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor] | None:
    """The floating results of the op on its inputs in fp32 (fp64 where they are fp32): what it is in no low format.

    None where it cannot be run again: random ops, very large ones, kernels of one dtype alone.
    """
    tensors = [*tensors_in(list(args)), *tensors_in(list(kwargs.values()))]
    plain = isinstance(func, torch._ops.OpOverload) and func.namespace == "aten"
    random = torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
    if not plain or random or sum(x.numel() for x in tensors) > _MOST:
        return None
    narrow = any(x.is_floating_point() and x.element_size() < 4 for x in tensors) or any(
        _is_narrow(v) for v in (*args, *kwargs.values())
    )
    wide = torch.float32 if narrow else torch.float64
    copy = func._schema.is_mutable  # what was kept from before is not to be written into
    try:
        out = func(*[_widen(a, wide, copy) for a in args], **{k: _widen(v, wide, copy) for k, v in kwargs.items()})
    except (RuntimeError, TypeError, NotImplementedError):
        return None
    return [x for x in tensors_in(out) if x.is_floating_point()]


def _is_narrow(value: Any) -> bool:
    return isinstance(value, torch.dtype) and value.is_floating_point and value.itemsize < 4


def _widen(value: Any, wide: torch.dtype, copy: bool) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to(wide if value.is_floating_point() else value.dtype, copy=copy)
    if isinstance(value, torch.dtype):
        return wide if value.is_floating_point else value
    if isinstance(value, list | tuple):
        return type(value)(_widen(v, wide, copy) for v in value)
    return value
