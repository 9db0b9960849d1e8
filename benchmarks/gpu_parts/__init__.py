"""What gpu.py runs, part by part, and what it makes of the results."""

from __future__ import annotations

from collections.abc import Callable

from .advising import advice
from .checking import correctness, tests
from .kernels import kernels, matmuls
from .setting import Setting
from .training import compiled, training
from .watching import recorder, shadow

PARTS: dict[str, tuple[Callable[[Setting], None], float, str]] = {
    "correctness": (correctness, 90, "every kernel and format against the CPU"),
    "kernels": (kernels, 60, "one-pass statistics beside the bytes they read"),
    "recorder": (recorder, 110, "steps of the GPT watched and unwatched, in turn"),
    "matmuls": (matmuls, 30, "the GPT's products in each format, fp8 included"),
    "advice": (advice, 150, "profile with measured costs; plans, confirmed"),
    "training": (training, 120, "each precision from the same start; steps in turn"),
    "shadow": (shadow, 60, "shadow steps, op level, the tracer"),
    "tests": (tests, 80, "the tests marked gpu"),
    "compiled": (compiled, 120, "steps in turn under torch.compile, as time is left"),
}
"""Name -> (what runs, seconds it may take, in words). A part tells what it finds by `setting.keep`."""

__all__ = ["PARTS", "Setting"]
