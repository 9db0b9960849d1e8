"""Reading the file of a saved step (tracing/saved.py writes it), and putting a model where it began.

It holds tensors, numbers, strings and plain containers only, is written whole or not at all, and is loaded with
weights_only=True: a file from elsewhere can run no code here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..attribution import unwrap
from ..errors import RunDirectoryError, first_line
from ..tracing.saved import KIND, SCHEMA


def load_step(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RunDirectoryError(f"no file {path}: save a step with precscope trace TASK --save {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and zipfile raise many kinds for a damaged file
        raise RunDirectoryError(f"{path} cannot be read as a saved step ({first_line(error):.120})") from error
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise RunDirectoryError(f"{path} is not a step saved by precscope trace --save")
    if content["schema"] > SCHEMA:
        raise RunDirectoryError(f"{path} has schema {content['schema']}, this precscope reads up to {SCHEMA}: upgrade")
    return content


@contextlib.contextmanager
def weights_of(
    model: nn.Module, state: dict[str, Any] | None, source: str, buffers: dict[str, Any] | None = None
) -> Iterator[None]:
    """The model with the parameters and buffers of `state`; its own come back on leaving."""

    if state is None:
        yield
        return
    model = unwrap(model)
    own = [(x, x.detach().clone()) for x in [*model.parameters(), *model.buffers()]]
    try:
        try:
            model.load_state_dict(state)
        except (RuntimeError, KeyError) as error:
            reason = str(error).strip().splitlines()
            raise RunDirectoryError(
                f"{source} was made with another model ({' '.join(reason[:2]):.160}): give the task that made it"
            ) from error
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if buffers is not None and name in buffers:
                    buffer.copy_(buffers[name])
        yield
    finally:
        with torch.no_grad():
            for x, before in own:
                x.copy_(before)
