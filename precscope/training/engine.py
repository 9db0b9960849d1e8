"""Where and how many: the processes that train together. One process is the default, and does nothing special.

    Engine               one process: everything is a no-op
    `-- Processes        several, of torch.distributed: who takes which micro-batch, means, gathered objects
        |-- Replicas     "ddp": DistributedDataParallel, every process holds the whole model
        `-- Shards       "fsdp": FSDP2 (sharding.py), every process holds a part of each parameter

W processes with `accumulate` micro-batches each train on the batches, and with the gradients, of one process with
W * accumulate; losses agree but for the order in which fp32 sums are taken. Dropout draws from a stream of its own on
each process.
"""

from __future__ import annotations

import atexit
import itertools
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from ..errors import TaskError, TrainingError, UsageError, first_line
from .optim import total_norm

if TYPE_CHECKING:
    from .precision import Precision

STRATEGIES = ("ddp", "fsdp")
PEER_GONE = 3
"""Exit status of a process that ended because another one did, so that a launcher can tell which was first."""
_joined = False  # whether this module made the process group
_alone, _asked = itertools.count(), itertools.count()  # calls of main_alone and all_did: as many on all processes
_GONE = ("closed by peer", "reset by peer", "Timed out", "timed out", "Broken pipe", "Application timeout", "NCCL")


@dataclass(frozen=True)
class Strategy:
    """How several processes train one model, where a word alone does not say it.

    name: "ddp" or "fsdp". sync_batchnorm: statistics of BatchNorm over all processes (GPUs, "ddp"). unused_parameters:
    some parameters get no gradient in some steps ("ddp"; costs a walk over the graph at each step). timeout_s: seconds
    that a collective waits for a process that neither comes nor dies. (A checkpoint may take longer: while the first
    process writes, the others wait as long as it lives.)
    """

    name: str
    sync_batchnorm: bool = False
    unused_parameters: bool = False
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if self.name not in STRATEGIES:
            raise UsageError(f"strategy must be 'ddp' or 'fsdp', or None for one process, not {self.name!r}")
        if self.name == "fsdp" and (self.sync_batchnorm or self.unused_parameters):
            raise UsageError("sync_batchnorm and unused_parameters are for strategy 'ddp': leave them out")


