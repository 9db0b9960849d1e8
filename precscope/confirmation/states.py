"""The states of a model that advice is tried at: as it stands at the start, and after some steps of training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


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
