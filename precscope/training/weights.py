"""A model's weights alone, as other tools read them: a safetensors file.

safetensors is optional: checkpoints do without it, and a run that asks for the file is told before its first step.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import torch

from ..errors import UsageError
from ..store import replacing


def require() -> None:
    """Raises UsageError where safetensors is not installed."""
    if importlib.util.find_spec("safetensors") is None:
        raise UsageError("save_model=True needs the package safetensors: pip install safetensors, or leave it out")


def save(state: Mapping[str, torch.Tensor], path: Path, *, about: Mapping[str, str] | None = None) -> dict[str, str]:
    """Write a state_dict to `path`, whole or not at all; which names were left out: name -> the same tensor's name.

    Tied tensors are stored once, under the first of their names in alphabetical order; the file's metadata tells the
    others, in the form that safetensors.torch.load_model understands. Tensors that overlap in part are stored apart.
    about: more metadata. Values that are no tensors (a module's extra state) are left out.
    Raises RunDirectoryError where the file cannot be written.
    """
    from safetensors.torch import save_file

    kept: dict[str, torch.Tensor] = {}
    seen: dict[tuple, str] = {}
    left_out: dict[str, str] = {}
    for name in sorted(state):
        tensor = state[name]
        if not isinstance(tensor, torch.Tensor):
            continue
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in seen:
            left_out[name] = seen[place]
        else:
            seen[place] = name
            kept[name] = tensor.detach().to("cpu", copy=True).contiguous()
    with replacing(path) as temporary:
        save_file(kept, temporary, metadata={"format": "pt", **(about or {}), **left_out})
    return left_out
