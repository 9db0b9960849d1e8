"""Statistics of all processes as those of one: merged by all_reduce at each flush, written by the first process.

Counts and sums add up, extremes are kept, and what every process holds alike is counted once:

    data          inputs, outputs and gradients of a process's own share of the batch: summed
    replicated    weights, updates and optimizer state under DDP: those of the first process that has them
    sharded       the same under FSDP2: summed over the shards, replicas of a shard left out

A gradient that only some processes computed (an expert that got no token elsewhere) is theirs: where it is data on one
process, what the others find in .grad, the average, is left out.

The processes talk over a gloo group of their own, on the host: statistics are there when they are flushed, and a peer
that dies closes its connections, which is an error at once and not at a timeout. After an error no process enters a
collective again: each writes what it has left into its own directory, and readers add the directories up.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import first_line
from ..sites import Role, Site
from .channel import Channel, ReduceOp
from .observations import Rows
from .packing import Key, pack, unpack
from .wholestep import DERIVED, sample

_ELSEWHERE, _REPLICATED, _SHARDED, _DATA = range(4)
_OWNED = (Role.WEIGHT, Role.UPDATE, Role.STATE)


class Alone:
    """One process: nothing to agree on, nothing to merge.

    world: processes whose rows are one run's. rank: of this one. merging: whether collectives may be entered.
    """

    world, rank, merging = 1, 0, False

    @property
    def writes(self) -> bool:
        """Whether this process writes the run directory."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether it is set on any process."""
        return flag

    def merge(self, rows: Rows) -> Rows | None:
        """The rows of all processes on the one that writes, None on the others. Once `merging` is over: this one's."""
        return rows

    def total(self, values: torch.Tensor, sites: list[Site]) -> torch.Tensor:
        """Sums over the elements of tensors, float64 [n, ...], a row per site: those of shards are summed over the
        processes, others are equal on all of them already."""
        return values

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over the processes."""
        return values

    def leave(self) -> None:
        """Merge no more."""


class Together(Alone):
    """The processes of a group, which all record the same run.

    model: tells which parameters are shards. channel: to the others.
    """

    merging = True

    def __init__(self, model: nn.Module, channel: Channel) -> None:
        self._channel = channel
        self.world, self.rank = channel.world, channel.rank
        self._shards = _shards(model)

    def any(self, flag: bool) -> bool:
        word = torch.tensor([flag], dtype=torch.int32)
        if self.merging and self._try(lambda: self._channel.reduce(word, ReduceOp.MAX)):
            return bool(word[0])
        return flag

    def merge(self, rows: Rows) -> Rows | None:
        if self.merging:
            found: list[Rows | None] = []
            if self._try(lambda: found.append(self._merged(rows))):
                return found[0]
        return self._own(rows)

    def total(self, values: torch.Tensor, sites: list[Site]) -> torch.Tensor:
        places = [(s.module, s.tensor.partition(".")[0]) for s in sites]
        shards = [place in self._shards for place in places]
        summed: list[torch.Tensor] = []

        def add() -> None:
            if not self._same(repr(sites)) or not sites:
                return  # other sites elsewhere: there is no row to add to
            parts = values.detach().double().cpu().clone()
            parts[[shard and self._shards[place] is None for shard, place in zip(shards, places, strict=True)]] = 0.0
            self._channel.reduce(parts, ReduceOp.SUM)
            summed.append(torch.where(torch.tensor(shards)[:, None], parts, values))

        if self.merging and any(shards):
            self._try(add)
        return summed[0] if summed else values

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        total = values.detach().double().cpu().clone()
        if self.merging and self._try(lambda: self._channel.reduce(total, ReduceOp.SUM)):
            return total / self.world
        return values

    def leave(self) -> None:
        self.merging = False
        self._channel.close()

    # internals

    def _try(self, collective: Callable[[], Any]) -> bool:
        """Whether `collective` went through. Where a peer is gone: warn, and merge no more."""
        try:
            collective()
        except RuntimeError as error:
            self.leave()
            warnings.warn(
                f"precscope merges statistics no more, another process is gone ({first_line(error):.160}): process "
                f"{self.rank} writes its own, and loading the run adds them up",
                RuntimeWarning,
                stacklevel=5,
            )
            return False
        return True

    def _same(self, text: str) -> bool:
        """Whether it is the same on all processes."""
        digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
        return len(self._channel.gather(digest).unique(dim=0)) == 1

    def _merged(self, rows: Rows) -> Rows | None:
        keys, index = self._common_keys(rows)
        if not keys:
            return None
        priced = bool(self._channel.gather(torch.tensor([rows.table.weights is not None])).any())
        counted, unseen = self._counted(rows, index, len(keys))
        dense = pack(rows, index, counted, keys, priced=priced)
        dense.add_zeros({i: self._samples(keys[i][1]) for i in unseen})
        for part in dense.to_sum():
            self._channel.reduce(part, ReduceOp.SUM)
        self._channel.reduce(dense.tops, ReduceOp.MAX)
        return unpack(dense, keys, priced=priced) if self.writes else None

    def _common_keys(self, rows: Rows) -> tuple[list[Key], np.ndarray]:
        """All processes' (step, site) in one order, and where this process's rows are among them."""
        own = rows.keys
        if self._same(repr(own)):
            return own, np.arange(len(own))
        texts = self._channel.texts(json.dumps(own))
        everybody = ((step, Site(m, Role(r), c, t)) for text in texts for step, (m, r, c, t) in json.loads(text))
        place = {key: i for i, key in enumerate(dict.fromkeys(everybody))}
        return list(place), np.asarray([place[key] for key in own], np.int64)

    def _samples(self, site: Site) -> int:
        """Elements of this process's shard that a left-out row (wholestep.py: one of zeros alone) stands for."""
        shard = self._shards.get((site.module, site.tensor.partition(".")[0]))
        return shard or 0 if site.role is Role.STATE and site.call == DERIVED else 0

    def _counted(self, rows: Rows, index: np.ndarray, n: int) -> tuple[np.ndarray, list[int]]:
        """Which rows of the common order this process contributes to, bool[n], and which are of shards and it lacks."""
        codes = torch.zeros(n, dtype=torch.uint8)
        codes[torch.from_numpy(index)] = torch.tensor(
            [self._code(rows, i) for i in range(len(rows))], dtype=torch.uint8
        )
        table = self._channel.gather(codes).numpy()
        top = table.max(0)
        first = (table == top).argmax(0) == self.rank
        mine = (codes.numpy() == top) & (top != _ELSEWHERE)
        lacking = np.setdiff1d(np.flatnonzero(top == _SHARDED), index).tolist()
        return mine & (first | (top != _REPLICATED)), lacking

    def _code(self, rows: Rows, i: int) -> int:
        site = rows.sites[i]
        if site.role not in _OWNED and not rows.reduced[i]:
            return _DATA
        place = (site.module, site.tensor.partition(".")[0])
        if place not in self._shards:
            return _REPLICATED
        return _ELSEWHERE if self._shards[place] is None else _SHARDED

    def _own(self, rows: Rows) -> Rows:
        """What this process adds where rows are not merged: what all hold alike is the first one's."""
        wanted = (_SHARDED, _DATA) if self.rank else (_SHARDED, _DATA, _REPLICATED)
        return rows.take(np.asarray([i for i in range(len(rows)) if self._code(rows, i) in wanted], np.int64))


def _shards(model: nn.Module) -> dict[tuple[str, str], int | None]:
    """(module, its own tensor) of distributed tensors -> elements of this process's shard that samples have; None where
    the shard does not count: where the mesh also replicates, the first replica does."""
    found = {}
    for name, module in model.named_modules():
        for local, tensor in [*module._parameters.items(), *module._buffers.items()]:
            placements = getattr(tensor, "placements", None)
            if placements is not None and tensor is not None:
                coordinate = tensor.device_mesh.get_coordinate()  # type: ignore[union-attr]
                replica = coordinate is None or any(
                    place.is_replicate() and at for place, at in zip(placements, coordinate, strict=True)
                )
                found[name, local] = None if replica else sample(tensor._local_tensor).numel()
    return found
