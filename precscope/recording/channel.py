"""Collectives between the processes of a launch, on the host, over connections that nobody else uses.

gloo is used directly, not as one more group of torch.distributed: closing it is no collective, other groups and their
devices are not disturbed, and a peer that dies or closes is an error here at once.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

if dist.is_available():
    from torch.distributed import ReduceOp
else:  # never reached: nothing is merged then
    ReduceOp = None  # type: ignore[assignment,misc]

_TIMEOUT = timedelta(minutes=30)  # one process may evaluate alone while the others wait


def default_store() -> dist.Store:
    """The store that torch.distributed was started with."""
    return dist.distributed_c10d._get_default_store()


class Channel:
    """Connections between the processes `ranks` (of the launch), which all make it with the same, unused `name`.

    world: how many. rank: the place of this one among them. All methods but `close` are collectives and raise
    RuntimeError where a peer is gone.
    """

    def __init__(self, name: str, ranks: list[int]) -> None:
        from torch.distributed.distributed_c10d import ProcessGroupGloo

        self.world, self.rank = len(ranks), ranks.index(dist.get_rank())
        store = dist.PrefixStore(f"{name}/channel", default_store())
        self._gloo: ProcessGroupGloo | None = ProcessGroupGloo(store, self.rank, self.world, _TIMEOUT)

    def reduce(self, values: torch.Tensor, op: ReduceOp.RedOpType) -> None:
        """all_reduce in place; `values` are contiguous, on the host, and of the same shape everywhere."""
        options = dist.AllreduceOptions()
        options.reduceOp = op
        self._open().allreduce([values], options).wait()

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Everybody's `values` [...], which have the same shape everywhere: [world, ...]."""
        everybody = [torch.empty_like(values) for _ in range(self.world)]
        self._open().allgather([everybody], [values]).wait()
        return torch.stack(everybody)

    def texts(self, text: str) -> list[str]:
        """Everybody's text."""
        own = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
        sizes = self.gather(torch.tensor([len(own)]))[:, 0].tolist()
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(own)] = own
        return [bytes(row[:n].tolist()).decode() for row, n in zip(self.gather(padded), sizes, strict=True)]

    def close(self) -> None:
        """Close the connections; whoever waits in a collective gets an error. May be called more than once."""
        self._gloo = None

    def _open(self) -> dist.ProcessGroupGloo:
        if self._gloo is None:
            raise RuntimeError("the channel is closed")
        return self._gloo
