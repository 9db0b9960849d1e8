"""Which embeddings may give low rows of a table that stays fp32.

Under policy "cast" with fp32 master weights a module sees low copies of its parameters. For a look-up that is a waste:
casting the rows it gives is the same, bit for bit, spares a copy of the whole table in each direction, and gradients of
a row that occurs often add up in fp32. But code around it that uses the table itself, `x @ self.wte.weight.T`, say,
needs it low as all else there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import CodeType
from typing import Any

from torch import nn


def is_lookup(module: nn.Module, around: Iterable[nn.Module]) -> bool:
    """Whether `module` is an embedding whose table no module `around` it reads by name in its forward."""
    return isinstance(module, nn.Embedding) and not any(_reads_weights(type(m)) for m in around)


def _reads_weights(cls: type) -> bool:
    """Whether `forward`, or a method of the class that it calls, names a `weight`."""
    pending, seen = ["forward"], {"forward"}
    while pending:
        for names in _names(getattr(cls, pending.pop(), None)):
            if "weight" in names or "get_parameter" in names:
                return True
            new = {n for n in names if n not in seen and not hasattr(nn.Module, n) and callable(getattr(cls, n, None))}
            seen |= new
            pending += new
    return False


def _names(function: Any) -> Iterator[tuple[str, ...]]:
    """The names that the code of a function uses, and the functions in it."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    pending = [getattr(function, "__code__", None)]
    while pending:
        code = pending.pop()
        if isinstance(code, CodeType):
            yield code.co_names
            pending += code.co_consts
