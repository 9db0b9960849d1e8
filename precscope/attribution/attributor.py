"""The hooks on modules, and the arithmetic of node numbers: see the package."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn

from ..errors import ModelError
from ..preservation import ForcedEager
from .lines import Line, text_of, user_line

_MOST = 1 << 18  # boundaries and lines kept per thread: beyond, the older half is forgotten


@dataclass(frozen=True)
class Where:
    """Who runs an op.

    module: FQN, "" for the root. call: the how-manieth call of that module in this pass, from 0. phase: what the op is
    part of. node: in backward the name of the autograd node, such as "PowBackward0". inside: False where no module
    runs (the loss function, the optimizer) or the node was made by none. recompute: a forward op that activation
    checkpointing runs once more, inside backward.
    """

    module: str
    call: int
    phase: Literal["forward", "backward"]
    node: str = ""
    inside: bool = True
    recompute: bool = False


_OUTSIDE = Where("", 0, "forward", inside=False)


@dataclass
class _Frame:
    """A module call that runs. task: of the backward inside which it began, -1 for none."""

    where: Where
    task: int


@dataclass
class _Thread:
    """What one thread did. Sequence numbers are counted per thread.

    starts, owners: from the node number starts[i] on, nodes belong to owners[i]. lines: node number -> line. tasks: the
    backward passes inside which it ran modules, of those that may still run. seen: number of the next node when it was
    last looked at.
    """

    stack: list[_Frame] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    owners: list[Where] = field(default_factory=list)
    lines: dict[int, Line] = field(default_factory=dict)
    tasks: set[int] = field(default_factory=set)
    seen: int = 0

    def note(self, where: Where, *, since: int | None = None) -> None:
        """Nodes made from now on, or from number `since` on, belong to `where`."""
        self.seen = torch._C._autograd._get_sequence_nr()
        number = self.seen if since is None else since
        if self.starts and self.starts[-1] >= number:
            self.owners[-1] = where
            return
        self.starts.append(number)
        self.owners.append(where)
        if len(self.starts) > _MOST:
            del self.starts[: _MOST // 2], self.owners[: _MOST // 2]

    def owner_of(self, number: int) -> Where:
        index = bisect_right(self.starts, number) - 1
        return self.owners[index] if index >= 0 else _OUTSIDE

    def note_line(self, line: Line | None) -> None:
        number = torch._C._autograd._get_sequence_nr() - 1
        if line is not None and number not in self.lines:
            self.lines[number] = line
            if len(self.lines) > _MOST:
                for old in list(self.lines)[: _MOST // 2]:
                    del self.lines[old]


class Attribution:
    """Says who runs the op that is being dispatched; see the module's docstring.

    model: hooked while inside the `with` block; compiled code runs eagerly there. A module with several names goes by
    its first; copies and replicas of the model are not followed. lines: also keep the line of the user's code of each
    forward op (a few microseconds per op), so that `line` can name it in backward.

    A pass begins whenever the root is called from outside every module; calls are counted from 0 anew. Where the root
    is never called, `new_pass` does it. Raises ModelError where `model` is no module.
    """

    def __init__(self, model: nn.Module, *, lines: bool = False) -> None:
        self.model = unwrap(model)
        self.names = {module: name for name, module in self.model.named_modules()}
        self.passes = 0
        self.latest: Where | None = None  # who ran last: a module that was entered, or who ran an op
        self._lines = lines
        self._owners: dict[int, str] = {}
        self._handles: list[Any] = []
        self._eager = ForcedEager()
        self._forget()

    def __enter__(self) -> Attribution:
        self._forget()
        self._eager.hold()
        self._owners = {
            id(p): name for module, name in reversed(self.names.items()) for p in module.parameters(recurse=False)
        }
        before, after = self._hooks()
        for module in self.names:
            if isinstance(module, torch.jit.ScriptModule):
                continue
            self._handles.append(module.register_forward_pre_hook(before, prepend=True))
            self._handles.append(module.register_forward_hook(after, always_call=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._eager.release()

    def where(self) -> Where:
        """Who runs the op that is being dispatched: to be called inside __torch_dispatch__."""
        self.latest = self._where()
        return self.latest

    def _where(self) -> Where:
        task = torch._C._current_graph_task_id()
        thread = self._thread()
        top = thread.stack[-1] if thread.stack else None
        if task == -1 or (top is not None and top.task == task):
            if self._lines:
                thread.note_line(user_line())
            thread.seen = torch._C._autograd._get_sequence_nr()
            return _OUTSIDE if top is None else top.where
        node = torch._C._current_autograd_node()
        if node is None:
            return Where("", 0, "backward", inside=False)
        owner = self._owner(node, thread, task)
        if _recomputing():
            again = replace(owner, phase="forward", recompute=True)
            if self._lines:
                thread.note_line(user_line())
            if torch._C._autograd._get_sequence_nr() > thread.seen:
                thread.note(again, since=thread.seen)
            return again
        return replace(owner, phase="backward", node=_name(node), recompute=False)

    def line(self) -> str | None:
        """The user's Python line that runs, "file.py:123 in forward: y = x**2"; frames of torch, of the standard
        library and of precscope are skipped. In backward that of the forward op, or of a custom backward's own code.

        None where there is none, and always where lines=False.
        """
        if not self._lines:
            return None
        found = user_line()
        task = torch._C._current_graph_task_id()
        if found is None and task != -1:
            node = torch._C._current_autograd_node()
            if node is not None:
                found = self._made_by(self._thread(), task).lines.get(node._sequence_nr())
        return text_of(found) if found is not None else None

    def owner(self, parameter: torch.Tensor) -> str | None:
        """FQN of the module that owns `parameter`, the first where several do; None where it is no parameter."""
        return self._owners.get(id(parameter))

    def new_pass(self) -> None:
        """Count calls from 0 again. Nodes of earlier passes stay known."""
        self._counts.clear()
        self._recomputed.clear()
        self.passes += 1

    # internals

    def _forget(self) -> None:
        self._threads: dict[int, _Thread] = {}
        self._home: _Thread | None = None  # the thread that runs the forward pass
        self._counts: Counter[str] = Counter()
        self._recomputed: Counter[str] = Counter()
        self.latest = None

    def _thread(self) -> _Thread:
        key = threading.get_ident()
        found = self._threads.get(key)
        if found is None:
            found = self._threads[key] = _Thread()
        return found

    def _hooks(self) -> tuple[Any, Any]:
        """Plain functions: copy.deepcopy of a hooked model keeps them as they are, bound methods would be copied."""
        return (
            lambda module, args: self._before(module),
            lambda module, args, output: self._after(module),
        )

    def _before(self, module: nn.Module) -> None:
        name = self.names.get(module)
        if name is None:
            return
        task, thread = torch._C._current_graph_task_id(), self._thread()
        recompute = task != -1
        if recompute:
            thread.tasks.add(task)
        elif module is self.model and not thread.stack:
            self.new_pass()
        if not recompute:
            self._home = self._home or thread
            for other in self._threads.values():
                other.tasks.clear()  # a forward pass: those backward passes are over
        where = self.latest = Where(name, self._call(name, recompute), "forward", recompute=recompute)
        thread.stack.append(_Frame(where, task))
        thread.note(where)

    def _after(self, module: nn.Module) -> None:
        name, thread = self.names.get(module), self._thread()
        if name is None or not any(frame.where.module == name for frame in thread.stack):
            return
        while thread.stack.pop().where.module != name:
            pass  # a call that raised, and whose own hook did not run
        thread.note(thread.stack[-1].where if thread.stack else self._below(thread))

    def _below(self, thread: _Thread) -> Where:
        """Who runs when no module does: nobody, or in backward the function that is being recomputed."""
        task = torch._C._current_graph_task_id()
        node = torch._C._current_autograd_node() if task != -1 else None
        return _OUTSIDE if node is None else self._owner(node, thread, task)

    def _call(self, name: str, recompute: bool) -> int:
        """Which call of the module in this pass this is. Checkpointed parts are recomputed from the last to the first:
        they count down, which is right where each part calls the module once."""
        if recompute:
            self._recomputed[name] += 1
            return max(self._counts[name] - self._recomputed[name], 0)
        self._counts[name] += 1
        return self._counts[name] - 1

    def _owner(self, node: Any, thread: _Thread, task: int) -> Where:
        if _name(node) == "AccumulateGrad":  # it has no number; it belongs to its parameter
            name = self._owners.get(id(node.variable))
            return _OUTSIDE if name is None else Where(name, 0, "backward")
        return self._made_by(thread, task).owner_of(node._sequence_nr())

    def _made_by(self, thread: _Thread, task: int) -> _Thread:
        """The thread that numbered the nodes which backward `task` runs in `thread`.

        On the CPU backward runs in the calling thread. On a GPU it runs in the device's, and nodes made there are those
        of a reentrant checkpoint, recomputed within an earlier task and run by a task of their own.
        """
        nested = any(other < task for other in thread.tasks)
        return thread if nested or self._home is None else self._home


def unwrap(model: nn.Module) -> nn.Module:
    """The module under torch.compile, DistributedDataParallel, DataParallel and Fabric. Raises ModelError for anything
    else."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(getattr(model, "_forward_module", None), nn.Module) and hasattr(model, "_original_module"):
            model = model._forward_module  # type: ignore[assignment]  # of Lightning Fabric
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


def _name(node: Any) -> str:
    return node.name().rpartition("::")[2]


def _recomputing() -> bool:
    """Inside backward, whether ops are recorded for autograd although no second derivative is wanted: then a
    checkpointed function runs once more, here a part of it that is in no module."""
    return torch.is_grad_enabled() and not torch._C._autograd._get_current_graph_task_keep_graph()
