"""What a comparison is: a row per run, and each run against the baseline."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PrecscopeError
from ..plans import PrecisionPlan
from .pairing import Against
from .runs import NAN, Group, Run

if TYPE_CHECKING:
    import pandas as pd

    from .curves import CurvePoint

SCHEMA = 1


@dataclass(frozen=True)
class RunRow:
    """One run of a comparison. Times in ms, memory in bytes, shares between 0 and 1; NaN where not known.

    speed: time per step of the baseline over this run's. eval_change: held-out loss relative to the baseline's. seeds:
    how many runs stand behind what is said of it over seeds; the other figures are those of the run itself.
    """

    run: str
    precision: str
    steps: int
    train_loss: float
    eval_loss: float
    step_time_ms: float
    speed: float
    eval_change: float
    peak_memory_bytes: float
    skipped_steps: int
    nonfinite_steps: int
    low_precision_flops: float
    status: str
    note: str
    seeds: int = 1


@dataclass(frozen=True)
class Comparison:
    """Rows in the order given; `baseline` is the run that speed and eval_change refer to.

    pairs: every other run against it. margin, confidence: what the verdicts are about (see equivalence.py).
    """

    rows: tuple[RunRow, ...]
    baseline: str
    pairs: tuple[Against, ...] = ()
    margin: float = 0.02
    confidence: float = 0.95
    groups: tuple[Group, ...] = field(default=(), repr=False, compare=False)

    @property
    def passed(self) -> bool:
        """Whether every run holds the baseline's loss: see Against.passed."""
        return all(pair.passed for pair in self.pairs)

    def table(self) -> pd.DataFrame:
        """The rows as a DataFrame."""
        import pandas as pd

        return pd.DataFrame([asdict(r) for r in self.rows])

    def to_dict(self) -> dict[str, Any]:
        """Everything but the curves in plain types; what is not known (NaN) is None, infinities are words."""
        return _plain({
            "schema": SCHEMA, "baseline": self.baseline, "margin": self.margin, "confidence": self.confidence,
            "passed": self.passed, "runs": [asdict(r) for r in self.rows], "pairs": [_pair(p) for p in self.pairs],
        })  # fmt: skip

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def save(self, path: str | Path) -> Path:
        """Write `to_json` to a file. Raises RunDirectoryError where it cannot be written."""
        from ..store import replacing

        path = Path(path)
        with replacing(path) as temporary:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(self.to_json() + "\n", encoding="utf-8")
        return path

    def curves(self, *, smooth: int | None = None) -> dict[str, tuple[CurvePoint, ...]]:
        """Training loss of each run by step: mean over its seeds, plus and minus their standard deviation.

        smooth: steps of the moving average of each seed; default: a fiftieth of the run.
        """
        from .curves import loss_table, spread

        made = {}
        for group in self.groups:
            steps, losses = loss_table(_members(group))
            made[str(group.run.path)] = spread(steps, losses, smooth=smooth or _smooth(group))
        return made

    def difference_curves(self, *, smooth: int | None = None) -> dict[str, tuple[CurvePoint, ...]]:
        """Paired difference of the training loss from the baseline's by step, for each run that is paired: mean over
        seeds and its interval at `confidence`, step by step."""
        from .curves import loss_table, mean_interval

        base = next(g for g in self.groups if str(g.run.path) == self.baseline)
        others = [g for g in self.groups if g is not base]
        made = {}
        for group, pair in zip(others, self.pairs, strict=True):
            if pair.why_unpaired:
                continue
            common = [s for s in group.seeds if s in base.seeds]
            steps, losses = loss_table([*(group.seeds[s] for s in common), *(base.seeds[s] for s in common)])
            n = len(common)
            width = smooth or _smooth(group)
            finite = _finite(losses)
            made[str(group.run.path)] = mean_interval(
                steps, finite[:n] - finite[n:], confidence=self.confidence, smooth=width
            )
        return made

    def __str__(self) -> str:
        from ..reporting.pairs import pairs_text
        from ..reporting.text import compare_table

        said = pairs_text(self.pairs, margin=self.margin, confidence=self.confidence)
        return compare_table(self.rows) + (f"\n\n{said}" if said else "")


def make_row(run: Run, base: Run, *, seeds: int = 1) -> RunRow:
    """The row of `run` beside the baseline."""
    time, eval_loss = run.step_time_ms, run.eval_loss
    log = run.log
    return RunRow(
        run=run.name,
        precision=run.precision,
        steps=len(log),
        train_loss=run.train_loss,
        eval_loss=eval_loss,
        step_time_ms=time,
        speed=base.step_time_ms / time if time else NAN,
        eval_change=eval_loss / base.eval_loss - 1 if base.eval_loss else NAN,
        peak_memory_bytes=run.number("peak_memory_bytes"),
        skipped_steps=int(log.skipped.sum()) if len(log) else 0,
        nonfinite_steps=int(log.nonfinite.sum()) if len(log) else 0,
        low_precision_flops=_low_share(run),
        status=str(run.about.get("status", "?")),
        note=str(run.about.get("note") or ""),
        seeds=seeds,
    )


def _low_share(run: Run) -> float:
    """Share of the FLOPs in formats narrower than tf32: autocast runs every matrix product low, a plan says itself."""
    if "low_precision_flops_share" in run.about:
        return run.number("low_precision_flops_share")
    if run.precision in ("fp32", "tf32"):
        return 0.0
    if run.precision in ("bf16", "fp16"):
        return 1.0
    try:
        made_from = PrecisionPlan.load(run.path / "plan.json").made_from
        return float(made_from.get("low_precision_flops_share", NAN))
    except (PrecscopeError, TypeError, ValueError):
        return NAN


def _members(group: Group) -> list[Run]:
    return list(group.seeds.values()) or [group.run]


def _smooth(group: Group) -> int:
    return max(1, len(group.run.log) // 50)


def _finite(losses: Any) -> Any:
    """Infinite losses as NaN, so that inf - inf needs no thought."""
    import numpy as np

    return np.where(np.isfinite(losses), losses, np.nan)


def _pair(pair: Against) -> dict[str, Any]:
    content = asdict(pair)
    content |= {"verdict": pair.verdict, "passed": pair.passed}
    for name in ("loss", "curve"):
        found = getattr(pair, name)
        if found is not None:
            content[name] |= {
                "share": found.share, "interval": found.interval, "p_equivalence": found.p_equivalence,
                "kind": found.kind,
            }  # fmt: skip
    return content


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None if value != value else ("inf" if value > 0 else "-inf")
    return value
