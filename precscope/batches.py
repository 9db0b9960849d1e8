"""Batches by step number, whatever they come from, and the random streams behind them.

A list is cycled, a function is called with the step, an iterable (a DataLoader) is started again at each epoch. An
iterable's randomness, the order and the augmentation alike, comes from a stream of its own, seeded by (seed, epoch): a
batch depends on its number alone. That is what makes a resumed run read exactly what it would have read, and a twin
run with another model (another number of dropout draws) read the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .errors import TaskError


class _ListReader:
    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def at(self, step: int) -> Any:
        return self.batches[step % len(self.batches)]


class _FunctionReader:
    def __init__(self, function: Callable[[int], Any]) -> None:
        self.function = function

    def at(self, step: int) -> Any:
        return self.function(step)


class _IterableReader:
    """Reads any iterable by step number, with a random stream of its own (see Task.batch)."""

    def __init__(self, iterable: Iterable[Any], seed: int) -> None:
        self.iterable, self.seed = iterable, seed
        self.one_pass = hasattr(iterable, "__next__")  # an iterator; iter() of a loader would draw a seed
        self.epoch, self.position = -1, -1  # epoch being read, global number of the batch last read
        self.last: Any = None
        self.iterator: Iterator[Any] = iter(())
        self.states: RandomStates | None = None

    def at(self, step: int) -> Any:
        if step < self.position or self.epoch < 0:
            self._start_before(step)
        while self.position < step:
            self._advance()
        return self.last

    def _start_before(self, step: int) -> None:
        """Open the latest epoch known to begin at or before `step`: one that `len` allows to skip to, or the first."""
        if self.one_pass and self.position >= 0:
            raise TaskError(
                f"batches is a generator, which cannot go back to batch {step}: give a list, a loader, or a function "
                "step -> batch"
            )
        try:
            length = len(self.iterable)  # type: ignore[arg-type]
        except TypeError:
            length = 0
        epoch = step // length if length else 0
        self.position = epoch * length - 1
        self._open(epoch)

    def _open(self, epoch: int) -> None:
        self.epoch = epoch
        set_epoch = getattr(getattr(self.iterable, "sampler", None), "set_epoch", None)
        if set_epoch is not None:  # DistributedSampler's order depends on it
            set_epoch(epoch)
        with preserved_rng():
            seed_everything(self.seed * 1_000_003 + epoch, cuda=False)
            self.iterator = iter(self.iterable)
            self.states = RandomStates.take()

    def _advance(self) -> None:
        empty_epochs = 0
        while True:
            with preserved_rng():
                assert self.states is not None
                self.states.put_back()
                try:
                    self.last = next(self.iterator)
                    self.position += 1
                    self.states = RandomStates.take()
                    return
                except StopIteration:
                    pass
            empty_epochs += 1
            self._raise_if_exhausted(empty_epochs)
            self._open(self.epoch + 1)

    def _raise_if_exhausted(self, empty_epochs: int) -> None:
        if self.position < 0 or empty_epochs > 1:
            raise TaskError("batches is empty: the iterable gave no batch; is the data set shorter than one batch?")
        if self.one_pass:
            raise TaskError(
                f"batches is a generator and ran out after {self.position + 1} batches; it cannot be started again: "
                "give a list, a loader, or a function step -> batch"
            )


Reader = _ListReader | _FunctionReader | _IterableReader


def make_reader(batches: Any, seed: int) -> Reader:
    if is_function(batches):
        return _FunctionReader(batches)
    if is_sequence(batches):
        return _ListReader(batches)
    return _IterableReader(batches, seed)


def is_function(source: Any) -> bool:
    return callable(source) and not hasattr(source, "__iter__") and not hasattr(source, "__getitem__")


def is_sequence(source: Any) -> bool:
    from torch.utils.data import DataLoader

    return hasattr(source, "__getitem__") and hasattr(source, "__len__") and not isinstance(source, DataLoader)


def check_source(source: Any, name: str) -> None:
    import torch

    allowed = "a list of batches, an iterable such as a DataLoader, or a function step -> batch"
    if isinstance(source, torch.Tensor | Mapping | str | bytes) or not (
        is_function(source) or is_sequence(source) or hasattr(source, "__iter__")
    ):
        raise TaskError(f"Task({name}=...) must be {allowed}, not {kind_of(source)}")
    if hasattr(source, "__len__") and len(source) == 0:
        raise TaskError(f"Task({name}=...) is empty; give {allowed}")


@dataclass(frozen=True)
class RandomStates:
    """The states of the global generators of torch (CPU; CUDA where asked), numpy and random."""

    torch: Any
    numpy: Any
    python: Any
    cuda: list[Any]

    @classmethod
    def take(cls, *, cuda: bool = False) -> RandomStates:
        import random

        import numpy as np
        import torch

        with_cuda = cuda and torch.cuda.is_initialized()
        states = torch.cuda.get_rng_state_all() if with_cuda else []
        return cls(torch.get_rng_state(), np.random.get_state(), random.getstate(), states)

    def put_back(self) -> None:
        import random

        import numpy as np
        import torch

        torch.set_rng_state(self.torch)
        np.random.set_state(self.numpy)
        random.setstate(self.python)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


@contextmanager
def preserved_rng(*, cuda: bool = False) -> Iterator[None]:
    """Give the global generators of torch, numpy and random back as they were, whatever happens inside.

    cuda: also those of the CUDA devices, which costs a copy from each device.
    """
    states = RandomStates.take(cuda=cuda)
    try:
        yield
    finally:
        states.put_back()


def seed_everything(seed: int, *, cuda: bool = True) -> None:
    """Seed the global generators of torch (of all devices, or with cuda=False the CPU's alone), numpy and random."""
    import random

    import numpy as np
    import torch

    if cuda:
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def kind_of(value: Any) -> str:
    """What `value` is, for a message: its type, and the value itself where it is short."""
    if value is None:
        return "None"
    return f"{type(value).__name__} {value!r:.40}" if isinstance(value, str | int | float) else type(value).__name__


def copy_containers(batch: Any) -> Any:
    """The same tensors in new dicts, lists and tuples: a loss function may pop its labels out of a batch."""
    from torch.utils._pytree import tree_map

    return tree_map(lambda leaf: leaf, batch)
