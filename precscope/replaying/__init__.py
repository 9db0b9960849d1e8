"""One training step under the tracer, and the same step again from a file.

    result = ps.trace_step("my_task.py:make", precision="fp16")        # forward, loss * scale, backward
    print(result.first)                                                # None, or the op that failed first
    save_step("step.pt", model, batch, rng, "fp16", 65536.0)           # weights, buffers, random states, batch
    print(replay("step.pt", "my_task.py:make"))                        # twice: reproducible or not

Model, buffers, gradients, modes and random generators are left as they were found. step.py runs a step, saved.py holds
the file, again.py runs it again.
"""

from ..tracing.saved import save_step
from .again import Replay, replay
from .step import StepTrace, trace_step

__all__ = ["Replay", "StepTrace", "replay", "save_step", "trace_step"]
