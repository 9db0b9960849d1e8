"""Rows of statistics between two flushes.

Each distinct tensor of a recorded step is reduced once, into a slot on its own device; a row (step, site) is the sum of
the slots linked to it. One tensor that is seen at two sites has one slot and two links. Nothing is copied to the host
before `collect`, which makes one copy per device.

Of W processes that train one model the loss is the mean over them, so that each sees gradients W times those of that
loss: W is divided out like a loss scale (and not stored as one). Rows of all processes then add up to those of one
process that takes their batches as micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..formats import get_format
from ..kernels import SlotBuffer
from ..sites import Role, Site
from ..stats import StatsTable
from ..store import StatsWriter
from .tensors import unseen

Slot = tuple[str, int]  # device, row in that device's buffer


@dataclass
class Rows:
    """What a flush writes: a row per (step, site).

    steps: int64[S]. table: loss scale and number of processes divided out. loss_scale: float64[S], 1 where there was
    none. ratios, changes: see StatsWriter.write. reduced: bool[S], gradients that are those of all processes already.
    """

    steps: np.ndarray
    sites: list[Site]
    table: StatsTable
    loss_scale: np.ndarray
    ratios: dict[int, tuple[np.ndarray, int, int]] = field(default_factory=dict)
    changes: dict[int, list[float]] = field(default_factory=dict)
    reduced: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def keys(self) -> list[tuple[int, Site]]:
        """(step, site) of each row."""
        return list(zip(self.steps.tolist(), self.sites, strict=True))

    def take(self, index: np.ndarray) -> Rows:
        """The rows at `index` (integers), in that order."""
        return Rows(
            self.steps[index], [self.sites[i] for i in index], self.table.take(index), self.loss_scale[index],
            {j: self.ratios[i] for j, i in enumerate(index.tolist()) if i in self.ratios},
            {j: self.changes[i] for j, i in enumerate(index.tolist()) if i in self.changes}, self.reduced[index],
        )  # fmt: skip

    def write(self, writer: StatsWriter) -> None:
        """Write them as one part."""
        writer.write(self.steps, self.sites, self.table, self.loss_scale, self.ratios, self.changes)


class Observations:
    """Slots and their links. `used` counts the slots since the last `collect`.

    world: processes whose mean loss is trained on; see above.
    """

    def __init__(self, world: int = 1) -> None:
        # A power of two moves bins when rows are collected, as a loss scale does. The rest, 3/4 of 3, is divided out
        # of the elements: bins cannot tell where they would go.
        self._processes, self._power = world, 1 << (world.bit_length() - 1)
        self._buffers: dict[str, SlotBuffer] = {}
        self._next: dict[str, int] = {}
        self._rows: dict[tuple[int, Site], list[Slot]] = {}
        self._sources: dict[Slot, str] = {}
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

    @unseen
    def reduce_gradient(self, x: torch.Tensor) -> Slot:
        """Reduce a gradient of this process's own loss into a new slot."""
        buffer, slot = self._slot(x.device)
        multiplier = self._power / self._processes
        buffer.accumulate(slot[1], x, multiplier=multiplier)
        if multiplier != 1:  # the buffer calls that a grid of its own; as with a loss scale, say what it was
            self._sources[slot] = get_format(str(x.dtype).removeprefix("torch.")).name
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
        """Like `link`, for a gradient out of which the loss scale and the number of processes were divided already."""
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
    def collect(self) -> Rows:
        """All rows, on the host. They are forgotten here, so that a full disk cannot grow the memory of the run."""
        try:
            skipped = _on_host({row: flag.reshape(-1).float().amax(0, keepdim=True) for row, flag in
                                self._skipped.items()})  # fmt: skip
            keys = [row for row in self._rows if not skipped.get(row, [0.0])[0]]
            return self._read(keys) if keys else Rows(np.zeros(0, np.int64), [], StatsTable.empty(0), np.zeros(0))
        finally:
            self._clear()

    def drain(self, writer: StatsWriter) -> int:
        """Write all rows as one part and forget them. Returns the number of rows written."""
        rows = self.collect()
        rows.write(writer)
        return len(rows)

    def _read(self, keys: list[tuple[int, Site]]) -> Rows:
        offsets, tables = {}, []
        for device, buffer in self._buffers.items():
            offsets[device] = sum(len(t.zeros) for t in tables)
            tables.append(buffer.read(self._next[device]))
        everything = StatsTable.concat(tables)
        for (device, index), source in self._sources.items():
            everything.source[offsets[device] + index] = source
        links = [(offsets[d] + i, row) for row, key in enumerate(keys) for d, i in self._rows[key]]
        slots, owners = np.asarray(links, np.int64).T
        table = everything.take(slots).group(owners, len(keys))
        ratios = {}
        for i, key in enumerate(keys):
            if key in self._ratios:
                at = [offsets[device] + index for device, index in self._ratios[key]]
                ratios[i] = (
                    everything.counts[at].sum(0), int(everything.zeros[at].sum()), int(everything.pos_inf[at].sum())
                )  # fmt: skip
        found = _on_host(self._changes)
        changes = {i: found[key] for i, key in enumerate(keys) if key in found}
        scale, divisor, reduced = self._divisors(keys)
        self._share(table, keys)
        steps = np.asarray([step for step, _ in keys], np.int64)
        return Rows(steps, [s for _, s in keys], unscaled(table, divisor), scale, ratios, changes, reduced)

    def _divisors(self, keys: list[tuple[int, Site]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(loss scale, by what to divide, whether it is a gradient of all processes already), for each row."""
        known = {step: float(s) for step, s in self._scales.items()}
        gradient = np.asarray([site.role.is_gradient for _, site in keys])
        reduced = np.asarray([key in self._unscaled for key in keys])
        scale = np.asarray([known.get(step, 1.0) for step, _ in keys])
        scale = np.where(gradient & ~reduced, scale, 1.0)
        return scale, np.where(gradient & ~reduced, scale * self._power, 1.0), reduced

    def _share(self, table: StatsTable, keys: list[tuple[int, Site]]) -> None:
        """Weights of activations are squares of gradients, W^2 times those of the mean loss. Those of parameters are of
        gradients that were averaged already."""
        if table.weights is not None and self._processes > 1:
            activations = [i for i, (_, site) in enumerate(keys) if site.role is not Role.WEIGHT]
            table.weights[activations] /= self._processes**2

    def _clear(self) -> None:
        for key, buffer in self._buffers.items():
            if self._next[key]:
                buffer.clear(self._next[key])
            self._next[key] = 0
        self._rows.clear()
        self._sources.clear()
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
