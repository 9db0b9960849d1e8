"""A task: what to train, on what, towards what; and where tasks come from.

    def make():                                    # my_task.py
        return ps.Task(model=net, loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), batches=loader)

    precscope train my_task.py:make                # or package.module:make, or a bundled name such as gpt
    precscope train gpt@large                      # the same as gpt --size large: make(size="large")

Loading a task yields a factory, because several runs that must start equal need the function that makes the task, not
one task: `TaskRef.make()` calls it under a fixed seed, so that the parameters start equal each time.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import bundled
from .batches import Reader, check_source, is_function, kind_of, make_reader, preserved_rng, seed_everything
from .errors import PrecscopeError, TaskError, UsageError, first_line, nearest, one_line

if TYPE_CHECKING:
    import torch
    from torch import nn

BUNDLED = {name: info.function for name, info in bundled.TASKS.items()}
"""Short names of the tasks that come with precscope, see bundled.py."""


@dataclass(kw_only=True, eq=False)
class Task:
    """What to train, on what, towards what.

    model: nn.Module. loss: (model, batch) -> scalar tensor with a gradient. batches: a list (cycled), an iterable such
    as a DataLoader (started again at each epoch), or a function step -> batch. eval_batches: held-out batches, a list
    or an iterable, or a function as above. optimizer: None (AdamW made by the trainer), an optimizer, or a callable:
    an Optimizer class, a partial of one, or a function whose first parameter is called `params` gets the model's
    parameters; any other function gets the model. forward: (model, batch) -> output, for inference; None means
    model(*batch). after_step: (model, step), called after each optimizer step, e.g. to update an EMA. name: for
    reports. seed: of the order and the augmentation of `batches` where they are an iterable. accumulate: micro-batches
    per optimizer step where a run does not say it (TrainConfig.accumulate). factory: the function
    that made the task, set by `TaskRef.make`. start_state: parameters and buffers from before `ps.profile` trained the
    model, on the CPU, for `ps.recommend`; None where it did not, or where they are more than a gigabyte.

    Raises TaskError where a part is not what it must be; batches themselves are read later, by `batch`.
    """

    model: nn.Module
    loss: Callable[[nn.Module, Any], torch.Tensor]
    batches: Any
    eval_batches: Any = None
    optimizer: Any = None
    forward: Callable[[nn.Module, Any], Any] | None = None
    after_step: Callable[[nn.Module, int], None] | None = None
    name: str = "task"
    seed: int = 0
    accumulate: int = 1
    factory: Callable[[], Task] | None = field(default=None, repr=False)
    start_state: dict[str, torch.Tensor] | None = field(default=None, init=False, repr=False)
    _reader: Reader | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        from torch import nn
        from torch.optim import Optimizer

        if not isinstance(self.model, nn.Module):
            raise TaskError(f"Task(model=...) must be a torch.nn.Module, not {kind_of(self.model)}")
        for name in ("loss", "forward", "after_step"):
            value = getattr(self, name)
            if not callable(value) and (name == "loss" or value is not None):
                signature = "(model, step)" if name == "after_step" else "(model, batch)"
                raise TaskError(f"Task({name}=...) must be a function {signature}, not {kind_of(value)}")
        if self.optimizer is not None and not isinstance(self.optimizer, Optimizer) and not callable(self.optimizer):
            raise TaskError(
                f"Task(optimizer=...) must be None, a torch optimizer or a function that makes one, "
                f"not {kind_of(self.optimizer)}"
            )
        if not isinstance(self.accumulate, int) or isinstance(self.accumulate, bool) or self.accumulate < 1:
            raise TaskError(f"Task(accumulate=...) must be an integer of at least 1, not {kind_of(self.accumulate)}")
        check_source(self.batches, "batches")
        if self.eval_batches is not None:
            check_source(self.eval_batches, "eval_batches")

    def batch(self, step: int) -> Any:
        """The batch of micro-step `step` (from 0), for every kind of `batches`.

        An iterable is read in order; its randomness (shuffling, augmentation) comes from a stream of its own, seeded
        by (seed, epoch), so that a batch depends on `step` alone and reading it leaves the global generators as they
        were. Going back restarts the epoch, so ask in ascending order where that is slow.
        Raises TaskError where the batches are empty, or a generator is used up.
        """
        if self._reader is None:
            self._reader = make_reader(self.batches, self.seed)
        return self._reader.at(step)

    def reseed(self, seed: int) -> None:
        """Order and augment `batches` by `seed` from now on, where they are an iterable."""
        if seed != self.seed:
            self.seed, self._reader = seed, None

    def evaluation(self, *, limit: int | None = None) -> Iterator[Any]:
        """The held-out batches, in order; at most `limit` (8 where eval_batches is a function, which has no end)."""
        source = self.eval_batches
        if source is None:
            return
        if is_function(source):
            yield from (source(step) for step in range(8 if limit is None else limit))
            return
        for index, batch in enumerate(source):
            if index == limit:
                return
            yield batch

    def checked_loss(
        self, batch: Any, *, needs_grad: bool = True, model: Callable[..., Any] | None = None
    ) -> torch.Tensor:
        """loss(model, batch), which must be a scalar floating tensor, attached to the graph where `needs_grad`.

        model: a wrapper of the task's model to call in its place (DDP, torch.compile); None: the model itself. Reads
        no value, hence waits for no device. Raises TaskError naming what the loss function returned instead.
        """
        import torch

        loss = self.loss(self.model if model is None else model, batch)  # type: ignore[arg-type]
        if not isinstance(loss, torch.Tensor):
            raise TaskError(f"the loss function must return a scalar tensor, not {kind_of(loss)}{_float_hint(loss)}")
        if loss.numel() != 1:
            raise TaskError(
                f"the loss function must return a scalar tensor, not one of shape {tuple(loss.shape)}: "
                "reduce it, for instance with .mean()"
            )
        if not loss.is_floating_point():
            raise TaskError(f"the loss function must return a floating-point tensor, not one of dtype {loss.dtype}")
        if needs_grad and not loss.requires_grad:
            raise TaskError(
                "the loss has no gradient: the loss function must call the model with gradients on and must not "
                "detach what it returns, and some parameter of the model must have requires_grad=True"
            )
        return loss.reshape(())

    @property
    def reference(self) -> str | None:
        """What names this task on a command line ("gpt", "file.py:make"), None where it was made by hand."""
        owner = getattr(self.factory, "__self__", None)
        return owner.name if isinstance(owner, TaskRef) else None

    def __repr__(self) -> str:
        return f"Task({self.name!r}, model={type(self.model).__name__})"


@dataclass(frozen=True)
class TaskRef:
    """A function that makes a task, and where it came from. name: as given by the user. function: the factory. size:
    its argument of this name, None where it is left to the function."""

    name: str
    function: Callable[..., Task]
    size: str | None = None

    def make(self, *, seed: int = 0) -> Task:
        """A new task, its parameters drawn under `seed` (the global generators are then given back as they were).

        A factory with a parameter `seed` receives it, so that its data can follow it too; one with a parameter `size`
        receives that where one was asked for.
        Raises TaskError where the function fails or returns something else than a Task.
        """
        with preserved_rng(cuda=True):
            seed_everything(seed)
            try:
                task = self.function(**self._arguments(seed))
            except PrecscopeError:
                raise
            except Exception as error:
                raise TaskError(f"{self.name} raised {one_line(error, limit=1000)}") from error
        if not isinstance(task, Task):
            raise TaskError(
                f"{self.name} must return a precscope.Task, not {kind_of(task)}: "
                "return ps.Task(model=..., loss=..., batches=...)"
            )
        if task.name == "task":
            task.name = self.name
        task.seed = task.seed or seed
        task.factory = self.make
        return task

    def _arguments(self, seed: int) -> dict[str, Any]:
        accepted = _parameters(self.function)
        if self.size is not None and "size" not in accepted:
            raise TaskError(
                f"{self.name}: the function takes no parameter `size`; leave out the size, or write "
                f"def {getattr(self.function, '__name__', 'make')}(size=...)"
            )
        given = {"seed": seed, "size": self.size}
        return {name: value for name, value in given.items() if name in accepted and value is not None}


def load_task(reference: str | Callable[..., Task] | TaskRef) -> TaskRef:
    """Find the function behind `module:function`, `path/to/file.py:function` or a bundled name ("gpt"), each with or
    without a size ("gpt@large").

    A function or a TaskRef is taken as it is. The module is imported, the function is not called yet.
    Raises TaskError where the file or module is missing or fails on import, or has no such function.
    """
    if isinstance(reference, TaskRef):
        return reference
    if callable(reference):
        return TaskRef(getattr(reference, "__name__", type(reference).__name__), reference)
    plain, size = split_size(reference)
    where, colon, name = BUNDLED.get(plain, plain).rpartition(":")
    if not colon or not where or not name:
        hint = nearest(plain, BUNDLED)
        raise TaskError(
            f"cannot read the task {reference!r}" + (f" (did you mean {hint}?)" if hint else "") + ": give "
            f"path/to/file.py:function, module:function, or a bundled task ({', '.join(BUNDLED)})"
        )
    module = _import_file(Path(where)) if where.endswith(".py") else _import_module(where)
    function = getattr(module, name, None)
    if function is None:
        functions = [
            n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__
        ]
        hint = nearest(name, functions) or ", ".join(functions[:5])
        raise TaskError(f"{where} has no function {name!r}" + (f"; it has {hint}" if hint else ""))
    if not callable(function):
        raise TaskError(f"{reference} is {kind_of(function)}, not a function that returns a precscope.Task")
    return TaskRef(reference, function, size)


def split_size(reference: str) -> tuple[str, str | None]:
    """("gpt", "large") of "gpt@large"; (reference, None) where it names no size. A path may hold an @ of its own."""
    before, at, size = reference.rpartition("@")
    return (before, size) if at and not set(size) & set(":/\\") else (reference, None)


def sized(reference: str, size: str | None) -> str:
    """The reference with this size, "gpt@large"; as it is where size is None.

    Raises UsageError where it names another size already.
    """
    plain, named = split_size(reference)
    if size is None:
        return reference
    if named not in (None, size):
        raise UsageError(f"{reference} names the size {named}, and --size says {size}: give one of them")
    return f"{plain}@{size}"


def make_task(reference: str | Callable[..., Task] | TaskRef, *, seed: int = 0) -> Task:
    """`load_task(reference).make(seed=seed)`: a new task whose parameters are drawn under `seed`."""
    return load_task(reference).make(seed=seed)


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        neighbours = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        hint = nearest(path.name, neighbours, count=1)
        raise TaskError(f"no file {path}" + (f" (did you mean {path.parent / hint}?)" if hint else ""))
    spec = importlib.util.spec_from_file_location(f"_precscope_task_{path.stem}", path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look modules up by name
    folder = str(path.resolve().parent)
    if folder not in sys.path:  # a task may import its neighbours, as a script may
        sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise TaskError(f"{path} raised {type(error).__name__} on import: {first_line(error)}") from error
    return module


def _import_module(name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:  # console scripts do not have the working directory
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = "" if error.name == name else f" (it imports {error.name}, which is not installed)"
        raise TaskError(
            f"cannot import the module {name!r}{missing}; for a file write path/to/{name.split('.')[-1]}.py:function"
        ) from error
    except Exception as error:
        raise TaskError(f"{name} raised {type(error).__name__} on import: {first_line(error)}") from error


def _parameters(function: Callable[..., Any]) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return set()


def _float_hint(value: Any) -> str:
    return " (drop .item())" if isinstance(value, float) else ""
