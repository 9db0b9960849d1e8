"""Rows of statistics between two flushes.

Each distinct tensor of a recorded step is reduced once, into a slot on its own device; a row (step, site) is the sum of
the slots linked to it. One tensor that is seen at two sites has one slot and two links. Nothing is copied to the host
before `drain`, which makes one copy per device.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from ..kernels import SlotBuffer
from ..sites import Site
from ..stats import StatsTable
from ..store import StatsWriter
from .tensors import unseen

Slot = tuple[str, int]  # device, row in that device's buffer


class Observations:
    """Slots and their links. `used` counts the slots since the last drain."""

    def __init__(self) -> None:
        self._buffers: dict[str, SlotBuffer] = {}
        self._next: dict[str, int] = {}
        self._rows: dict[tuple[int, Site], list[Slot]] = {}
        self._ratios: dict[tuple[int, Site], list[Slot]] = {}
        self._scales: dict[int, float | torch.Tensor] = {}
        self._unscaled: set[tuple[int, Site]] = set()
        self._skipped: dict[tuple[int, Site], torch.Tensor] = {}
        self._linked: set[Site] = set()
        self._changes: dict[tuple[int, Site], torch.Tensor] = {}
        self.used = 0

    def _slot(self, device: torch.device) -> tuple[SlotBuffer, Slot]:
        key = str(device)
        buffer, index = self._buffers.get(key), self._next.get(key, 0)
        if buffer is None or index >= buffer.capacity:
            with torch.inference_mode(False):  # made inside inference mode, it could not be used outside
                if buffer is None:
                    buffer = self._buffers[key] = SlotBuffer(device)
                else:
                    buffer.grow(2 * buffer.capacity)
        self._next[key] = index + 1
        self.used += 1
        return buffer, (key, index)

    @unseen
    def reduce(self, x: torch.Tensor) -> Slot:
        """Reduce `x` into a new slot."""
        buffer, slot = self._slot(x.device)
        buffer.accumulate(slot[1], x)
        return slot

    def empty(self, device: torch.device) -> Slot:
        """A new slot for weights alone."""
        return self._slot(device)[1]

    @unseen
    def price(self, slot: Slot, y: torch.Tensor, g: torch.Tensor) -> None:
        """Add the gradient g = dL/dy of the values y to the slot's gradient-weighted histogram."""
        self._buffers[slot[0]].accumulate_weights(slot[1], y, g)

    def set_changes(self, step: int, site: Site, changes: torch.Tensor) -> None:
        """What rounding the tensor of the row (step, site) to each of store.CHANGES does to the loss, float64 [4]."""
        self._changes[step, site] = changes

    @unseen
    def reduce_update(self, step: int, sites: Iterable[Site], before: torch.Tensor, after: torch.Tensor) -> None:
        """Reduce the update after - before, and its size relative to `before`, into the rows (step, sites)."""
        buffer, slot = self._slot(after.device)
        _, ratio = self._slot(after.device)
        buffer.accumulate_update(slot[1], ratio[1], before, after)
        for site in sites:
            self.link(step, site, slot)
            self._ratios.setdefault((step, site), []).append(ratio)

    def link(self, step: int, site: Site, slot: Slot) -> None:
        """Let `slot` count for the row (step, site)."""
        self._rows.setdefault((step, site), []).append(slot)
        self._linked.add(site)

    def link_unscaled(self, step: int, site: Site, slot: Slot) -> None:
        """Like `link`, for a gradient out of which the loss scale was divided already."""
        self.link(step, site, slot)
        self._unscaled.add((step, site))

    def begin_step(self) -> None:
        """A step begins: no site has been seen in it."""
        self._linked.clear()

    def has(self, site: Site) -> bool:
        """Whether `site` was seen in the running step, flushed or not."""
        return site in self._linked

    def set_scale(self, step: int, scale: float | torch.Tensor) -> None:
        """Remember the loss scale that multiplied this step's gradients (the first one told wins)."""
        self._scales.setdefault(step, scale)

    def has_scale(self, step: int) -> bool:
        """Whether this step's loss scale is known."""
        return step in self._scales

    def drop_updates_if(self, step: int, sites: Iterable[Site], flag: torch.Tensor) -> None:
        """Leave the update rows (step, sites) out where `flag` turns out to be non-zero: the optimizer did not step."""
        for site in sites:
            self._skipped[step, site] = flag

    @unseen
    def drain(self, writer: StatsWriter) -> int:
        """Write all rows as one part and forget them. Returns the number of rows written.

        They are forgotten also where writing fails, so that a full disk cannot grow the memory of the run.
        """
        skipped = _on_host({row: flag.reshape(-1).float().amax(0, keepdim=True) for row, flag in self._skipped.items()})
        rows = [row for row in self._rows if not skipped.get(row, [0.0])[0]]
        try:
            if rows:
                writer.write(*self._read(rows), changes=self._read_changes(rows))
        finally:
            self._clear()
        return len(rows)

    def _read_changes(self, rows: list[tuple[int, Site]]) -> dict[int, list[float]]:
        changes = _on_host(self._changes)
        return {i: changes[row] for i, row in enumerate(rows) if row in changes}

    def _read(
        self, rows: list[tuple[int, Site]]
    ) -> tuple[np.ndarray, list[Site], StatsTable, np.ndarray, dict[int, tuple[np.ndarray, int, int]]]:
        offsets, tables = {}, []
        for key, buffer in self._buffers.items():
            offsets[key] = sum(len(t.zeros) for t in tables)
            tables.append(buffer.read(self._next[key]))
        everything = StatsTable.concat(tables)
        links = [(offsets[d] + i, row) for row, key in enumerate(rows) for d, i in self._rows[key]]
        slots, keys = np.asarray(links, np.int64).T
        table = everything.take(slots).group(keys, len(rows))
        scale = np.ones(len(rows))
        known = {step: float(s) for step, s in self._scales.items()}
        for i, (step, site) in enumerate(rows):
            if site.role.is_gradient and (step, site) not in self._unscaled:
                scale[i] = known.get(step, 1.0)
        ratios = {}
        for i, key in enumerate(rows):
            if key in self._ratios:
                at = [offsets[device] + index for device, index in self._ratios[key]]
                ratios[i] = (
                    everything.counts[at].sum(0), int(everything.zeros[at].sum()), int(everything.pos_inf[at].sum())
                )  # fmt: skip
        steps = np.asarray([step for step, _ in rows], np.int64)
        return steps, [site for _, site in rows], unscaled(table, scale), scale, ratios

    def _clear(self) -> None:
        for key, buffer in self._buffers.items():
            if self._next[key]:
                buffer.clear(self._next[key])
            self._next[key] = 0
        self._rows.clear()
        self._ratios.clear()
        self._scales.clear()
        self._unscaled.clear()
        self._skipped.clear()
        self._changes.clear()
        self.used = 0


def _on_host(tensors: dict[Any, torch.Tensor]) -> dict[Any, list[float]]:
    """The elements of one-dimensional tensors of equal length: one copy from each device."""
    found: dict[Any, list[float]] = {}
    for device in {x.device for x in tensors.values()}:
        keys = [key for key, x in tensors.items() if x.device == device]
        found |= zip(keys, torch.stack([tensors[key] for key in keys]).tolist(), strict=True)
    return found


def unscaled(table: StatsTable, scale: np.ndarray) -> StatsTable:
    """Divide the loss scale out of each row: exact for powers of two. For another scale the scalars are exact and the
    histogram moves by floor(log2 scale), so that an element may be counted one binade too high."""
    scale = np.where(np.isfinite(scale) & (scale > 0), scale, 1.0)
    mantissa, exponent = np.frexp(scale)
    shifted = table.shift(-(exponent.astype(np.int64) - 1))
    rest = 2 * mantissa
    if np.any(rest != 1):
        shifted.amax, shifted.amin_nonzero = shifted.amax / rest, shifted.amin_nonzero / rest
        shifted.sum, shifted.sumsq = shifted.sum / rest, shifted.sumsq / rest**2
    return shifted
