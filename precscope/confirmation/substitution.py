"""Running chosen modules in a low format while everything else is fp32: the what-if.

A module is low or high. A low one runs under autocast of the format (policy "autocast") or with its inputs, parameters
and buffers in it ("cast"); a high one runs with autocast off. At each boundary tensors take the dtype that the receiver
would have met had *everything* been low, so that one module's own harm shows and nobody else's:

    into a low module       the dtypes that the same call received in the all-low run (remembered by a first pass)
    out into a low caller   the dtype that the same call returned in the all-low run
    into or out to a high   fp32

All modules low is then plain autocast (or .half()) of the model; none low is plain fp32. Unlike `apply` this is for
asking, not for training: it replays dtypes by call, and costs Python at each call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ..applying.devices import device_type
from ..applying.dtypes import BATCHNORM, DTYPES
from ..applying.inputs import map_tensors
from ..recording.watcher import watched_modules

_LOW = (torch.float16, torch.bfloat16)
Memory = dict[tuple[str, str, int], list[torch.dtype]]
"""("in" or "out", module, call) -> dtypes of its floating tensors in the all-low run."""


class Substitution:
    """Puts `low` modules (names) of `model` into `fmt` while entered.

    memory: what an all-low pass remembered; where None this pass is that one: `low` must then be every module, and
    `memory` holds it afterwards. outside_low: whether the code around the model (the loss) is low too.
    """

    def __init__(
        self,
        model: nn.Module,
        fmt: str,
        low: Collection[str],
        *,
        policy: str,
        memory: Memory | None = None,
        outside_low: bool = False,
    ) -> None:
        self.model, self.policy, self.dtype = model, policy, DTYPES[fmt]
        self.low = frozenset(low)
        self.remembering = memory is None
        self.memory: Memory = {} if memory is None else memory
        self.calls: dict[str, int] = {}
        self._stack = [outside_low]
        self._previous: list[tuple[nn.Module, Any]] = []

    def __enter__(self) -> Substitution:
        for module, name in watched_modules(self.model).items():
            self._previous.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = self._replacement(module, name, module.forward)
        return self

    def __exit__(self, *exception: object) -> None:
        for module, forward in self._previous:
            del module.__dict__["forward"]
            if forward is not None:
                module.__dict__["forward"] = forward
        self._previous.clear()

    def _replacement(self, module: nn.Module, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            call = self.calls.get(name, 0)
            self.calls[name] = call + 1
            low, caller_low = name in self.low, self._stack[-1]
            args, kwargs = self._enter((args, kwargs), name, call, low)
            device = device_type(module, args, kwargs)
            self._stack.append(low)
            try:
                with self._autocast(device, low), self._tensors(module, low):
                    output = forward(*args, **kwargs)
            finally:
                self._stack.pop()
            return self._leave(output, name, call, caller_low)

        return run

    def _autocast(self, device: str, low: bool) -> Any:
        if low and self.policy == "autocast":
            return torch.autocast(device, dtype=self.dtype)
        return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()

    def _enter(self, value: Any, name: str, call: int, low: bool) -> Any:
        if not low:
            return map_tensors(value, _up)
        if self.policy == "cast":
            return map_tensors(value, self._down)
        return self._replayed(value, ("in", name, call))

    def _leave(self, output: Any, name: str, call: int, caller_low: bool) -> Any:
        if self.remembering:
            return self._replayed(output, ("out", name, call))
        if not caller_low:
            return map_tensors(output, _up)
        return map_tensors(output, self._down) if self.policy == "cast" else self._replayed(
            output, ("out", name, call)
        )  # fmt: skip

    def _replayed(self, value: Any, key: tuple[str, str, int]) -> Any:
        """Remember the dtypes of `value`, or give it the remembered ones where these are low."""
        if self.remembering:
            seen: list[torch.dtype] = []

            def note(x: torch.Tensor) -> torch.Tensor:
                seen.append(x.dtype)
                return x

            map_tensors(value, note)
            self.memory[key] = seen
            return value
        known: Iterator[torch.dtype] = iter(self.memory.get(key, ()))

        def give(x: torch.Tensor) -> torch.Tensor:
            dtype = next(known, x.dtype)
            return x.to(dtype) if x.is_floating_point() and dtype in _LOW else x

        return map_tensors(value, give)

    def _down(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.dtype) if x.is_floating_point() else x

    @contextmanager
    def _tensors(self, module: nn.Module, low: bool) -> Iterator[None]:
        """Under "cast": the module's own parameters and buffers in the format, gradients leading back to the stored
        ones; what the forward writes to a buffer (running statistics) is brought back."""
        if not low or self.policy != "cast":
            yield
            return
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        stored = [
            (table, key, t)
            for table in tables
            for key, t in table.items()
            if t is not None and t.dtype is torch.float32
        ]
        try:
            for table, key, tensor in stored:
                table[key] = tensor.to(self.dtype)
            _refresh(module)
            yield
        finally:
            for table, key, tensor in stored:
                if table is module._buffers and isinstance(module, BATCHNORM) and module.training:
                    tensor.data.copy_(table[key])
                table[key] = tensor
            _refresh(module)


def _refresh(module: nn.Module) -> None:
    """Recurrent modules keep a second list of their weights."""
    if isinstance(module, nn.RNNBase):
        module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]


def _up(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in _LOW else x
