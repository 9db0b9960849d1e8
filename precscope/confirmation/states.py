"""The states of a model that advice is tried at: as it stands at the start, and after some steps of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_OWN = frozenset(vars(nn.Module())) | {"_flat_weights"}
"""What nn.Module keeps itself: parameters, buffers, modules, hooks, the training flag."""


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Give modules their plain attributes back on exit: tensors, numbers, dicts and lists that a forward pass may keep
    (a cache of positions, a call count), which are no parameters and no buffers. What was made inside is dropped, so
    that a cache filled in one format is not met in another."""
    before = {m: {k: (v, _contents(v)) for k, v in vars(m).items() if _is_plain(k, v)} for m in model.modules()}
    names = {m: set(vars(m)) for m in before}
    try:
        yield
    finally:
        for module, kept in before.items():
            for key in set(vars(module)) - names[module]:
                if _is_plain(key, vars(module)[key]):
                    del vars(module)[key]
            for key, (value, contents) in kept.items():
                vars(module)[key] = value
                if contents is not None:
                    value.clear()
                    value.update(contents) if isinstance(value, dict) else value.extend(contents)


def _is_plain(key: str, value: Any) -> bool:
    own = key in _OWN or "hook" in key or key.startswith("_precscope") or key == "forward"
    return not own and (value is None or isinstance(value, torch.Tensor | bool | int | float | dict | list))


def _contents(value: Any) -> Any:
    return value.copy() if type(value) in (dict, list) else None


class States:
    """Named copies of the parameters and buffers of `model`, kept where they are. `go` loads one in place."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept: dict[str, dict[str, torch.Tensor]] = {}

    def keep(self, name: str) -> None:
        """Copy the present state under `name`."""
        self._kept[name] = {key: tensor.detach().clone() for key, tensor in self._tensors()}

    def adopt(self, name: str, state: dict[str, torch.Tensor]) -> None:
        """Take a state from elsewhere, as kept by `snapshot`."""
        self._kept[name] = state

    def go(self, name: str) -> None:
        """Load a kept state."""
        kept = self._kept[name]
        with torch.no_grad():
            for key, tensor in self._tensors():
                if key in kept and kept[key].shape == tensor.shape:
                    tensor.copy_(kept[key])

    def drop(self, name: str) -> None:
        """Forget a kept state."""
        del self._kept[name]

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    def __iter__(self) -> Any:
        return iter(self._kept)

    def _tensors(self) -> list[tuple[str, torch.Tensor]]:
        return [*self._model.named_parameters(), *self._model.named_buffers()]
