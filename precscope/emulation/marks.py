"""What is known of the numbers in memory: which format they are rounded to already, or that they are to stay wide.

In a real half-precision run a tensor's dtype says so. Under emulation every tensor keeps its own dtype, and the mark
stands in for it. It belongs to the memory, not to the tensor object, because views and what autograd saves are other
objects over the same memory.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ..formats import FloatFormat


class Kind(Enum):
    """WIDE: in the tensor's own format on purpose (float32 was asked for by name, or the op is on autocast's float32
    list). INNER: statistics that an op keeps for its own backward, in float32 in half kernels too."""

    WIDE = "wide"
    INNER = "inner"


Mark = FloatFormat | Kind | None
"""A format: rounded to it. None: nothing is known."""

_PRUNE_FROM = 4096


class Marks:
    """Marks by memory. A mark dies with the memory it belongs to."""

    def __init__(self) -> None:
        self._marks: dict[int, tuple[StorageWeakRef, Mark]] = {}
        self._prune_at = _PRUNE_FROM

    def get(self, x: torch.Tensor) -> Mark:
        """The mark of the memory of `x`, which must have some (dense, not meta)."""
        # The weak reference keeps the address from being used again.
        found = self._marks.get(x.untyped_storage()._cdata)
        return None if found is None else found[1]

    def set(self, x: torch.Tensor, mark: Mark) -> None:
        """Mark the memory of `x`; None takes the mark off."""
        storage = x.untyped_storage()
        if mark is None:
            self._marks.pop(storage._cdata, None)
            return
        self._marks[storage._cdata] = (StorageWeakRef(storage), mark)
        if len(self._marks) > self._prune_at:
            self._marks = {k: v for k, v in self._marks.items() if not v[0].expired()}
            self._prune_at = max(_PRUNE_FROM, 2 * len(self._marks))

    def written(self, x: torch.Tensor, mark: Mark) -> None:
        """`x`, perhaps a part of its memory, was written with numbers of `mark`."""
        storage = x.untyped_storage()
        whole = x.numel() * x.element_size() == storage.nbytes()
        if whole or self.get(x) != mark:
            self.set(x, mark if whole else None)
