"""SlotBuffer.accumulate inside torch.compile: an operator that writes to the rows.

Tracing sees one operator, so that the graph stays whole; at run time its body does what eager mode does. The operator
names the buffer by a number, for what a slot remembers of its tensors (their format) lies in the buffer and not in the
rows: noted at run time it is right however often the graph runs, and after `clear`. The rows are an argument, for the
compiler must know what is written; where it works on a copy of them, the body gets that copy.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import UsageError

if TYPE_CHECKING:
    from . import SlotBuffer

_buffers: weakref.WeakValueDictionary[int, SlotBuffer] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def number(buffer: SlotBuffer) -> int:
    """A number by which `accumulate` finds the buffer as long as it lives."""
    found = next(_numbers)
    _buffers[found] = buffer
    return found


def _accumulate(rows: Tensor, x: Tensor, buffer: int, slot: int, multiplier: float) -> None:
    """Add the statistics of x * multiplier to rows[slot], int64 [capacity, WIDTH], of the buffer with that number."""
    found = _buffers.get(buffer)
    if found is None:
        raise UsageError("a compiled function has outlived its SlotBuffer: keep the buffer as long as it is called")
    found._accumulate(rows, slot, x, multiplier)


accumulate = torch.library.custom_op("precscope::accumulate", _accumulate, mutates_args=("rows",))


@accumulate.register_fake
def _(rows: Tensor, x: Tensor, buffer: int, slot: int, multiplier: float) -> None:
    """Nothing is returned: nothing to say about shapes."""
