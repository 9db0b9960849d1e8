"""Casts and dtypes, followed where the user's code calls functions of torch.

Under emulation tensors are float32 whatever they stand for, but model code asks and casts: `x.float()`, `.to(x.dtype)`,
`softmax(x, dtype=torch.float32)`, `torch.finfo(x.dtype).min`, `if x.dtype == torch.float16`. So inside emulated modules
`x.dtype` answers with the dtype that the tensor would have in the real run, and a cast to such a dtype rounds and stays
float32. What is cast to float32 by name becomes a copy whose memory is marked wide: it is computed with as it is, until
it is cast back. Formats without a torch dtype of their own (tf32, 6 and 4 bits) have no such answer: there `x.dtype` is
the tensor's own, and a cast back is not seen.

Under policy "autocast", and where a value leaves the emulated modules, the casts that a real run makes on its own are
made as such copies, too: so a gradient crosses back in the precision of the value that it belongs to.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from ..formats import FloatFormat, get_format
from .autocast import Entry, entry_of
from .marks import Kind, Mark
from .mode import is_rounded, tensors_in

if TYPE_CHECKING:
    from .emulator import Emulation

_WIDE = (torch.float32, torch.float64)
_LOW = {
    getattr(torch, name): get_format(name)
    for name in ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    if hasattr(torch, name)
}
_DTYPE_OF = {fmt: dtype for dtype, fmt in _LOW.items()}
_BY_NAME = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}
_CASTS = frozenset({*_BY_NAME, "to", "type", "type_as"})
_ALSO = {
    "cross_entropy": ("cross_entropy_loss", "log_softmax"), "__matmul__": ("matmul",), "__rmatmul__": ("matmul",),
    "__pow__": ("pow",), "__rpow__": ("pow",),
}  # fmt: skip
"""Functions whose name on autocast's lists is another; the first that is on one."""
_PROMOTING = frozenset({
    "add", "sub", "rsub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "cat", "concat", "stack",
    "where", "maximum", "minimum", "lerp", "addcmul", "addcdiv", "atan2", "__add__", "__radd__", "__iadd__", "__sub__",
    "__rsub__", "__isub__", "__mul__", "__rmul__", "__imul__", "__truediv__", "__rtruediv__", "__itruediv__", "add_",
    "sub_", "mul_", "div_", "addcmul_", "addcdiv_", "lerp_",
})  # fmt: skip
"""Functions whose result has the widest type of their arguments."""


