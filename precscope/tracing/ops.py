"""What the tracer knows of ops beforehand: which it passes over, which write, which write infinities on purpose."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from ..attribution import Where
from ..formats import FloatFormat, get_format
from .reading import NAN, NEG_INF, alone, format_of, scalars_in, tensors_in, values

_UNWRITTEN = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "resize_"}
_MOVES = {
    "alias", "cat", "clone", "detach", "embedding", "expand_copy", "flip", "gather", "index", "index_select",
    "lift_fresh", "lift_fresh_copy", "repeat", "roll", "set_", "stack", "_unsafe_view", "_reshape_alias",
}  # fmt: skip
_WRITES = {
    "full", "full_like", "new_full", "fill", "fill_", "masked_fill", "masked_fill_", "where", "scalar_tensor",
    "constant_pad_nd", "index_fill", "index_fill_",
}  # fmt: skip
_REPAIRS = {"masked_fill", "where", "nan_to_num", "index_put", "_index_put_impl"}
_OVERWRITES = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_"}
_KEPT_WHOLE = 1 << 26  # elements of an in-place operand up to which a copy of it is kept until the op is done


@dataclass(frozen=True)
class Op:
    """name: bare ("pow"). text: in full ("aten.pow.Tensor_Scalar"). passed_over: a view, a mere move of values, or
    fresh memory. repairs: it may put something else where a tensor was not finite. written: positions of the arguments
    that it changes, names of keyword-only ones."""

    name: str
    text: str
    passed_over: bool
    repairs: bool
    written: tuple[int | str, ...]


@functools.cache
def op_of(func: Any) -> Op:
    """The Op of an overload, or of a higher-order operator (flex_attention), which is looked at as a whole."""
    if not isinstance(func, torch._ops.OpOverload):
        return Op(str(func), str(func), passed_over=False, repairs=False, written=())
    name = func.overloadpacket.__name__
    written = tuple(
        argument.name if argument.kwarg_only else place
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    passed_over = func.is_view or name in _UNWRITTEN or name in _MOVES
    return Op(name, str(func), passed_over, name.rstrip("_") in _REPAIRS, written)


@dataclass(frozen=True)
class Call:
    """An op that is being run. args, kwargs: as they were before it. target: the first tensor it was called with."""

    func: Any
    op: Op
    where: Where
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: torch.Tensor | None

    @property
    def inputs(self) -> list[torch.Tensor]:
        """Floating tensors among the arguments."""
        return [x for x in tensors_in([*self.args, *self.kwargs.values()]) if is_float(x)]

    def nth(self, index: int, count: int) -> Call:
        """Of an op on lists of `count` tensors, what it does to number `index`."""
        args = tuple([a[index]] if isinstance(a, list | tuple) and len(a) == count else a for a in self.args)
        return Call(self.func, self.op, self.where, args, self.kwargs, self.target)


def call_of(func: Any, op: Op, where: Where, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The call, with copies of what it is about to change, and without what it is about to overwrite unread."""
    target = next(iter(tensors_in(list(args))), None)
    if op.written:
        kept: list[Any] = list(args)
        with alone():
            for place in op.written:
                if isinstance(place, str):
                    kwargs = {k: v for k, v in kwargs.items() if k != place}
                elif place < len(kept):
                    kept[place] = None if op.name in _OVERWRITES else _copied(kept[place])
                    kept = [_apart(value, args[place]) for value in kept]
        args = tuple(kept)
    return Call(func, op, where, args, kwargs, target)


def is_mask(call: Call, output: torch.Tensor, found: int, came: int) -> bool:
    """Whether the infinities in `output` were written on purpose: an infinite constant, or one that stands for it.

    found, came: flags of the output and of the inputs together, see `nonfinite`.
    """
    if found & NAN:
        return False
    scalars = scalars_in(call.args, call.kwargs)
    if call.op.name in _WRITES and any(abs(s) == float("inf") for s in scalars):
        return True
    if came or found != NEG_INF:
        return False
    if any(s < -get_format(format_of(output)).max for s in scalars):
        return True  # x + mask * -1e9
    x = next((v for v in map(values, call.inputs) if v is not None), None)
    if x is None:
        return False
    if call.op.name == "log":
        return bool(((x == 0) | (x == 1)).all())  # the logarithm of a mask of zeros and ones
    if call.op.name in ("_to_copy", "copy_") and x.shape == output.shape:
        lost = x[~output.isfinite()]
        return bool((lost == lost[0]).all())  # -1e9 or finfo.min, cast to a smaller format
    return False


def is_float(x: torch.Tensor) -> bool:
    """Whether x holds real or complex floating numbers."""
    return x.is_floating_point() or x.is_complex()


def float_format(x: torch.Tensor) -> FloatFormat | None:
    """x's format, None where it holds no floats."""
    return get_format(format_of(x)) if is_float(x) else None


def _apart(value: Any, written: Any) -> Any:
    """`value`, copied where it is in the memory of `written`: x.mul_(x)."""
    if not (isinstance(value, torch.Tensor) and isinstance(written, torch.Tensor)):
        return value
    shared = torch._C._is_alias_of(value, written)  # type: ignore[attr-defined]
    return _copied(value) if shared else value


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone() if value.numel() <= _KEPT_WHOLE else value
    if isinstance(value, list | tuple):
        return [_copied(v) for v in value]
    return value
