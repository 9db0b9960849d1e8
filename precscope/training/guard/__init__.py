"""The guard: watches the cheap statistics of a run, and acts when its precision fails.

    ps.train(task, precision="fp16", steps=10_000, out="runs/a", guard="promote")
    ps.train(task, ..., guard=ps.GuardConfig(action="rollback", quiet_steps=2000))

config.py says when and what; signals.py reads the log's rows for alarms; looking.py runs a step again under the tracer
and against fp32; judging.py tells whose fault it is; amending.py changes plans; actions.py tries and keeps the changes;
snapshots.py holds what to go back to; dense.py records the steps around an alarm; storage.py looks for swallowed
updates; events.py writes events.jsonl; guard.py is what the loop calls.
"""

from ...events import Event, read_events
from .config import GuardConfig
from .guard import Guard

__all__ = ["Event", "Guard", "GuardConfig", "read_events"]
