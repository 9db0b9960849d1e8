"""From a recorded run to plans: one of 16-bit formats, one that may take e4m3 too."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import precscope as ps
from precscope.applying.scaled import missing_on

from .setting import Setting

PLANS = {"plan": "plan.json", "plan with fp8": "plan-fp8.json"}
"""Name -> the file left in `out`."""


def advice(setting: Setting) -> None:
    """Profile with measured costs, then plans: predicted first, so that a part cut off leaves one; then confirmed."""
    sixteen = ("fp16", "bf16", "fp32") if setting.cuda else ("bf16", "fp32")
    with tempfile.TemporaryDirectory() as folder:
        _advise(setting, sixteen, Path(folder) / "run")


def _advise(setting: Setting, sixteen: tuple[str, ...], run: Path) -> None:
    start = time.perf_counter()
    steps, every = (20, 5) if setting.cuda else (4, 2)
    profile = ps.profile(
        setting.task(), out=run, steps=steps, every=every, note=_say, device=setting.device,
        precision="fp16" if setting.cuda else "bf16", formats=("fp32", "bf16", "fp16", "e4m3"), lr=3e-4,
    )  # fmt: skip
    setting.keep(profile_seconds=time.perf_counter() - start, costs=_costs(profile), fp8=missing_on(setting.device))
    asked = {"plan": sixteen, "plan with fp8": ("e4m3", *sixteen)}
    for name, formats in asked.items():
        plan = ps.recommend(profile, formats=formats)
        plan.save(setting.out / PLANS[name])
        setting.keep(**{name: _describe(plan, 0.0)})
    for name, formats in asked.items():
        if setting.left() < 20 and setting.cuda:
            setting.keep(not_confirmed=f"{name} and what follows: no time left")
            break
        start = time.perf_counter()
        plan = ps.recommend(
            profile, formats=formats, task=setting.task(), note=_say, trial_steps=32 if setting.cuda else 4
        )
        plan.save(setting.out / PLANS[name])
        setting.keep(**{name: _describe(plan, time.perf_counter() - start)})


def _say(text: str) -> None:
    print(f"  {text}", flush=True)


def _describe(plan: ps.PrecisionPlan, seconds: float) -> dict[str, Any]:
    return {"status": plan.status, "says": plan.made_from.get("says"), "counts": dict(plan.counts()),
            "loss_scale": plan.loss_scale, "confirm_seconds": seconds}  # fmt: skip


def _costs(profile: ps.Profile) -> list[dict[str, Any]] | None:
    """A row per module: ms in each format."""
    table = profile.cost
    if table is None:
        return None
    wide = table.pivot_table(index="module", columns="format", values="time_ms", sort=False)
    return [{"module": name, **{f: float(v) for f, v in row.items()}} for name, row in wide.iterrows()]


def plan_of(setting: Setting, name: str) -> Path | None:
    """The file of a plan, None where the part `advice` left none."""
    path = setting.out / PLANS[name]
    return path if path.exists() else None
