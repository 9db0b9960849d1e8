"""The dispatch mode that rounds: what each op of an emulated module takes and gives.

Every tensor keeps its own dtype (mostly float32); what its dtype would be in the real run is kept as a mark on its
memory (see marks.py), so that no value is rounded twice and what is wide on purpose stays wide.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..attribution import Where
from ..formats import FloatFormat, get_format
from ..rounding import quantize
from .autocast import Entry, entry_of, entry_of_node
from .facts import Op, OpFacts, facts_of
from .marks import Kind, Mark, Marks

if TYPE_CHECKING:
    from .emulator import Emulation

_OWN = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_NATIVE = {"fp16": torch.float16, "bf16": torch.bfloat16}
_PLAIN = (Tensor, torch.nn.Parameter)
_SECOND_DECIDES = frozenset({"mul", "div", "where", "masked_fill"})


def is_rounded(x: Any) -> bool:
    """Whether `x` is a tensor with numbers to round: dense, real, of 16 to 64 bits, with memory of its own kind."""
    return (
        type(x) in _PLAIN
        and x.dtype in _OWN
        and x.layout is torch.strided
        and x.device.type != "meta"
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors among an op's arguments: bare ones, and those in lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


class Rounder:
    """Rounds tensors as asked; stochastic rounding draws from generators of its own, one per device."""

    def __init__(self, rounding: str, saturate: bool, seed: int) -> None:
        self.rounding, self.saturate = rounding, saturate
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def restart(self) -> None:
        """Draw from the beginning again."""
        self._generators.clear()

    @property
    def is_plain(self) -> bool:
        """Whether it rounds as hardware does: then half kernels may do it."""
        return self.rounding == "nearest_even" and not self.saturate

    def round(self, x: Tensor, fmt: FloatFormat) -> Tensor:
        """`x` rounded to `fmt`, a new tensor; `x` itself where its dtype is that format."""
        if _OWN[x.dtype] == fmt.name or not x.numel():
            return x
        generator = self._generator(x.device) if self.rounding == "stochastic" else None
        return quantize(x, fmt, rounding=self.rounding, saturate=self.saturate, generator=generator)

    def round_(self, x: Tensor, fmt: FloatFormat) -> None:
        """Round `x` in place."""
        rounded = self.round(x, fmt)
        if rounded is not x:
            x.copy_(rounded)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device=device).manual_seed(self._seed)
        return self._generators[device]


class EmulationMode(TorchDispatchMode):
    """Rounds the ops of the modules that `owner` has formats for."""

    def __init__(self, owner: Emulation, rounder: Rounder, marks: Marks) -> None:
        super().__init__()
        self.supports_higher_order_operators = True  # flex_attention: one op, rounded at its ends
        self._owner, self._rounder, self._marks = owner, rounder, marks
        self.listed = True  # whether autocast's lists apply: code can switch it off for a while
        self.wide = 0  # above 0 inside a function whose result was asked for in float32

    def __torch_dispatch__(self, func: Op, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            facts = facts_of(func)
            where = self._owner.who.where()
            if facts.view:
                return func(*args, **kwargs)
            fmt = self._owner.format_at(where)
            if fmt is None:
                result = func(*args, **kwargs)
                for x in self._written(facts, args, kwargs):
                    self._marks.set(x, None)
                return result
            return self._emulated(func, facts, fmt, where, args, kwargs)

    def _emulated(self, func: Op, facts: OpFacts, fmt: FloatFormat, where: Where, args: Any, kwargs: Any) -> Any:
        written = list(self._written(facts, args, kwargs))
        written_ids = {id(x) for x in written}
        read = [x for x in tensors_in([*args, *kwargs.values()]) if id(x) not in written_ids and is_rounded(x)]
        target = self._target(facts, fmt, where, read, written)
        if facts.unfilled:
            return self._unfilled(func(*args, **kwargs), read)
        goals = [(x, self._target_of_written(x, target, fmt)) for x in written]
        if self._cast or target == fmt:
            args, kwargs = self._entered(args, fmt, written_ids), self._entered(kwargs, fmt, written_ids)
            read_too = {id(x) for x in tensors_in(list(args))}  # as out= arguments are not
            for x, goal in goals:
                if id(x) in read_too and goal == fmt and self._marks.get(x) != fmt:
                    self._rounder.round_(x, fmt)
        if facts.accumulates and target == fmt and fmt.name in _NATIVE and self._rounder.is_plain:
            result = _natively(func, facts, _NATIVE[fmt.name], args, kwargs)
        else:
            result = func(*args, **kwargs)
        for x, goal in goals:
            if isinstance(goal, FloatFormat):
                self._rounder.round_(x, goal)
            self._marks.written(x, goal)
        return self._results(result, facts, fmt, target, written_ids)

    # what the result is rounded to

    @property
    def _cast(self) -> bool:
        return self._owner.policy == "cast"

    def _target(
        self, facts: OpFacts, fmt: FloatFormat, where: Where, read: list[Tensor], written: list[Tensor]
    ) -> FloatFormat | Kind | None:
        """What the fresh results become: `fmt`, WIDE, or None: not rounded, nothing known."""
        if self.wide:
            return Kind.WIDE
        inputs = read or [x for x in written if is_rounded(x)]
        inputs = [x for x in inputs if x.dim()] or inputs
        if facts.norm:
            inputs = inputs[facts.backward : facts.backward + 1]
        marks = [m for m in map(self._marks.get, inputs) if m is not Kind.INNER]
        if self._cast:
            if not inputs:
                return Kind.WIDE  # made anew, in the dtype that was asked for: see casts.py
            wide = all(m is Kind.WIDE for m in marks) if facts.matmul else Kind.WIDE in marks
            return Kind.WIDE if marks and wide else fmt
        entry = self._entry(facts, where)
        if entry != "promote":
            return fmt if entry == "low" else None
        if where.phase == "backward" and len(marks) > 1 and (facts.backward or facts.name in _SECOND_DECIDES):
            marks = marks[1:]  # a gradient has the dtype of what it is the gradient of
        if Kind.WIDE in marks:
            return Kind.WIDE
        return fmt if marks and all(isinstance(m, FloatFormat) for m in marks) else None

    def _entry(self, facts: OpFacts, where: Where) -> Entry:
        """Where autocast's lists have the op. Backward runs outside autocast, in the precision of its forward op."""
        device = self._owner.autocast_device
        if where.phase != "backward":
            return entry_of(facts.name, device) if self.listed else "promote"
        if facts.matmul:
            return "low"
        of_node = entry_of_node(where.node, device)
        if of_node != "promote":
            return of_node
        return entry_of(facts.name, device) if facts.backward else "promote"

    def _target_of_written(self, x: Tensor, target: Mark, fmt: FloatFormat) -> Mark:
        """What an op that writes `x` leaves there: a tensor keeps its dtype, whatever is written to it."""
        mark = self._marks.get(x)
        if mark is Kind.WIDE or mark is Kind.INNER or (self.wide and mark is None):
            return mark
        if self._cast or isinstance(mark, FloatFormat):
            return fmt
        return target if target == fmt and x.dim() == 0 else None

    # arguments and results

    def _entered(self, value: Any, fmt: FloatFormat, written: set[int]) -> Any:
        """Arguments with the tensors that are only read rounded to `fmt`, wide ones and statistics apart."""
        if isinstance(value, dict):
            return {k: self._entered(v, fmt, written) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)([self._entered(v, fmt, written) for v in value])
        if id(value) in written or not is_rounded(value):
            return value
        mark = self._marks.get(value)
        return value if mark == fmt or isinstance(mark, Kind) else self._rounder.round(value, fmt)

    def _results(self, result: Any, facts: OpFacts, fmt: FloatFormat, target: Mark, written: set[int]) -> Any:
        if isinstance(result, tuple):
            return tuple(
                x if i < len(facts.returned) and facts.returned[i] else self._result(x, facts, fmt, target, i, written)
                for i, x in enumerate(result)
            )
        if isinstance(result, list):
            return [self._result(x, facts, fmt, target, 0, written) for x in result]
        return self._result(result, facts, fmt, target, 0, written)

    def _result(self, x: Any, facts: OpFacts, fmt: FloatFormat, target: Mark, index: int, written: set[int]) -> Any:
        if not is_rounded(x) or id(x) in written:
            return x
        if facts.statistics and index:
            self._marks.set(x, Kind.INNER)
        elif facts.norm and facts.backward and index and not self._cast:
            pass  # gradients of weight and bias, which are not low
        elif isinstance(target, FloatFormat):
            if self._marks.get(x) != fmt:  # else it lies in an argument's memory
                x = self._rounder.round(x, fmt)
                self._marks.set(x, fmt)
        elif target is Kind.WIDE:
            self._marks.set(x, target)
        return x

    def _unfilled(self, result: Any, read: list[Tensor]) -> Any:
        """New memory like that of an argument has its dtype."""
        if read and is_rounded(result):
            self._marks.set(result, self._marks.get(read[0]))
        return result

    def _written(self, facts: OpFacts, args: Any, kwargs: Any) -> Iterator[Tensor]:
        """Tensors that the op writes."""
        for place in facts.written:
            value = kwargs.get(place) if isinstance(place, str) else args[place] if place < len(args) else None
            yield from (x for x in tensors_in(value) if is_rounded(x))


def _natively(func: Op, facts: OpFacts, dtype: torch.dtype, args: Any, kwargs: Any) -> Any:
    """Run an op that rounds at each of its additions in the real format: its values fit the wider dtype exactly.

    Where the device has no such kernel, in the tensors' own dtype: rounded once.
    """
    originals: dict[int, tuple[Tensor, Tensor]] = {}

    def low(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)([low(v) for v in value])
        if not is_rounded(value):
            return value
        if id(value) not in originals:
            originals[id(value)] = (value, value.to(dtype))
        return originals[id(value)][1]

    low_args, low_kwargs = low(args), {k: low(v) for k, v in kwargs.items()}
    try:
        result = func(*low_args, **low_kwargs)
    except (RuntimeError, NotImplementedError):
        return func(*args, **kwargs)
    for place in facts.written:
        x = kwargs[place] if isinstance(place, str) else args[place]
        if id(x) in originals:
            x.copy_(originals[id(x)][1])
            return x
    own = next(x.dtype for x, _ in originals.values())
    return result.to(own)


def known_format(fmt: str | FloatFormat) -> FloatFormat | None:
    """The format, None for those that mean "as it is" (fp32 and fp64)."""
    found = get_format(fmt)
    return None if found.name in ("fp32", "fp64") else found
