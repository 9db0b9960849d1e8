"""What a guard looks for, and what it does then."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from ...errors import UsageError

ACTIONS = ("warn", "skip", "promote", "rollback")


@dataclass(frozen=True)
class GuardConfig:
    """When a guard raises an alarm, and what it does.

    action: "warn": say which module it is, in events.jsonl and as a RuntimeWarning, and change nothing. "skip": also
    leave out steps whose gradient norm is far beyond what is usual. "promote": also train the guilty module in the next
    safer format from there on. "rollback": go back to the last good checkpoint, replay up to the failing step, look at
    that under the tracer before it is taken, promote, and go on.

    Signals. overflow_repeats, window: a module acts guilty after so many steps that overflowed in it within `window`
    steps. settle_steps: good steps until the loss scale counts as settled; until then its falls are expected.
    scale_falls: halvings without recovery of a settled scale that are a collapse (and skipped steps in a row, settled
    or not, after which the step is looked at: 3 and 12). scale_floor: where a module needs the scale to be lower, the
    module is at fault. spike_ratio, spike_mads, spike_repeats: a spike is loss and gradient norm both beyond the median
    of the last `history` steps by `spike_mads` robust standard deviations, and the norm `spike_ratio` times that, in
    `spike_repeats` of the last 5 steps. skip_ratio: "skip" leaves out a step whose norm is so many times the median
    (and 8 robust standard deviations) beyond it. tolerance: relative error of the whole gradient against fp32 above
    which a format that overflows counts as harmful (five times as much where nothing overflows). probe_every: most
    steps between comparisons with fp32 for no reason at all, the first after settle_steps, the next after as many, then
    twice as many, ...; None: none. swallowed: share of the model's progress that storage below fp32 may swallow; looked
    at every `storage_every` steps.

    Acting. quiet_steps: steps without alarm after which a demoted format is tried again; doubles after each failure;
    None: never. max_promotions: modules promoted in one alarm before the whole model is. max_rollbacks: to one place.
    snapshot_every: steps between states kept in memory for "rollback" where the run writes no checkpoints.
    dense_steps: steps after an alarm that are recorded one by one into the run directory; 0: none. save_steps: failing
    steps kept as failing-NNNNNNNN.pt for ps.replay. look_every: the device is read at least so often.

    Raises UsageError where a value is out of range.
    """

    action: str = "warn"
    overflow_repeats: int = 2
    window: int = 100
    settle_steps: int = 20
    scale_falls: int = 5
    scale_floor: float = 1.0
    history: int = 100
    spike_ratio: float = 10.0
    spike_mads: float = 8.0
    spike_repeats: int = 3
    skip_ratio: float = 10.0
    tolerance: float = 0.1
    swallowed: float = 0.1
    storage_every: int = 500
    quiet_steps: int | None = 500
    probe_every: int | None = 1000
    max_promotions: int = 16
    max_rollbacks: int = 3
    snapshot_every: int = 100
    dense_steps: int = 5
    save_steps: int = 2
    look_every: int = 4

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise UsageError(f"a guard's action must be one of {', '.join(ACTIONS)}, not {self.action!r}")
        for field in fields(self):
            value, kind = getattr(self, field.name), str(field.type)
            if kind.startswith("int"):
                least = 0 if field.name in ("dense_steps", "save_steps", "max_rollbacks") else 1
                if not (value is None and "None" in kind) and not _is_integer(value, least):
                    raise UsageError(f"GuardConfig.{field.name} must be an integer of at least {least}, not {value!r}")
            elif kind == "float" and not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise UsageError(f"GuardConfig.{field.name} must be a positive number, not {value!r}")

    @property
    def acts(self) -> bool:
        """Whether plans may be amended."""
        return self.action in ("promote", "rollback")


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
