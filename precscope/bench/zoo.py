"""`precscope bench zoo`: is the advice right on models that are known to fail, and silent on those that are well?

For each case and format, through the public API alone: record a few fp32 steps of a fresh build (ps.profile), ask for a
plan with that format and fp32 (ps.recommend), train another fresh build with it (ps.apply), and judge the end of that
run beside plain fp32.
"""

from __future__ import annotations

import json
import math
import platform
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FormatError, UsageError, one_line
from .cases import FORMATS, Case, load_cases
from .scoring import Score, Summary, is_named, kept_high, needless, summarise

if TYPE_CHECKING:
    from ..plans import PrecisionPlan

SCHEMA = 1
RECORDED_STEPS = 60
"""Most steps of a case that are recorded."""

Note = Callable[[str], None]


@dataclass(frozen=True)
class ZooResult:
    """folder: of the cases. scores: one per case and format. seed: of builds and training. seconds: in all."""

    folder: str
    scores: tuple[Score, ...]
    seed: int
    seconds: float

    @property
    def summary(self) -> Summary:
        """Counts and means over all pairs."""
        return summarise(self.scores)

    def to_json(self) -> str:
        """The text of the JSON file: schema, summary, scores, versions."""
        import torch

        from .. import __version__

        content = {
            "schema": SCHEMA,
            "benchmark": "zoo",
            "folder": self.folder,
            "seed": self.seed,
            "seconds": round(self.seconds, 3),
            "versions": {"precscope": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "summary": self.summary.to_dict(),
            "scores": [s.to_dict() for s in self.scores],
        }
        return json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> Path:
        """Write the JSON; the file is complete or absent."""
        from ..store import replacing

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            Path(temporary).write_text(self.to_json(), encoding="utf-8")
        return path

    def text(self, *, width: int | None = None) -> str:
        """Tables and the summary, as wide as the terminal (60 to 120 columns) or `width`."""
        from .tables import result_text

        return result_text(self, width=width)

    def __str__(self) -> str:
        return self.text()


def score_zoo(
    folder: str | Path | None = None,
    *,
    formats: Sequence[str] | str = FORMATS,
    cases: Sequence[str] = (),
    seed: int = 0,
    note: Note | None = None,
) -> ZooResult:
    """Score the advice on the cases of `folder` (None: those that come with precscope) in each of `formats`.

    cases: names, where not all are wanted. note: called with a line as each pair is done. Raises TaskError for a folder
    or case that cannot be read, FormatError for another format than fp16 and bf16.
    """
    started = time.perf_counter()
    names = _formats(formats)
    folder = own_zoo() if folder is None else Path(folder)
    scores = []
    for case in load_cases(folder, cases):
        for fmt in names:
            scores.append(score_case(case, fmt, seed=seed))
            if note is not None:
                note(f"{case.name} {fmt}: {scores[-1].verdict} ({scores[-1].seconds:.1f} s)")
    return ZooResult(str(folder), tuple(scores), seed, time.perf_counter() - started)


def own_zoo() -> Path:
    """The folder of the cases that come with precscope."""
    return Path(__file__).parents[1] / "zoo"


def score_case(case: Case, fmt: str, *, seed: int = 0) -> Score:
    """Plain runs, advice, planned run and score of one case in one format."""
    from .harness import fails, run_case

    started = time.perf_counter()
    reference = run_case(case, seed=seed)
    low = run_case(case, fmt=fmt, seed=seed)
    said: dict[str, Any] = {
        "failing": case.fails_in(fmt),
        "values": {"fp32": reference.value, "low": low.value},
        "fp32": str(reference),
        "low": str(low),
        "low_fails": fails(case, low, reference),
    }
    before = time.perf_counter()
    try:
        plan = advise(case, fmt, seed=seed)
    except Exception as error:  # advice that breaks is a score, too: the other cases go on
        said["error"] = _in_a_line(error)
        return Score(case.name, fmt, **said, seconds=time.perf_counter() - started)
    said["advice_s"] = time.perf_counter() - before
    planned = run_case(case, fmt=fmt, plan=plan, seed=seed)
    said["values"]["planned"] = planned.value
    said |= {"planned": planned.error or str(planned), "passed": not fails(case, planned, reference)}
    said |= judge(case, fmt, plan, *called_modules(case, seed=seed))
    return Score(case.name, fmt, **said, seconds=time.perf_counter() - started)


def advise(case: Case, fmt: str, *, seed: int = 0) -> PrecisionPlan:
    """The plan that precscope recommends for a case where `fmt` and fp32 may be chosen."""
    import precscope as ps

    from .harness import make_task

    trains = case.steps > 0
    settings: dict[str, Any] = {"schedule": "none", "grad_clip": None, "warmup": 0} if trains else {}
    with tempfile.TemporaryDirectory() as folder:
        profile = ps.profile(
            make_task(case, seed=seed), out=folder, steps=max(1, min(case.steps, RECORDED_STEPS)), precision="fp32",
            every=1, train=trains, costs=False, exist="overwrite", seed=seed, note=lambda text: None, **settings,
        )  # fmt: skip
        return ps.recommend(
            profile, formats=(fmt, "fp32"), policy="autocast" if case.mode == "autocast" else "cast", costs="model",
            task=make_task(case, seed=seed), loss_scaling=case.has_loss_scale,
        )  # fmt: skip


def judge(case: Case, fmt: str, plan: PrecisionPlan, names: list[str], leaves: list[str]) -> dict[str, Any]:
    """The fields of a Score that the plan alone decides. names: of all modules. leaves: of those that are scored."""
    high = kept_high(plan, names, fmt, storage=case.mode == "pure")
    accepted, guilty = case.accepts(fmt), case.guilty[fmt]
    return {
        "named": is_named(high, guilty, accepted),
        "high": {n: next((str(r) for r in plan[n].reasons), "") for n in high},
        "needless": needless(high, leaves, guilty, accepted),
        "high_leaves": len(set(high) & set(leaves)),
        "leaves": len(leaves),
        "status": plan.status,
    }


def called_modules(case: Case, *, seed: int = 0) -> tuple[list[str], list[str]]:
    """Names of all modules of a case, and of its leaves: modules without children that a forward pass calls."""
    import torch

    from .harness import make_task

    task = make_task(case, seed=seed)
    names = {m: n for n, m in task.model.named_modules()}
    called: set[str] = set()
    hooks = [
        m.register_forward_pre_hook(lambda module, _inputs: called.add(names[module]))
        for m in names
        if not any(True for _ in m.children())
    ]
    try:
        with torch.enable_grad():
            batch = task.batch(0)
            task.loss(task.model, batch) if case.steps else task.model(*batch)
    finally:
        for hook in hooks:
            hook.remove()
    return list(names.values()), sorted(called)


def _formats(formats: Sequence[str] | str) -> tuple[str, ...]:
    from ..formats import get_format

    asked = [f for f in formats.replace(",", " ").split() if f] if isinstance(formats, str) else list(formats)
    names = tuple(dict.fromkeys(get_format(f).name for f in asked))
    for name in names:
        if name not in FORMATS:
            raise FormatError(f"the zoo is scored in {' and '.join(FORMATS)}, not in {name}")
    if not names:
        raise UsageError(f"formats is empty: give {' or '.join(FORMATS)}")
    return names


def _in_a_line(error: Exception) -> str:
    """What was raised, and where in precscope or torch."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{one_line(error, limit=1000)} ({Path(last.filename).name}:{last.lineno})"


def _finite(value: Any) -> Any:
    """JSON has no NaN: None."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
