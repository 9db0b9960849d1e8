"""What a plan makes of dtypes in one pass: casts, outputs, and where a loss appears."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..recording.tensors import named_tensors
from ..recording.watcher import watched_modules

_LOW = (torch.bfloat16, torch.float16)
_SHORT = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass
class Seen:
    """casts: elements of floating tensors copied into another dtype, forward and backward. outputs: module -> formats
    of its floating outputs. scalars: modules that return a low single number. low_loss: the loss came in 16 bits."""

    casts: int = 0
    outputs: dict[str, set[str]] = field(default_factory=dict)
    scalars: set[str] = field(default_factory=set)
    low_loss: bool = False

    def innermost_scalars(self) -> set[str]:
        """Of `scalars`, those in which no other one lies: where the number is made."""
        return {a for a in self.scalars if not any(b != a and (not a or b.startswith(a + ".")) for b in self.scalars)}


class Watch(TorchDispatchMode):
    """Fills `seen` while entered."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.seen = Seen()
        self._model = model
        self._handles: list[Any] = []

    def __enter__(self) -> Watch:
        for module, name in watched_modules(self._model).items():
            self._handles.append(module.register_forward_hook(self._hook(name)))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Any:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            floating = [t for _, t in named_tensors(output) if t.is_floating_point()]
            self.seen.outputs.setdefault(name, set()).update(_SHORT.get(t.dtype, str(t.dtype)) for t in floating)
            if any(not t.dim() and t.dtype in _LOW for t in floating):
                self.seen.scalars.add(name)

        return after

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.is_floating_point() and args[0].is_floating_point():
            self.seen.casts += out.numel() * (out.dtype is not args[0].dtype)
        return out