class Engine:
    """One process. Subclasses change what several need.

    world: processes. rank: of this one. main: whether this one writes files. notes: what a reader should know.
    """

    world, rank, main = 1, 0, True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.notes: list[str] = []

    @staticmethod
    def from_environment(strategy: str | Strategy | None, device: torch.device) -> Engine:
        """The engine for `strategy`; where it is None, "ddp" where a launcher (torchrun, precscope train --processes)
        started several processes, else one. Raises UsageError."""
        strategy = Strategy(strategy) if isinstance(strategy, str) else strategy
        if strategy is not None and not isinstance(strategy, Strategy):
            raise UsageError(f"strategy must be 'ddp', 'fsdp' or a Strategy, not {type(strategy).__name__}")
        launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        if strategy is None and (not launched or int(os.environ["WORLD_SIZE"]) <= 1):
            return Engine(device)
        if not launched and not (dist.is_available() and dist.is_initialized()):
            raise UsageError(
                f"strategy {strategy.name!r} needs processes that a launcher started: "  # type: ignore[union-attr]
                "torchrun --nproc-per-node 2 script.py, or precscope train TASK --processes 2"
            )
        strategy = strategy or Strategy("ddp")
        if strategy.name == "ddp":
            return Replicas(device, strategy)
        from .sharding import Shards

        return Shards(device, strategy)

    def wrap(self, model: nn.Module, precision: Precision, *, fixed: bool = True) -> nn.Module:
        """What the loss function calls in place of `model`, on which the plan is already; fixed: and where it stays as
        it is. To be called before the optimizer is made: parameters may be others afterwards."""
        return model

    def replanned(self, model: nn.Module) -> None:
        """Another plan is on the model since it was wrapped."""

    def check(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Raises TaskError where the optimizer does not hold the parameters of the wrapped model."""

    def micro_index(self, step: int, index: int, accumulate: int) -> int:
        """Which of the task's batches this process takes as micro-batch `index` of `step`."""
        return (step * accumulate + index) * self.world + self.rank

    def accumulating(self, model: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch; `last`: of the last one of the step."""
        return nullcontext()

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Mean over the processes."""
        return value

    def total_norm(self, grads: list[torch.Tensor]) -> torch.Tensor:
        """2-norm of all gradients together: float scalar."""
        return total_norm(grads)

    def model_state(self, model: nn.Module) -> dict[str, Any]:
        """model.state_dict(), whole."""
        return model.state_dict()

    def optimizer_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """optimizer.state_dict(), whole."""
        return optimizer.state_dict()

    def load_state(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, model_state: Any, optimizer_state: Any
    ) -> None:
        """Inverse of both."""
        model.load_state_dict(model_state)
        optimizer.load_state_dict(optimizer_state)

    def gather_objects(self, value: Any) -> list[Any]:
        """`value` of each process, by rank."""
        return [value]

    def all_did(self, done: bool) -> bool:
        """Whether `done` is true on all processes, asked where one of them may have failed alone. Raises TrainingError
        where some do not come within `timeout_s`: they wait for this one elsewhere."""
        return done

    @contextmanager
    def main_alone(self) -> Iterator[bool]:
        """Inside, the main process works alone, as long as it takes; the others wait for it when they leave. Yields
        whether this is the main one. All processes must come here."""
        yield self.main

    def close(self) -> None:
        """Take off what `wrap` hung on the model."""

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Processes(Engine):
    """Several processes. Joins their group, or makes it (gloo on the CPU, NCCL on GPUs): once for a launch, so that a
    script can train several times; it is left at the end of the script, or where training fails.

    Raises UsageError where the environment does not say who and where, TrainingError where the others do not come.
    """

    def __init__(self, device: torch.device, strategy: Strategy) -> None:
        self.strategy = strategy
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
            torch.cuda.set_device(device)
        super().__init__(device)
        if not dist.is_initialized():
            _join(device, strategy)
        self.world, self.rank = dist.get_world_size(), dist.get_rank()
        self.main = self.rank == 0
        self.notes.append(f"{self.world} processes, {strategy.name}")

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        total = value.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        return total / self.world

    def gather_objects(self, value: Any) -> list[Any]:
        everybody: list[Any] = [None] * self.world
        dist.all_gather_object(everybody, value)
        return everybody

    def all_did(self, done: bool) -> bool:
        from ..recording.channel import default_store

        store, number = default_store(), next(_asked)
        names = [f"precscope/did/{number}/{rank}" for rank in range(self.world)]
        store.set(names[self.rank], str(int(done)))
        store.delete_key(f"precscope/did/{number - 1}/{self.rank}")  # all have read it: they have taken steps since
        try:
            store.wait(names, timedelta(seconds=self.strategy.timeout_s))
        except RuntimeError as error:
            raise TrainingError(
                f"process {self.rank} of {self.world} waited {self.strategy.timeout_s:g} s for the others"
            ) from error
        return all(store.get(name) == b"1" for name in names)

    @contextmanager
    def main_alone(self) -> Iterator[bool]:
        """They wait at the store of the launch, which answers as long as the main process (or its launcher) lives, and
        not in a collective, which would give up after `timeout_s`."""
        from ..recording.channel import default_store

        name, store = f"precscope/alone/{next(_alone)}", default_store()
        if self.main:
            try:
                yield True
            finally:
                store.set(name, "done")
        else:
            yield False
            while not store.check([name]):
                time.sleep(0.01)
        dist.barrier()  # the store may end with the main process: not before all have seen it
        if self.main:
            store.delete_key(name)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if value is not None:
            _leave()
        if isinstance(value, RuntimeError) and not isinstance(value, TrainingError) and _says_gone(value):
            gone = TrainingError(
                f"process {self.rank} of {self.world} cannot go on: another one is gone, or did not come within "
                f"{self.strategy.timeout_s:g} s ({first_line(value):.160}); the launcher's report names "
                "it, and its own output says why"
            )
            gone.exit_code = PEER_GONE
            raise gone from value

    def _note_batchnorm(self, model: nn.Module) -> None:
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
            self.notes.append(
                "BatchNorm normalises each process's own micro-batch, and running statistics are those of the first "
                "process; on GPUs, Strategy('ddp', sync_batchnorm=True) takes all processes together"
            )


class Replicas(Processes):
    """DistributedDataParallel: the model on every process, gradients averaged in the backward of a step's last
    micro-batch."""

    _checked = False

    def wrap(self, model: nn.Module, precision: Precision, *, fixed: bool = True) -> nn.Module:
        if self.strategy.sync_batchnorm:
            if self.device.type != "cuda":
                raise UsageError(f"sync_batchnorm needs GPUs, and this run is on {self.device.type}: leave it out")
            _sync_batchnorm(model)
        else:
            self._note_batchnorm(model)
        ids = [self.device.index] if self.device.type == "cuda" else None
        return Wrapped(model, device_ids=ids, find_unused_parameters=self.strategy.unused_parameters)

    @contextmanager
    def accumulating(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        ddp = getattr(model, "_orig_mod", model)
        with nullcontext() if last else ddp.no_sync():
            if self._checked or ddp is not model:  # a compiled one is not looked at
                yield
                return
            calls: list[nn.Module] = []
            handle = ddp.register_forward_pre_hook(lambda module, args: calls.append(module))
            try:
                yield
            finally:
                handle.remove()
        self._checked = True
        if not calls:
            raise TaskError(
                "the loss function did not call the model that it was given, model(...), but a part or a method of "
                "it: under strategy 'ddp' such gradients would not be averaged over the processes"
            )


class Wrapped(nn.parallel.DistributedDataParallel):
    """DistributedDataParallel that shows the attributes of the model in it: a loss function may read its config."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "module" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self._modules["module"], name)


def _sync_batchnorm(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(module, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))


def _join(device: torch.device, strategy: Strategy) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UsageError(
            f"the environment lacks {', '.join(missing)}: start the processes with torchrun --nproc-per-node N, or "
            "precscope train TASK --processes N"
        )
    global _joined
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=strategy.timeout_s))
        _joined = True
        atexit.register(_leave)
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise TrainingError(
            f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} found no others at {address} within "
            f"{strategy.timeout_s:g} s ({first_line(error):.120}): have all been started?"
        ) from error


def _leave() -> None:
    """Close connections, where this module made the group."""
    global _joined
    if _joined and dist.is_initialized():
        dist.destroy_process_group()
    _joined = False


def _says_gone(error: BaseException) -> bool:
    return any(word in str(error) for word in _GONE)
