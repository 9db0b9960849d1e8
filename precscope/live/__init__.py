"""Looking at a run while it goes on: a view on the terminal (`--live`), and a TensorBoard writer (`--tensorboard DIR`).

    with watching("train gpt", out="runs/b", live=True, tensorboard="boards/b") as watch:
        ps.train(task, steps=500, out="runs/b", progress=watch.callback)

Both are told what the trainer has read from the device anyway, and read the parts that a recorder has flushed to the
run directory. They add no hook, wait for no device, draw no random number: a run that is watched is the same bit for
bit.
"""

from __future__ import annotations

from .boards import Board
from .parts import Flushed, Parts
from .state import Course, sparkline
from .terminal import LiveView
from .watching import Watch, watching

__all__ = ["Board", "Course", "Flushed", "LiveView", "Parts", "Watch", "sparkline", "watching"]
