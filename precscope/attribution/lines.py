"""The line of the user's code that runs: frames of torch, of the standard library and of precscope are passed over."""

from __future__ import annotations

import linecache
import sys
import sysconfig
from pathlib import Path
from types import FrameType

import torch

Line = tuple[str, int, str]
"""File, line number, function."""

_PACKAGE = str(Path(__file__).parents[1])
_USERS = (str(Path(_PACKAGE, "zoo")), str(Path(_PACKAGE, "training", "tasks")))  # ours, but models like any user's
_TORCH = str(Path(torch.__file__).parent)
_STDLIB = sysconfig.get_path("stdlib")
_ENGINE = str(Path(_TORCH, "autograd", "graph.py"))
_known: dict[str, bool] = {}


def user_line() -> Line | None:
    """The innermost frame of the user's code, other dispatch modes apart; inside backward none that called backward."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if _is_users(code.co_filename) and code.co_name not in ("__torch_dispatch__", "__torch_function__"):
            return code.co_filename, frame.f_lineno, code.co_name
        if code.co_filename == _ENGINE and code.co_name == "_engine_run_backward":
            return None
        frame = frame.f_back
    return None


def _is_users(file: str) -> bool:
    known = _known.get(file)
    if known is None:
        library = file.startswith(_STDLIB) and not any(p in file for p in ("site-packages", "dist-packages"))
        ours = file.startswith(_PACKAGE) and not file.startswith(_USERS)
        known = _known[file] = not (library or ours or file.startswith((_TORCH, "<frozen")))
    return known


def text_of(line: Line) -> str:
    """ "file.py:123 in forward: y = x**2" """
    file, number, function = line
    code = linecache.getline(file, number).strip()
    return f"{Path(file).name}:{number} in {function}" + (f": {code}" if code else "")
