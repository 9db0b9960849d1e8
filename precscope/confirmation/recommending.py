"""ps.recommend: the prediction from a recorded run, and where a task is given, its confirmation on the model itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..advice import Limits
from ..advice import recommend as predict
from ..errors import UsageError
from ..plans import PrecisionPlan
from ..profiles import Profile
from .tolerance import LEAST_GAIN, Tolerance

if TYPE_CHECKING:
    from ..tasks import Task

Note = Callable[[str], None]


def recommend(
    profile: Profile | str | Path,
    *,
    formats: Sequence[str] = ("fp16", "bf16", "fp32"),
    policy: str = "autocast",
    task: Task | str | None = None,
    limits: Limits | None = None,
    costs: str = "auto",
    loss_scaling: bool | None = None,
    tolerance: Tolerance | None = None,
    batches: int = 2,
    trial_steps: int = 32,
    note: Note | None = None,
    updates: str | None = None,
    beyond_autocast: bool | float = True,
) -> PrecisionPlan:
    """Recommend a format per module from a recorded run, and confirm it on the model where `task` is given.

    formats: what may be chosen; fp32 is the way out where the others do harm. policy: "autocast" (fp32 master weights,
    PyTorch's op lists decide inside) or "cast" (everything in the module runs in the format). limits: tolerances of the
    range rules. costs: "auto" takes what was measured on the recording device; "model" a FLOP/byte model of a device
    where each halving of the width doubles the speed, fp8 included, for a plan to use elsewhere.

    task: a Task, or what `make_task` takes. Its model is run in the candidate formats and compared with fp32: loss,
    parameter gradients, order of the outputs, on batches that were not recorded, as the model stands and after
    `trial_steps` steps of fp32 training; modules that do harm are found (at most 2n + 20 forward passes for n modules
    and each format; the steps of trials and further rounds of tightening come on top) and kept out of the format; the
    whole plan is then tried, and trained for `trial_steps` steps beside fp32. It is tightened until it passes and says
    "confirmed"; without a task it says "predicted". Model, optimizer, buffers and generators are left as they were.
    updates: how the optimizer will write parameters that are stored in 16 bits, "nearest", "stochastic", "kahan",
    "master" or "auto" (the least that the recorded updates need). Parameters that plain storage would rob of their
    updates may then be low all the same, with either policy, and `ps.train` follows the plan's optimizer["updates"].
    None: such parameters stay fp32, and the plan's optimizer["warnings"] say what would let them be low.
    beyond_autocast: whether a confirmed bf16 plan whose costs were measured is also tried with its modules in bf16
    throughout (policy "cast" over fp32 master weights): norms, softmax and residual streams, too, which autocast keeps
    in fp32. It is taken where it is confirmed in the same way, trains as well, and whole steps timed in turn are faster
    by a share of 0.03, or of the number given; modules that do harm then stay under autocast (2n + 20 passes more).
    tolerance: what a plan may change. batches: how many batches each confirmation takes. loss_scaling: whether fp16
    gradients get a loss scale; None: with policy "autocast". note: called with a line of text when a part begins.

    The plan minimises predicted time per step: measured per module and format where the run has cost.parquet, else a
    FLOP and byte model, plus casts where neighbours differ. Raises UsageError where no assignment is allowed,
    RunDirectoryError for an unreadable run, TaskError for a task that does not run in fp32.
    """
    profile = profile if isinstance(profile, Profile) else Profile.load(profile)
    if batches < 1 or trial_steps < 0:
        raise UsageError(f"batches must be 1 or more and trial_steps 0 or more, not {batches} and {trial_steps}")
    least_gain = LEAST_GAIN if beyond_autocast is True else beyond_autocast
    if not isinstance(least_gain, bool | float | int) or not -math.inf < least_gain < 1.0:
        raise UsageError(
            "beyond_autocast must be True, False, or the share of the time per step to gain (below 1), "
            f"not {beyond_autocast!r:.40}"
        )
    asked: dict[str, Any] = {"formats": formats, "policy": policy, "limits": limits, "costs": costs,
                             "updates": updates}  # fmt: skip
    if task is None:
        return predict(profile, **asked)
    from ..tasks import Task, TaskRef, make_task
    from .session import Session

    if not isinstance(task, Task | TaskRef | str) and not callable(task):
        raise UsageError(
            "task must be a precscope.Task, a function that makes one, or its name (file.py:function), "
            f"not {task!r:.40}"
        )
    if not isinstance(task, Task):
        task = make_task(task, seed=int(profile.run.get("seed", 0) or 0))
    session = Session(
        task, profile, asked, tolerance=tolerance or Tolerance(), batches=batches, trial_steps=trial_steps,
        loss_scaling=policy == "autocast" if loss_scaling is None else loss_scaling, note=note,
        beyond=None if beyond_autocast is False else float(least_gain),
    )  # fmt: skip
    return session.run()