class Casts(TorchFunctionMode):
    """Watches the calls in the modules that `owner` has formats for."""

    def __init__(self, owner: Emulation) -> None:
        super().__init__()
        self._owner = owner

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        mode = self._owner.mode
        mode.listed = self._owner.policy == "cast" or torch.is_autocast_enabled(self._owner.device)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            result = func(*args, **kwargs)
            return self._dtype(args[0], result) if isinstance(result, torch.dtype) else result
        if name == "backward" and func is Tensor.backward:
            with self:  # what a checkpoint recomputes is watched, too
                return _backward(*args, **kwargs)
        asked = _asked(name, args, kwargs)
        entry = _entry_of_function(name, self._owner.autocast_device)
        if entry is not None and not mode.listed:
            entry = "promote"
        if asked is None and entry is None:
            return func(*args, **kwargs)
        fmt = self._owner.format_at(self._owner.who.where())
        if fmt is None:
            if entry is not None:  # what comes from emulated modules is cast up
                args, kwargs = self._crossing(args, Kind.WIDE), self._crossing(kwargs, Kind.WIDE)
            return func(*args, **kwargs)
        if asked is not None:
            return self._asked_for(asked, name, func, args, kwargs, fmt)
        if self._owner.policy == "cast" or (entry == "promote" and not self._is_mixed(args, kwargs)):
            return func(*args, **kwargs)
        target = fmt if entry == "low" else Kind.WIDE
        kept = args[:1] if _in_place(name) else ()
        args = (*kept, *self._crossing(args[len(kept) :], target))
        kwargs = self._crossing(kwargs, target)
        return self._wide(func, args, kwargs) if entry == "fp32" else func(*args, **kwargs)

    # what model code asks for

    def _meaning(self, x: Tensor, fmt: FloatFormat) -> Mark:
        """What `x` stands for: a format, or WIDE."""
        mark = self._owner.marks.get(x)
        if mark is None:
            return fmt if self._owner.policy == "cast" else Kind.WIDE
        return Kind.WIDE if mark is Kind.INNER else mark

    def _dtype(self, x: Any, own: torch.dtype) -> torch.dtype:
        """The dtype that `x` would have in the real run."""
        if own not in _WIDE or not is_rounded(x):
            return own
        fmt = self._owner.format_at(self._owner.who.where())
        if fmt is None:
            return own
        meaning = self._meaning(x, fmt)
        return _DTYPE_OF.get(meaning, own) if isinstance(meaning, FloatFormat) else own

    def _asked_for(
        self, asked: torch.dtype | Tensor, name: str, func: Any, args: Any, kwargs: Any, fmt: FloatFormat
    ) -> Any:
        """A call that names a dtype, or a tensor whose dtype it wants."""
        if isinstance(asked, Tensor):
            meaning = self._meaning(asked, fmt) if is_rounded(asked) else None
            if meaning is None or asked.dtype not in _WIDE:
                return func(*args, **kwargs)
        else:
            meaning = _LOW.get(asked, Kind.WIDE)
        source = args[0] if args and isinstance(args[0], Tensor) else None
        if source is not None and is_rounded(source) and source.dtype not in _WIDE:
            return func(*args, **kwargs)  # low for real
        if name in _CASTS:
            return self._cast(meaning, func, args, kwargs, fmt)
        if meaning is Kind.WIDE:
            floating = any(is_rounded(x) for x in tensors_in(list(args)))
            return self._wide(func, args, kwargs) if floating else func(*args, **kwargs)
        result = func(*_widened(args), **_widened(kwargs))
        return self._across(result, meaning) if is_rounded(result) else result

    def _cast(self, meaning: Any, func: Any, args: Any, kwargs: Any, fmt: FloatFormat) -> Any:
        """`.to(...)` and the like, of a wide tensor or an integer one."""
        x = args[0]
        if getattr(func, "__name__", "") in ("half", "bfloat16"):
            result = x if is_rounded(x) else x.float()
        else:
            result = func(*_widened(args), **_widened(kwargs))
        if not is_rounded(result):
            return result
        if not is_rounded(x):  # from integers
            return self._across(result, meaning)
        before = self._meaning(x, fmt)
        if before == meaning:
            self._owner.marks.set(result, self._owner.marks.get(x))
            return result
        return self._across(result, meaning, before)

    def _across(self, x: Tensor, mark: FloatFormat | Kind, before: Mark = Kind.WIDE) -> Tensor:
        """A copy of `x` as `mark`; its gradient goes back to what `x` is."""
        return _Crossing.apply(x, self._owner, mark, before)  # type: ignore[no-any-return]

    def _wide(self, func: Any, args: Any, kwargs: Any) -> Any:
        """All of a function in float32."""
        self._owner.mode.wide += 1
        try:
            return func(*args, **kwargs)
        finally:
            self._owner.mode.wide -= 1

    # what a real run casts on its own

    def _is_mixed(self, args: Any, kwargs: Any) -> bool:
        """Whether some of the arguments are low and some are not; numbers and tensors without dimensions give way."""
        found = [x for x in tensors_in([*args, *kwargs.values()]) if is_rounded(x) and x.dim()]
        low = [isinstance(self._owner.marks.get(x), FloatFormat) for x in found]
        return any(low) and not all(low)

    def _crossing(self, value: Any, target: FloatFormat | Kind) -> Any:
        """Arguments cast to `target`. Only those that carry a gradient: for values the dispatch mode does it."""
        if isinstance(value, dict):
            return {k: self._crossing(v, target) for k, v in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._crossing(v, target) for v in value)
        if not is_rounded(value) or not value.requires_grad or not torch.is_grad_enabled():
            return value
        mark = self._owner.marks.get(value)
        low = isinstance(mark, FloatFormat)
        if mark == target or (not low and target is Kind.WIDE):
            return value
        return self._across(value, target, mark if low else Kind.WIDE)


class _Crossing(torch.autograd.Function):
    """A copy on the other side: rounded, or wide. Gradients go back to where the value came from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, owner: Emulation, mark: Mark, before: Mark) -> Tensor:
        ctx.owner, ctx.back = owner, before if owner.backward else Kind.WIDE
        if isinstance(before, FloatFormat):  # not rounded yet, perhaps
            x = _crossed(x, owner, before)
        return _crossed(x, owner, mark)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _crossed(gradient, ctx.owner, ctx.back), None, None, None


def _crossed(x: Tensor, owner: Emulation, mark: Mark) -> Tensor:
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        if isinstance(mark, FloatFormat) and owner.marks.get(x) != mark:
            y = owner.rounder.round(x.detach(), mark)
            y = y.clone() if y.data_ptr() == x.data_ptr() else y
        else:
            y = x.detach().clone()
        owner.marks.set(y, mark)
    return y


def _backward(
    x: Tensor, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False, inputs: Any = None
) -> None:
    """Tensor.backward past its own look for function modes."""
    torch.autograd.backward(x, gradient, retain_graph, create_graph, inputs=inputs)


def _asked(name: str, args: Any, kwargs: Any) -> torch.dtype | Tensor | None:
    """The floating dtype that a call names, or the tensor whose dtype it wants."""
    if name == "view":
        return None  # other bits, not other numbers
    if name in _BY_NAME:
        return _BY_NAME[name]
    for value in (*args[name in _CASTS :], *kwargs.values()):
        if isinstance(value, torch.dtype):
            return value if value in _LOW or value in _WIDE else None
        if name in ("to", "type_as") and isinstance(value, Tensor):
            return value
    return None


def _widened(value: Any) -> Any:
    """Arguments with float32 for low dtypes."""
    if isinstance(value, dict):
        return {k: _widened(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(_widened(v) for v in value)
    return torch.float32 if isinstance(value, torch.dtype) and value in _LOW else value


def _in_place(name: str) -> bool:
    return name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


@cache
def _entry_of_function(name: str, device: str) -> Entry | None:
    """Where autocast has a function of torch, by its Python name; None for what is no arithmetic of its kind."""
    if name in _PROMOTING:
        return "promote"
    for candidate in _ALSO.get(name, (name,)):
        entry = entry_of(candidate, device)
        if entry != "promote":
            return entry
    return None
