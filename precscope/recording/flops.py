"""FLOPs of one forward pass per module, children not counted, by torch's own counter.

The counter's total is read when a module is entered and left. torch's attribution by name is not used: it knows a
module under its wrapper's name (torch.compile, DDP) and a shared one under its last parent's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..attribution import unwrap
from ..preservation import eager, preserved
from .watcher import watched_modules


def count_flops(model: nn.Module, run: Callable[[], Any]) -> dict[str, int]:
    """FLOPs (2 per multiply-add) of the matrix products, convolutions and attention that `run()` does inside each
    watched module of `model` (what torch.compile and DDP wrap), under the names that a recorder gives them.

    `run()` has gradients on, for a loss that takes one itself; what it returns is dropped. Buffers, gradients, modes
    and RNG are left as they were, hooks are taken off after exceptions too, which pass through.
    """
    model = unwrap(model)
    with preserved(model), eager(), torch.enable_grad():
        with _Counter(display=False, custom_mapping=_extra()) as counter, _Meter(model, counter) as meter:
            run()
    return meter.own


class _OneScope:
    """In place of torch's ModuleTracker: everything belongs to the whole."""

    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self, *exception: object) -> None: ...


class _Counter(FlopCounterMode):
    """Totals alone. torch's ModuleTracker uses global hooks, which torch.compile warns of, and hooks on gradients,
    under which autograd.grad inside a loss raises."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.mod_tracker = _OneScope()  # type: ignore[assignment]


class _Meter:
    """Hooks that charge each module with what the counter gained during its calls, less what modules below it took.

    own: FLOPs by module name.
    """

    def __init__(self, model: nn.Module, counter: FlopCounterMode) -> None:
        self.names = watched_modules(model)
        self.own = dict.fromkeys(self.names.values(), 0)
        self._counter = counter
        self._stack: list[list[Any]] = []  # of [name, total at entry, FLOPs of the modules below]
        self._handles: list[Any] = []

    def __enter__(self) -> _Meter:
        for module in self.names:
            self._handles.append(module.register_forward_pre_hook(self._before))
            self._handles.append(module.register_forward_hook(self._after, always_call=True))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, module: nn.Module, args: Any) -> None:
        if not _recomputing():
            self._stack.append([self.names[module], self._counter.get_total_flops(), 0])

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if _recomputing():
            return
        while self._stack:  # calls below us that were left by an exception may have left their entries
            name, start, below = self._stack.pop()
            if name == self.names[module]:
                spent = self._counter.get_total_flops() - start
                self.own[name] += spent - below
                if self._stack:
                    self._stack[-1][2] += spent
                return


def _recomputing() -> bool:
    """Whether this call repeats one for a backward pass (activation checkpointing)."""
    return torch._C._current_graph_task_id() != -1


def _extra() -> dict[Any, Any]:
    """Attention on the CPU, which torch's counter does not know: 4 b h q k d."""

    def attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        b, h, q, d = query
        return 2 * b * h * q * key[2] * (d + value[3])

    op = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    return {op: attention} if op is not None else {}
