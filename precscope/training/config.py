"""Settings of a training run, and the learning-rate schedule as a plain function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import UsageError, nearest
from ..plans import STORED

SCHEDULES = ("cosine", "linear", "constant", "none")
UPDATES = ("nearest", "stochastic", "kahan", "master")
"""Ways to write updates of low-precision parameters, see parameters.py."""
STATES = ("fp32", "bf16", "int8", "int4", "fp8")
"""What optimizer state can be stored in, see narrowing.py."""


@dataclass(frozen=True)
class TrainConfig:
    """How to train, apart from precision.

    steps: optimizer steps. seed: of dropout and everything else random in the loop. lr: peak learning rate; None: 1e-3
    for the trainer's AdamW, and its own for an optimizer that the task brings. weight_decay: for matrices only.
    betas, eps: of AdamW. schedule: of the learning rate after warm-up, "cosine", "linear" (both down to lr * min_lr),
    "constant", or "none" (the optimizer's lr is never touched). warmup: steps of linear warm-up; None: a tenth of the
    steps, at most 1000. grad_clip: largest total norm of the (unscaled) gradients; None: no clipping. accumulate:
    micro-batches per optimizer step; their gradients are averaged. eval_every: steps between evaluations (there is
    always one at the end). eval_limit: most held-out batches per evaluation. checkpoint_every: steps between
    checkpoints. keep: checkpoints that stay. keep_best: whether the state of the lowest held-out loss is kept as well,
    as checkpoints/best-N.pt, written when an evaluation (eval_every, and at the end) finds it. save_model: whether the
    trained weights alone are written at the end, as model.safetensors. nonfinite_limit: consecutive non-finite steps
    after which the run stops. min_scale: loss scale below which the run stops. sync_every: steps between readings of
    the device; None: 1 on the CPU, 10 elsewhere. flush_seconds: longest time that the log stays in memory.
    params: what parameters are stored in, "fp32", "bf16" or "fp16", where there is no plan (a plan says it for each
    module). updates: how those stored low are written, "nearest", "stochastic", "kahan" or "master"; None: as the plan
    says, or by the bare optimizer, which also computes in the parameters' dtype. state: what the optimizer's state is
    stored in, "fp32", "bf16", "int8", "int4" or "fp8"; None: as the plan says, or fp32. See parameters.py.
    Raises UsageError where a value is out of range.
    """

    steps: int
    seed: int = 0
    lr: float | None = None
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    schedule: str = "cosine"
    warmup: int | None = None
    min_lr: float = 0.1
    grad_clip: float | None = 1.0
    accumulate: int = 1
    eval_every: int | None = None
    eval_limit: int | None = None
    checkpoint_every: int | None = None
    keep: int = 2
    keep_best: bool = False
    save_model: bool = False
    nonfinite_limit: int = 3
    min_scale: float = 2.0**-10
    sync_every: int | None = None
    flush_seconds: float = 5.0
    params: str | None = None
    updates: str | None = None
    state: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "keep", "nonfinite_limit"):
            _require_integer(name, getattr(self, name), least=1)
        for name in ("eval_every", "eval_limit", "checkpoint_every", "sync_every"):
            if getattr(self, name) is not None:
                _require_integer(name, getattr(self, name), least=1)
        if self.warmup is not None:
            _require_integer("warmup", self.warmup, least=0)
        for name, known in (("params", STORED), ("updates", UPDATES), ("state", STATES)):
            if getattr(self, name) not in (None, *known):
                raise UsageError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        if self.state is not None:
            from .narrowing import check_state

            check_state(self.state)  # now: torchao must also be there before a checkpoint is read
        if self.schedule not in SCHEDULES:
            raise UsageError(f"schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}")
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise UsageError(f"lr must be a positive number, not {self.lr!r}")
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise UsageError(f"grad_clip must be positive, or None for no clipping, not {self.grad_clip!r}")

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        return min(self.steps // 10, 1000) if self.warmup is None else self.warmup

    def lr_factor(self, step: int) -> float:
        """What the peak learning rate is multiplied by at optimizer step `step` (from 0)."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        if self.schedule == "cosine":
            return self.min_lr + (1 - self.min_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        if self.schedule == "linear":
            return 1 - (1 - self.min_lr) * min(done, 1.0)
        return 1.0

    def to_dict(self) -> dict[str, Any]:
        """All settings, for run.json and checkpoints."""
        return asdict(self)


def make_config(settings: Mapping[str, Any]) -> TrainConfig:
    """TrainConfig(**settings), where an unknown name is a UsageError that says the nearest known ones."""
    known = [f.name for f in fields(TrainConfig)]
    for name in settings:
        if name not in known:
            hint = nearest(name, known)
            raise UsageError(
                f"train() has no setting {name!r}"
                + (f" (did you mean {hint}?)" if hint else "")
                + "; settings: "
                + ", ".join(known)
            )
    return TrainConfig(**settings)


def _require_integer(name: str, value: Any, *, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f"{name} must be an integer of at least {least}, not {value!r}")
