"""Rows of statistics between two flushes.

Each distinct tensor of a recorded step is reduced once, into a slot on its own device; a row (step, site) is the sum of
the slots linked to it. One tensor that is seen at two sites has one slot and two links. Nothing is copied to the host
before `collect`, which makes one copy per device.

What waits between two flushes is kept as numbers in arrays, not as objects: of a large model there would be a hundred
thousand alive, and Python's garbage collector would go through all of them, time and again.

Of W processes that train one model the loss is the mean over them, so that each sees gradients W times those of that
loss: W is divided out like a loss scale (and not stored as one). Rows of all processes then add up to those of one
process that takes their batches as micro-batches.
"""

from __future__ import annotations

import math
import mmap
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
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
_CHUNK = 1024  # rows put together at a time
_BITS = 32  # step << 32 | number of the site; number of the device << 32 | slot
_LOW = (1 << _BITS) - 1


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
        """Write them as one part. To be followed by writer.tidy()."""
        writer.write(self.steps, self.sites, self.table, self.loss_scale, self.ratios, self.changes, tidy=False)


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
        self._devices: dict[str, int] = {}
        self._sites: dict[Site, int] = {}  # all that were ever seen, and their numbers
        self._rows: dict[int, int] = {}  # (step, site) -> its row
        self._links, self._ratios = _Links(), _Links()
        self._sources: dict[Slot, str] = {}
        self._scales: dict[int, float | torch.Tensor] = {}
        self._unscaled: set[int] = set()
        self._skipped: dict[int, torch.Tensor] = {}
        self._linked: set[int] = set()
        self._changes: dict[int, torch.Tensor] = {}
        self.used = 0

    def _slot(self, device: torch.device) -> tuple[SlotBuffer, Slot]:
        key = str(device)
        buffer, index = self._buffers.get(key), self._next.get(key, 0)
        if buffer is None or index >= buffer.capacity:
            with torch.inference_mode(False):  # made inside inference mode, it could not be used outside
                if buffer is None:
                    buffer = self._buffers[key] = SlotBuffer(device)
                    self._devices[key] = len(self._devices)
                else:
                    buffer.grow(buffer.capacity + max(min(buffer.capacity, _CHUNK), buffer.capacity // 4))
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
    def reduce_many(self, tensors: Sequence[torch.Tensor]) -> list[Slot]:
        """`reduce` each of them: together, which is faster where they are small and many."""
        found = [self._slot(x.device)[1] for x in tensors]
        for device in dict.fromkeys(key for key, _ in found):
            chosen = [(index, x) for (key, index), x in zip(found, tensors, strict=True) if key == device]
            self._buffers[device].accumulate_many([i for i, _ in chosen], [x for _, x in chosen])
        return found

    @unseen
    def reduce_gradient(self, x: torch.Tensor) -> Slot:
        """Reduce a gradient of this process's own loss into a new slot."""
        buffer, slot = self._slot(x.device)
        multiplier = self._power / self._processes
        buffer.accumulate(slot[1], x, multiplier=multiplier)
        if multiplier != 1:  # the buffer calls that a grid of its own; as with a loss scale, say what it was
            self._sources[slot] = get_format(str(x.dtype).removeprefix("torch.")).name
        return slot

    def _key(self, step: int, site: Site) -> int:
        return step << _BITS | self._sites.setdefault(site, len(self._sites))

    def _code(self, slot: Slot) -> int:
        return self._devices[slot[0]] << _BITS | slot[1]

    def _link(self, step: int, site: Site, slot: Slot) -> int:
        """Number of the row (step, site), which `slot` counts for now."""
        key = self._key(step, site)
        row = self._rows.setdefault(key, len(self._rows))
        self._links.add(row, self._code(slot))
        self._linked.add(key & _LOW)
        return row

    def empty(self, device: torch.device) -> Slot:
        """A new slot for weights alone."""
        return self._slot(device)[1]

    @unseen
    def price(self, slot: Slot, y: torch.Tensor, g: torch.Tensor) -> None:
        """Add the gradient g = dL/dy of the values y to the slot's gradient-weighted histogram."""
        self._buffers[slot[0]].accumulate_weights(slot[1], y, g)

    def set_changes(self, step: int, site: Site, changes: torch.Tensor) -> None:
        """What rounding the tensor of the row (step, site) to each of store.CHANGES does to the loss, float64 [4]."""
        self._changes[self._key(step, site)] = changes

    @unseen
    def reduce_update(self, step: int, sites: Iterable[Site], before: torch.Tensor, after: torch.Tensor) -> None:
        """Reduce the update after - before, and its size relative to `before`, into the rows (step, sites)."""
        buffer, slot = self._slot(after.device)
        _, ratio = self._slot(after.device)
        buffer.accumulate_update(slot[1], ratio[1], before, after)
        for site in sites:
            self._ratios.add(self._link(step, site, slot), self._code(ratio))

    def link(self, step: int, site: Site, slot: Slot) -> None:
        """Let `slot` count for the row (step, site)."""
        self._link(step, site, slot)

    def link_unscaled(self, step: int, site: Site, slot: Slot) -> None:
        """Like `link`, for a gradient out of which the loss scale and the number of processes were divided already."""
        self._link(step, site, slot)
        self._unscaled.add(self._key(step, site))

    def begin_step(self) -> None:
        """A step begins: no site has been seen in it."""
        self._linked.clear()

    def has(self, site: Site) -> bool:
        """Whether `site` was seen in the running step, flushed or not."""
        return self._sites.get(site) in self._linked

    def set_scale(self, step: int, scale: float | torch.Tensor) -> None:
        """Remember the loss scale that multiplied this step's gradients (the first one told wins)."""
        self._scales.setdefault(step, scale)

    def has_scale(self, step: int) -> bool:
        """Whether this step's loss scale is known."""
        return step in self._scales

    def drop_updates_if(self, step: int, sites: Iterable[Site], flag: torch.Tensor) -> None:
        """Leave the update rows (step, sites) out where `flag` turns out to be non-zero: the optimizer did not step."""
        for site in sites:
            self._skipped[self._key(step, site)] = flag

    @unseen
    def collect(self) -> Rows:
        """All rows, on the host. They are forgotten here, so that a full disk cannot grow the memory of the run."""
        try:
            keys = np.fromiter(self._rows, np.int64, len(self._rows))
            flags = _on_host({self._rows[key]: flag.reshape(-1).float().amax(0, keepdim=True) for key, flag in
                              self._skipped.items() if key in self._rows})  # fmt: skip
            kept = np.ones(len(keys), bool)
            kept[[row for row, flag in flags.items() if flag[0]]] = False
            if not kept.any():
                return Rows(np.zeros(0, np.int64), [], StatsTable.empty(0), np.zeros(0))
            return self._read(keys[kept], np.where(kept, np.cumsum(kept) - 1, -1))
        finally:
            self._clear()

    def drain(self, writer: StatsWriter) -> int:
        """Write all rows as one part and forget them. Returns the number of rows written."""
        rows = self.collect()
        rows.write(writer)
        writer.tidy()
        return len(rows)

    def _read(self, keys: np.ndarray, place: np.ndarray) -> Rows:
        """keys: int64[S], of the rows that are wanted. place: which of them each row is, -1 for the others."""
        offsets, tables = np.zeros(len(self._devices), np.int64), []
        for device, buffer in self._buffers.items():
            offsets[self._devices[device]] = sum(len(t.zeros) for t in tables)
            tables.append(buffer.read(self._next[device], shared=True))  # what is kept of it is copied below
        everything = tables[0] if len(tables) == 1 else StatsTable.concat(tables)
        for (device, index), source in self._sources.items():
            everything.source[offsets[self._devices[device]] + index] = source
        steps, names = keys >> _BITS, list(self._sites)
        sites = [names[number] for number in (keys & _LOW).tolist()]
        scale, divisor, reduced = self._divisors(keys, sites)
        table = _rows_of(everything, *self._links.sorted(place, offsets), divisor)
        ratios = _ratios_of(everything, *self._ratios.sorted(place, offsets))
        found = _on_host(self._changes)
        at = {key: int(place[self._rows[key]]) for key in found if key in self._rows}
        changes = {row: found[key] for key, row in at.items() if row >= 0}
        self._share(table, sites)
        return Rows(steps, sites, table, scale, ratios, changes, reduced)

    def _divisors(self, keys: np.ndarray, sites: list[Site]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(loss scale, by what to divide, whether it is a gradient of all processes already), for each row."""
        roles = {role: role.is_gradient for role in Role}
        gradient = np.asarray([roles[site.role] for site in sites])
        reduced = np.isin(keys, np.fromiter(self._unscaled, np.int64, len(self._unscaled)))
        at, where = np.unique(keys >> _BITS, return_inverse=True)
        scale = np.asarray([float(self._scales.get(step, 1.0)) for step in at.tolist()])[where]
        scale = np.where(gradient & ~reduced, scale, 1.0)
        return scale, np.where(gradient & ~reduced, scale * self._power, 1.0), reduced

    def _share(self, table: StatsTable, sites: list[Site]) -> None:
        """Weights of activations are squares of gradients, W^2 times those of the mean loss. Those of parameters are of
        gradients that were averaged already."""
        if table.weights is not None and self._processes > 1:
            activations = [i for i, site in enumerate(sites) if site.role is not Role.WEIGHT]
            table.weights[activations] /= self._processes**2

    def _clear(self) -> None:
        for key, buffer in self._buffers.items():
            if self._next[key]:
                buffer.clear(self._next[key])
            self._next[key] = 0
        self._rows.clear()
        self._links, self._ratios = _Links(), _Links()
        self._sources.clear()
        self._scales.clear()
        self._unscaled.clear()
        self._skipped.clear()
        self._changes.clear()
        self.used = 0


class _Links:
    """Pairs of a row and a slot that counts for it."""

    def __init__(self) -> None:
        self._rows, self._slots = array("q"), array("q")

    def add(self, row: int, slot: int) -> None:
        self._rows.append(row)
        self._slots.append(slot)

    def sorted(self, place: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(row, slot) of each link, by row, those of one row in the order of linking: two int64 arrays. place, offsets:
        where rows, and the slots of each device, have come to lie; links of rows at -1 are left out."""
        rows = place[np.frombuffer(self._rows, np.int64)] if len(self._rows) else np.zeros(0, np.int64)
        slots = np.frombuffer(self._slots, np.int64) if len(rows) else rows
        order = np.argsort(rows, kind="stable")
        order = order[np.count_nonzero(rows < 0) :]
        return rows[order], offsets[slots[order] >> _BITS] + (slots[order] & _LOW)


def _rows_of(everything: StatsTable, rows: np.ndarray, slots: np.ndarray, divisor: np.ndarray) -> StatsTable:
    """The sums of each row's slots, divided as `unscaled` does, a few rows at a time: a large model's histograms take
    25 MB, and would be held five times over. rows, slots: see `_Links.sorted`; each row has one slot or more."""
    out = StatsTable.empty(len(divisor))
    out.counts = _returned(out.counts.shape)
    if everything.weights is not None:
        out.weights = np.empty(out.counts.shape)
    for start in range(0, len(divisor), _CHUNK):
        a, b = np.searchsorted(rows, [start, start + _CHUNK])
        table = _summed(everything, rows[a:b] - start, slots[a:b])
        table = unscaled(table, divisor[start : start + _CHUNK])
        for column in fields(StatsTable):
            if (into := getattr(out, column.name)) is not None:
                into[start : start + _CHUNK] = getattr(table, column.name)
    return out


def _summed(everything: StatsTable, owners: np.ndarray, slots: np.ndarray) -> StatsTable:
    """everything.take(slots).group(owners), where only rows of several slots need the grouping. owners ascend."""
    _, first, times = np.unique(owners, return_index=True, return_counts=True)
    table = everything.take(slots[first])
    table.source_exponent[table.count == 0] = 0
    several = np.flatnonzero(times > 1)
    if len(several):
        links = np.repeat(times > 1, times)
        keys = np.repeat(np.arange(len(several)), times[several])
        sums = everything.take(slots[links]).group(keys, len(several))
        for column in fields(StatsTable):
            if (into := getattr(table, column.name)) is not None:
                into[several] = getattr(sums, column.name)
    return table


def _ratios_of(everything: StatsTable, rows: np.ndarray, slots: np.ndarray) -> dict[int, tuple[np.ndarray, int, int]]:
    """See StatsWriter.write: the sums of the slots that tell of each row's update against what was there before."""
    if not len(rows):
        return {}
    owners, first = np.unique(rows, return_index=True)
    columns = (everything.counts, everything.zeros, everything.pos_inf)
    counts, zeros, left = (column[slots] for column in columns)
    if len(owners) < len(rows):
        counts, zeros, left = (np.add.reduceat(column, first, axis=0) for column in (counts, zeros, left))
    return dict(zip(owners.tolist(), zip(counts, zeros.tolist(), left.tolist(), strict=True), strict=True))


def _returned(shape: tuple[int, ...]) -> np.ndarray:
    """int64 zeros in pages of their own, which the system has back when they are freed. From the allocator, whose
    holes the next flush does not quite fit, a model of 10,000 sites took 20 MB more."""
    pages = mmap.mmap(-1, max(8 * math.prod(shape), 1))
    return np.frombuffer(pages, np.int64, count=math.prod(shape)).reshape(shape)


def _on_host(tensors: dict[Any, torch.Tensor]) -> dict[Any, list[float]]:
    """The elements of one-dimensional tensors of equal length: one copy from each device."""
    found: dict[Any, list[float]] = {}
    for device in {x.device for x in tensors.values()}:
        keys = [key for key, x in tensors.items() if x.device == device]
        found |= zip(keys, torch.stack([tensors[key] for key in keys]).tolist(), strict=True)
    return found


def unscaled(table: StatsTable, scale: np.ndarray) -> StatsTable:
    """Divide the loss scale out of each row: exact for powers of two. For another scale the scalars are exact and the
    histogram moves by floor(log2 scale), so that an element may be counted one binade too high. The table itself where
    there is nothing to divide by."""
    scale = np.where(np.isfinite(scale) & (scale > 0), scale, 1.0)
    if (scale == 1).all():
        return table
    mantissa, exponent = np.frexp(scale)
    shifted = table.shift(-(exponent.astype(np.int64) - 1))
    rest = 2 * mantissa
    if np.any(rest != 1):
        shifted.amax, shifted.amin_nonzero = shifted.amax / rest, shifted.amin_nonzero / rest
        shifted.sum, shifted.sumsq = shifted.sum / rest, shifted.sumsq / rest**2
    return shifted
