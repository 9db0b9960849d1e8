"""Runs side by side: `ps.compare(["runs/fp32", "runs/plan"])`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import PrecscopeError, RunDirectoryError, UsageError
from .plans import PrecisionPlan

if TYPE_CHECKING:
    import pandas as pd

NAN = float("nan")


@dataclass(frozen=True)
class RunRow:
    """One run of a comparison. Times in ms, memory in bytes, shares between 0 and 1; NaN where not known.

    speed: time per step of the baseline over this run's. eval_change: held-out loss relative to the baseline's.
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


@dataclass(frozen=True)
class Comparison:
    """Rows in the order given; `baseline` is the run that speed and eval_change refer to."""

    rows: tuple[RunRow, ...]
    baseline: str

    def table(self) -> pd.DataFrame:
        """The rows as a DataFrame."""
        import pandas as pd

        return pd.DataFrame([asdict(r) for r in self.rows])

    def __str__(self) -> str:
        from .reporting.text import compare_table

        return compare_table(self.rows)


def compare(runs: Sequence[str | Path], *, baseline: str | Path | None = None) -> Comparison:
    """Compare the training runs in these directories.

    baseline: the one that speed and loss are measured against; by default the first fp32 run, else the first.
    Raises UsageError where fewer than one is given, RunDirectoryError where one holds no training run.
    """
    if isinstance(runs, str | Path):
        runs = [runs]
    if not runs:
        raise UsageError("compare needs at least one run directory, for example runs/fp32 runs/plan")
    read = [_read(Path(r)) for r in runs]
    if baseline is not None:
        chosen = [c for c in read if Path(c["path"]) == Path(baseline)]
        if not chosen:
            raise UsageError(f"baseline {baseline} is not among the runs {', '.join(map(str, runs))}")
        base = chosen[0]
    else:
        base = next((c for c in read if c.get("precision") == "fp32"), read[0])
    return Comparison(tuple(_row(c, base) for c in read), str(base["path"]))


def _read(path: Path) -> dict[str, Any]:
    file = path / "run.json"
    if not file.is_file() or not (path / "train.parquet").is_file():
        raise RunDirectoryError(f"{path} holds no training run: make one with precscope train TASK --out {path}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunDirectoryError(f"{file} is not JSON ({error})") from error
    return {**content, **content.get("result", {}), "path": str(path), "log": _log(path)}


def _log(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        return pd.read_parquet(path / "train.parquet")
    except Exception as error:
        raise RunDirectoryError(f"{path / 'train.parquet'} cannot be read ({error}): train again") from error


def _row(run: dict[str, Any], base: dict[str, Any]) -> RunRow:
    log = run["log"]
    time = _step_time(run)
    base_time, base_eval, eval_loss = _step_time(base), _number(base, "eval_loss"), _number(run, "eval_loss")
    return RunRow(
        run=Path(run["path"]).name,
        precision=str(run.get("precision", "?")),
        steps=len(log),
        train_loss=_train_loss(log),
        eval_loss=eval_loss,
        step_time_ms=time,
        speed=base_time / time if time else NAN,
        eval_change=eval_loss / base_eval - 1 if base_eval else NAN,
        peak_memory_bytes=_number(run, "peak_memory_bytes"),
        skipped_steps=int(log.skipped.sum()) if len(log) else 0,
        nonfinite_steps=int(log.nonfinite.sum()) if len(log) else 0,
        low_precision_flops=_low_share(run),
        status=str(run.get("status", "?")),
        note="; ".join(run.get("notes", [])),
    )


def _low_share(run: dict[str, Any]) -> float:
    """Share of the FLOPs in formats narrower than tf32: autocast runs every matrix product low, a plan says itself."""
    precision = run.get("precision")
    if "low_precision_flops_share" in run:
        return _number(run, "low_precision_flops_share")
    if precision in ("fp32", "tf32"):
        return 0.0
    if precision in ("bf16", "fp16"):
        return 1.0
    try:
        made_from = PrecisionPlan.load(Path(run["path"]) / "plan.json").made_from
    except PrecscopeError:
        return NAN
    return _number(made_from, "low_precision_flops_share")


def _train_loss(log: pd.DataFrame, last: int = 10) -> float:
    """Mean loss of the last `last` steps."""
    return float(log.loss.tail(last).mean()) if len(log) else NAN


def _step_time(run: dict[str, Any], warm_up: int = 3) -> float:
    """Median ms per step, the first ones left out, and those during which the recorder watched."""
    log = run["log"]
    if not len(log):
        return NAN
    every = run.get("every")
    plain = log[log.step % every != 0] if every and every > 1 else log
    later = plain[plain.step >= plain.step.min() + warm_up] if len(plain) > 2 * warm_up else plain
    return float(later.time_ms.median())


def _number(run: dict[str, Any], key: str) -> float:
    try:
        return float(run.get(key, NAN))
    except (TypeError, ValueError):
        return NAN
