"""The file of a saved step: what it began from, so that it can be run again.

It holds tensors, numbers, strings and plain containers only, is written whole or not at all, and is loaded with
weights_only=True: a file from elsewhere can run no code here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..attribution import unwrap
from ..errors import RunDirectoryError
from ..store import replacing

if TYPE_CHECKING:
    from ..plans import PrecisionPlan
    from ..tracing import Finding

SCHEMA = 1
_KIND = "precscope step"


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
        "kind": _KIND,
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
            raise RunDirectoryError(f"cannot write {path} ({str(error).splitlines()[0]:.120})") from error
    return path


def load_step(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RunDirectoryError(f"no file {path}: save a step with precscope trace TASK --save {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and zipfile raise many kinds for a damaged file
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RunDirectoryError(f"{path} cannot be read as a saved step ({lines[0]:.120})") from error
    if not isinstance(content, dict) or content.get("kind") != _KIND:
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
