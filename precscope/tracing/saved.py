"""Writing a step to a file: what it began from, so that it can be run again (see `replaying`).

The file holds tensors, numbers, strings and plain containers only, is written whole or not at all, and is loaded with
weights_only=True: a file from elsewhere can run no code here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..attribution import unwrap
from ..errors import RunDirectoryError, first_line
from ..store import replacing
from .finding import Finding

if TYPE_CHECKING:
    from ..plans import PrecisionPlan

SCHEMA = 1
KIND = "precscope step"


def save_step(
    path: str | Path,
    model: nn.Module,
    batch: Any,
    rng: dict[str, Any] | None,
    precision: str | None,
    scale: float | None,
    *,
    plan: PrecisionPlan | None = None,
    step: int = 0,
    found: Finding | None = None,
    digest: str = "",
) -> Path:
    """Write what a step began from, so that `replay` can run it again. Whole or absent.

    model: as it was before the step: parameters, buffers (also those left out of state_dict) and modes are kept. batch:
    tensors, numbers and strings in plain containers; of anything else only `step` is kept, and the task is asked for
    the batch again. rng: `training.checkpoint.random_states()` from before the step; None: the random draws of the step
    are not kept. precision: a word, None with a plan. scale: loss scale. found, digest: what was seen, to compare with.
    Raises RunDirectoryError where the file cannot be written.
    """
    model = unwrap(model)
    content = {
        "schema": SCHEMA,
        "kind": KIND,
        "model": {name: _own(x) for name, x in model.state_dict().items()},
        "buffers": {name: _own(x) for name, x in model.named_buffers()},
        "training": {name: module.training for name, module in model.named_modules()},
        "batch": plain(batch),
        "random": rng,
        "precision": precision,
        "plan": plan.to_json() if plan is not None else None,
        "scale": scale,
        "step": step,
        "found": list(found.key) if found is not None else None,
        "digest": digest,
    }
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(f"cannot make {path.parent} ({error.strerror}): choose another place") from error
    with replacing(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # of torch's writer: the disk, mostly
            raise RunDirectoryError(f"cannot write {path} ({first_line(error):.120})") from error
    return path


_SIMPLE = (str, int, float, bool, bytes, type(None))


def _is_plain(value: Any) -> bool:
    """Whether a file that can run no code can hold it."""
    if isinstance(value, dict):
        return type(value) is dict and all(isinstance(k, _SIMPLE) and _is_plain(v) for k, v in value.items())
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return type(value) in (torch.Tensor, *_SIMPLE)


def plain(batch: Any) -> Any:
    """The batch in containers and memory of its own, since a loss function may change it and a view would bring along
    all it is a view of. None where a file that can run no code cannot hold it."""
    return _anew(batch) if _is_plain(batch) else None


def _anew(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _anew(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_anew, value))
    return _own(value)


def _own(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
