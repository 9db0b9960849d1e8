"""Checkpoints: whole or absent, safe to load, and enough to go on bit for bit.

`checkpoints/step-00000200.pt` holds what 200 optimizer steps left behind: model, optimizer, loss scale, plan, and the
states of all random generators. It is written beside its final name, synced and renamed, and the directory is synced
before an older one is removed, so a kill, a full disk or a power cut leaves the previous one. It holds tensors,
numbers, strings and plain containers only, and is loaded with weights_only=True: a checkpoint from elsewhere can run no
code here. Each record's checksum is verified on loading; a damaged file is passed over for the one before it.

`checkpoints/best-00000150.pt` is the one whose held-out loss was lowest (keep_best=True), in the same form;
`checkpoints/best.json` says that loss. Not safetensors: that holds named tensors and nothing else, while an optimizer's
state is nested, has numbers in it, and two of its tensors may be one. The model alone goes there well: weights.py.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import RunDirectoryError, first_line
from ..store import replacing, write_json

SCHEMA = 1
_UNFINISHED = re.compile(r"\.((step|best|stats|ops|shadow|truth)-\d+|best|train|run|graph|plan)\.[a-z]+\.\d+\.tmp")
_NAME = re.compile(r"step-(\d{8,})\.pt")


def checkpoints(out: str | Path) -> list[Path]:
    """Checkpoints below the run directory `out`, newest first."""
    folder = Path(out) / "checkpoints"
    found = [p for p in folder.glob("step-*.pt") if _NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=_step_of, reverse=True)


def save(out: str | Path, step: int, content: dict[str, Any], *, keep: int = 2, same_as: Path | None = None) -> Path:
    """Write the checkpoint after `step` optimizer steps and remove all but the newest `keep`.

    content: nested dicts and lists of tensors, numbers and strings. same_as: a checkpoint with this content, to be
    linked (or copied) instead of written again.
    Raises RunDirectoryError where it cannot be written; the previous checkpoints are then all there.
    """
    path = _put(Path(out) / "checkpoints" / f"step-{step:08d}.pt", step, content, same_as)
    for old in [p for p in checkpoints(out) if _step_of(p) <= step][keep:]:
        old.unlink(missing_ok=True)
    return path


def save_best(out: str | Path, step: int, content: dict[str, Any], *, loss: float, same_as: Path | None = None) -> Path:
    """Write the checkpoint after `step` steps as the best, `loss` its held-out loss, and remove the one before.

    content, same_as: as for `save`. Raises RunDirectoryError where it cannot be written; the best before it then stays.
    """
    path = _put(Path(out) / "checkpoints" / f"best-{step:08d}.pt", step, content, same_as)
    write_json(path.parent / "best.json", {"schema": SCHEMA, "step": step, "eval_loss": loss, "file": path.name})
    _sync_directory(path.parent)
    for old in path.parent.glob("best-*.pt"):
        if old != path:
            old.unlink(missing_ok=True)
    return path


def best(out: str | Path) -> tuple[Path, int, float] | None:
    """The best checkpoint below the run directory `out`: (file, steps, held-out loss); None where there is none."""
    folder = Path(out) / "checkpoints"
    try:
        content = json.loads((folder / "best.json").read_text(encoding="utf-8"))
        path, step, loss = folder / Path(content["file"]).name, int(content["step"]), float(content["eval_loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (path, step, loss) if path.is_file() else None


def _put(path: Path, step: int, content: dict[str, Any], same_as: Path | None) -> Path:
    """Write a checkpoint whole, such that it outlasts a power cut; `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(f"cannot make {path.parent} ({error.strerror}): choose another directory") from error
    with replacing(path) as temporary:
        if same_as is None:
            _write({"schema": SCHEMA, "step": step, **content}, temporary)
        else:
            _link(same_as, temporary)
    _sync_directory(path.parent)
    return path


def _link(source: Path, target: Path) -> None:
    """`target` a second name of `source`, or a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _sync_directory(folder: Path) -> None:
    """Make what was renamed in `folder` last through a power cut. Raises RunDirectoryError where that fails."""
    if os.name != "posix":
        return  # a directory cannot be opened there
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise RunDirectoryError(f"cannot sync {folder} ({error.strerror}): is the disk still there?") from error


def load(path: Path) -> dict[str, Any]:
    """Content of one checkpoint, tensors on the CPU.

    Raises RunDirectoryError where it is missing, damaged, of a newer schema, or not a checkpoint of precscope.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise RunDirectoryError(f"{path} is damaged (checksum of {damaged} differs)")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except RunDirectoryError:
        raise
    except Exception as error:  # torch and zipfile raise many kinds for a damaged file
        raise RunDirectoryError(f"{path} cannot be read as a checkpoint ({first_line(error):.120})") from error
    if not isinstance(content, dict) or "schema" not in content or "step" not in content:
        raise RunDirectoryError(f"{path} is not a checkpoint of precscope (it has no schema number)")
    if content["schema"] > SCHEMA:
        raise RunDirectoryError(f"{path} has schema {content['schema']}, this precscope reads up to {SCHEMA}: upgrade")
    return content


def latest(out: str | Path) -> dict[str, Any] | None:
    """Content of the newest checkpoint that loads, None where there is none at all.

    A damaged one is passed over with a RuntimeWarning that names it. Raises RunDirectoryError where all are damaged.
    """
    problems = []
    for path in checkpoints(out):
        try:
            content = load(path)
        except RunDirectoryError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            warnings.warn(f"{problem}: going on from {path.name}", RuntimeWarning, stacklevel=2)
        return content
    if problems:
        raise RunDirectoryError(
            f"no checkpoint in {Path(out) / 'checkpoints'} can be read ({problems[0]}): move them away to start anew"
        )
    return None


def remove_all(out: str | Path) -> None:
    """Remove the checkpoints below `out`, the best included, and the trained weights."""
    folder = Path(out) / "checkpoints"
    rest = (folder / "best.json", Path(out) / "model.safetensors")
    for path in [*checkpoints(out), *folder.glob("best-*.pt"), *rest]:
        path.unlink(missing_ok=True)
    remove_unfinished(out)


def remove_after(out: str | Path, step: int) -> None:
    """Remove the checkpoints of more than `step` steps: the run went back, and what they hold did not happen."""
    for path in checkpoints(out):
        if _step_of(path) > step:
            path.unlink(missing_ok=True)


def remove_unfinished(out: str | Path) -> None:
    """Remove what processes that were killed left half-written below `out`. None may be writing there now."""
    for path in [*Path(out).glob(".*.tmp"), *(Path(out) / "checkpoints").glob(".*.tmp")]:
        if _UNFINISHED.fullmatch(path.name):
            path.unlink(missing_ok=True)


def random_states() -> dict[str, Any]:
    """States of the global generators of torch (CPU and CUDA), numpy and random, as tensors and plain containers."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
        "python": list(random.getstate()),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Inverse of random_states. CUDA states are set where as many devices are there."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))


def _write(content: dict[str, Any], path: Path) -> None:
    """torch.save, whose write errors keep their errno (through a path it reports all of them as RuntimeError)."""
    with open(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def _step_of(path: Path) -> int:
    return int(path.stem.split("-")[1])
