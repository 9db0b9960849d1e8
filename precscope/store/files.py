"""Whole files or none: what is written beside its name and renamed over it, and JSON that any reader takes."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RunDirectoryError


@contextlib.contextmanager
def replacing(path: Path):
    """Yield a temporary name beside `path`; rename it over `path` on success, remove it on failure.

    Raises RunDirectoryError on any OSError (a full disk, a directory that vanished), leaving `path` as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunDirectoryError(
            f"cannot write {path} ({error.strerror or error}): free space or choose another directory; "
            "everything written before is intact"
        ) from error
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def remove(path: Path) -> None:
    """Remove a file, if it is there. Raises RunDirectoryError where that is refused."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise RunDirectoryError(
            f"cannot remove {path} ({error.strerror or error}): close what has it open, or choose another directory"
        ) from error


def settle(directory: Path) -> None:
    """Let names in `directory` be on disk before what comes next, where the system can do so (not on Windows)."""
    with contextlib.suppress(OSError):
        number = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` atomically as JSON. Values JSON cannot hold (inf, NaN) are written as strings."""
    with replacing(path) as temporary:
        temporary.write_text(json_text(content, indent=1) + "\n", encoding="utf-8")


def json_text(content: Any, *, indent: int | None = None) -> str:
    """`content` as JSON: numpy's numbers as Python's, inf and NaN and what else JSON cannot hold as strings."""
    return json.dumps(_plain(content), indent=indent, allow_nan=False)


def update_json(path: Path, content: dict[str, Any]) -> None:
    """Merge `content` into the JSON object at `path` (its top-level keys win) and write it atomically."""
    old: dict[str, Any] = {}
    if path.exists():
        with contextlib.suppress(ValueError, OSError):
            old = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**old, **content})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    if isinstance(value, str | int | float | bool | type(None)):
        return value
    return str(value)


def this_command() -> str:
    """The command line of this process, its program by name."""
    words = [Path(sys.argv[0]).name or "python", *sys.argv[1:]] if sys.argv else ["python"]
    if words[0] == "__main__.py":
        words[0] = "precscope"
    return shlex.join(words) if words[0] not in ("-c", "-m") else "python"
