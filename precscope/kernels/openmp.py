"""The OpenMP threads that torch computes with, lent to our own compiled code.

torch's worker threads spin for a while after each operation. Work handed to them starts at once; work given to any
other thread competes with them for the cores. GOMP_parallel is the entry point that GCC-compiled programs use; LLVM's
and Intel's OpenMP libraries have it too.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def threads() -> int:
    """How many threads `run` may use: torch's setting, or 1 where its threads cannot be reached.

    A forked child inherits the library's idea of its threads but not the threads: there it is 1.
    """
    return 1 if _forked or _gomp_parallel() is None else torch.get_num_threads()


def run(function: int, argument: int, count: int) -> None:
    """Call the C function at address `function` with the integer `argument` on `count` threads; returns when all
    have returned. The interpreter lock is released meanwhile."""
    parallel = _gomp_parallel()
    assert parallel is not None
    parallel(function, argument, count, 0)


@cache
def _gomp_parallel() -> Callable[[int, int, int, int], None] | None:
    """GOMP_parallel(function, argument, threads, flags) of the library that torch uses; None if there is none."""
    library = _library()
    if library is None:
        return None
    try:
        parallel = ctypes.CDLL(library).GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


def _library() -> str | None:
    """Path of the loaded OpenMP library: the one beside torch, or the only one there is. Linux only."""
    if "OpenMP" not in torch.__config__.parallel_info():
        return None
    try:
        lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    except OSError:
        return None
    mapped = {words[5] for words in (line.split(maxsplit=5) for line in lines) if len(words) == 6}
    loaded = [path for path in mapped if Path(path).name.startswith(("libgomp", "libiomp5", "libomp"))]
    inside_torch = [path for path in loaded if Path(torch.__file__).parent in Path(path).parents]
    for candidates in (inside_torch, loaded):
        if len(candidates) == 1:
            return candidates[0]
    return None
