"""The top of a report: title, the one sentence to read, and the headline figures."""

from __future__ import annotations

from ..formats import FloatFormat, get_format
from ..profiles import Profile
from .material import FORWARD, GRADIENTS, WIDE, Material, head_room, known, listed, overall, signed, site_name
from .numbers import bytes_text, count_text, figure, fixed, number, percent, plural, power_of_two
from .rows import Fact


def default_title(profile: Profile) -> str:
    """The model's name, or the run directory's."""
    return str(profile.run.get("model") or profile.path.name or "a recorded run")


def subtitle(profile: Profile) -> str:
    """What was recorded, in one line."""
    run, steps = profile.run, profile.steps
    parts = [f"run {profile.path.name}" if profile.path.name else ""]
    if run.get("precision"):
        parts.append(f"{'inference' if run.get('mode') == 'inference' else 'trained'} in {run['precision']}")
    if run.get("parameters"):
        parts.append(f"{count_text(run['parameters'])} parameters")
    parts.append(f"{plural(len(steps), 'step')} recorded" + (f", from {steps[0]} to {steps[-1]}" if steps else ""))
    parts.append(f"{plural(len(profile.modules), 'module')}")
    parts.append(str(run.get("device_name") or run.get("device") or ""))
    return " · ".join(p for p in parts if p)


def main_format(material: Material) -> str:
    """The format that the explorer opens with: the plan's most used low one, else fp16."""
    return material.formats[0].name


def lead(material: Material) -> str:
    """The one sentence to read."""
    if material.plan is None:
        return _lead_without_plan(material)
    total, low, share = len(material.rows), material.low, material.low_share
    of_flops = f", {percent(share)}% of the FLOPs" if share is not None else ""
    if not low:
        kept = listed(sorted({r.compute for r in material.high})) or "fp32"
        return f"The plan keeps all {plural(total, 'module')} in {kept}: nothing is gained or allowed in low precision."
    formats = listed([f.name for f in material.formats])
    can = "run" if material.plan_run is not None else "can run"
    if not material.high:
        return f"All {plural(total, 'module')} {can} in {formats}{of_flops}."
    kept = listed(sorted({r.compute for r in material.high}))
    stay = "stays" if len(material.high) == 1 else "stay"
    return (
        f"{len(low)} of {plural(total, 'module')} {can} in {formats}{of_flops}; {len(material.high)} {stay} in {kept}."
    )


def _lead_without_plan(material: Material) -> str:
    answers, broken = [], False
    for fmt in material.formats:
        frame = material.ask(fmt, FORWARD)
        bad = int((frame.overflow_lo > 0).sum())
        broken = broken or bool((frame.nonfinite > 0).any())
        if not len(frame):
            return "Nothing was recorded yet: the run holds no statistics."
        if bad:
            answers.append(f"{fmt} would overflow at {bad} of {plural(len(frame), 'forward tensor')}")
        else:
            answers.append(f"{fmt} holds all {plural(len(frame), 'forward tensor')}")
    said = "The run failed. " if material.failed else ""
    said += "Of the values that were finite: " if broken else ""
    return said + "; ".join(answers) + ". No plan was made yet."


def facts(material: Material) -> tuple[Fact, ...]:
    """The headline figures, four at most."""
    found: list[Fact | None] = []
    if material.plan is not None:
        share = material.low_share
        of_modules = len(material.low) / max(len(material.rows), 1)
        label = "FLOPs in low precision" if share is not None else "Modules in low precision"
        value = f"{percent(of_modules if share is None else share)}%"
        found.append(Fact(label, value, f"{len(material.low)} of {plural(len(material.rows), 'module')}"))
        found.append(_speed_fact(material))
    run, base = material.plan_run, material.base_run
    if run is not None and known(run.eval_loss):
        against = (
            ""
            if base is None or run is base or not known(run.eval_change)
            else f"{signed(run.eval_change)} against {base.precision}"
        )
        found.append(Fact("Held-out loss with the plan", figure(run.eval_loss), against))
    scale = material.plan.loss_scale if material.plan is not None else {}
    if scale.get("initial"):
        lo, hi = scale.get("interval") or (None, None)
        safe = f"safe from 2^{lo:g} to 2^{hi:g}" if lo is not None else ""
        found.append(Fact("Loss scale", power_of_two(scale["initial"]), safe))
    if run is not None and known(run.peak_memory_bytes):
        against = "" if base is None or run is base else f"{base.precision} {bytes_text(base.peak_memory_bytes)}"
        found.append(Fact("Peak memory with the plan", bytes_text(run.peak_memory_bytes), against))
    if len([f for f in found if f]) < 4:
        found.append(_headroom_fact(material))
    if material.plan is None:
        found.append(_flushed_fact(material))
    return tuple(f for f in found if f)[:4]


def _speed_fact(material: Material) -> Fact | None:
    run, base = material.plan_run, material.base_run
    if run is not None and base is not None and run is not base and known(run.speed):
        note = f"{number(run.step_time_ms)} ms per step, {base.precision} {number(base.step_time_ms)}"
        return Fact(f"Speed against {base.precision}, measured", f"{run.speed:.2f}×", note)
    made_from = dict(material.plan.made_from or {}) if material.plan is not None else {}
    predicted = made_from.get("predicted_ms", {})
    if predicted.get("fp32") and predicted.get("plan"):
        how = "from measured module times" if made_from.get("costs") == "measured" else "by a cost model"
        return Fact("Speed against fp32, predicted", f"{predicted['fp32'] / predicted['plan']:.2f}×", how)
    return None


def _headroom_fact(material: Material) -> Fact | None:
    worst = _tightest(material)
    if worst is None:
        return None
    room, fmt, site = worst
    label = f"Least head-room in {fmt}" if room >= 0 else f"Furthest beyond {fmt}"
    return Fact(label, f"{fixed(abs(room))} binades", site)


def _flushed_fact(material: Material) -> Fact | None:
    frame = material.ask(get_format("fp16"), GRADIENTS)
    share = overall(frame, "flushed")
    return None if share is None else Fact("Gradients that fp16 flushes", f"{percent(share)}%", "without a loss scale")


def _tightest(material: Material) -> tuple[float, FloatFormat, str] | None:
    """(binades, format, site) of the forward tensor with the least head-room in its format."""
    found = []
    for fmt in (f for f in material.formats if f.bits > 8 and f.emax < WIDE):
        frame = material.ask(fmt, FORWARD)
        frame = frame[frame.amax > 0]
        if len(frame):
            worst = frame.loc[frame.amax.idxmax()]
            room, site = head_room(fmt, worst.amax), site_name(worst)
            maker = next(iter(material.nearest(fmt)), None)
            if maker is not None and maker.binades - room < 0.25:  # name what makes the value, not what hands it on
                room, site = maker.binades, str(maker.site)
            found.append((room, fmt, site))
    return min(found, key=lambda f: f[0], default=None)
