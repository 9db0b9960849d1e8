"""Figures as files: one of any kind, or all that a run has something for, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..comparison.runs import read_run
from ..errors import RunDirectoryError, UsageError
from ..plans import PrecisionPlan
from ..profiles import Profile
from ..reporting.rows import site_rows
from ..sites import Role
from . import canvas

_KINDS = ("png", "svg")
_GRADIENTS = ("grad_input", "grad_output", "grad_weight")
_DPI = 150


def save(drawn: Any, path: str | Path) -> Path:
    """Write the figure that `drawn` (Axes, an array of them, or a Figure) belongs to; the ending says how: .png, .svg,
    .pdf. Returns the path. Raises UsageError for another kind of file, RunDirectoryError where it cannot be written."""
    path, figure = Path(path), _figure(drawn)
    if path.suffix.lstrip(".").lower() not in figure.canvas.get_supported_filetypes():
        raise UsageError(f"cannot write a figure as {path.name}: name it .png, .svg or .pdf")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=_DPI, bbox_inches="tight", pad_inches=0.08)
    except OSError as error:
        raise RunDirectoryError(f"cannot write {path} ({error.strerror or error}): choose another place") from error
    return path


def save_all(
    profile: Profile | str | Path,
    out: str | Path,
    *,
    plan: PrecisionPlan | str | Path | None = None,
    runs: Sequence[str | Path] = (),
    format: str | None = None,
    note: Callable[[str], None] | None = None,
) -> tuple[Path, ...]:
    """Write every figure that there is something for into the directory `out`, each as PNG and SVG; their paths.

    A range map for each recorded role, what-if, history and histogram of the largest site, noise budget, plan, and, of
    training runs (`profile` itself where it has a log, and `runs`), losses, loss scales, speed and the comparison.
    format: that the figures ask about; default: the plan's most used low one, else fp16. note: told what was left out,
    and why. Raises UsageError without matplotlib, RunDirectoryError where a file cannot be written.
    """
    plt = canvas.pyplot()
    loaded = canvas.load(profile)
    chosen = PrecisionPlan.load(plan) if isinstance(plan, str | Path) else plan
    written: list[Path] = []
    for name, draw in _figures(loaded, chosen, runs, format or _format(loaded, chosen)):
        try:
            figure = _figure(draw())
        except UsageError as error:
            if note is not None:
                note(f"no figure {name}: {error}")
            continue
        try:
            figure.draw_without_rendering()  # the layout once, and not for each file
            figure.set_layout_engine("none")
            written += [save(figure, Path(out) / f"{name}.{kind}") for kind in _KINDS]
        finally:
            plt.close(figure)
    return tuple(written)


def _figures(
    profile: Profile, chosen: PrecisionPlan | None, runs: Sequence[str | Path], fmt: str
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, what draws it) of each figure that there may be something for."""
    from . import budgets, choices, formats, over_steps, ranges
    from . import runs as training

    k = _scale(profile, chosen) if fmt == "fp16" else 0
    recorded = {s.role for s in profile.sites}
    for role in (r for r in Role if r in recorded):
        scale = k if role.is_gradient else 0
        yield (
            f"ranges-{role.value}",
            lambda r=role, s=scale: ranges.range_map(profile, r.value, format=fmt, scale_exponent=s),
        )
    if recorded:
        forward = [r.value for r in (Role.INPUT, Role.OUTPUT, Role.WEIGHT) if r in recorded]
        yield "what-if-forward", lambda: formats.what_if(profile, fmt, role=forward)
        gradients = [r for r in _GRADIENTS if Role(r) in recorded]
        if gradients:
            yield (
                "what-if-gradients",
                lambda: formats.what_if(profile, fmt, scale_exponent=k, role=gradients, sort="flushed"),
            )
        largest = _largest(profile)
        yield "history", lambda: over_steps.history(profile, largest)
        yield "histogram", lambda: ranges.histogram(profile, largest, format=fmt)
    if profile.shadow is not None:
        low = fmt if fmt in ("bf16", "fp16", "e4m3", "e5m2") else "bf16"
        yield "noise-budget", lambda: budgets.noise_budget(profile, format=low)
    if chosen is not None:
        yield "plan", lambda: choices.plan(chosen, profile)
        if chosen.made_from.get("loss_noise"):
            yield "plan-noise-budget", lambda: budgets.noise_budget(chosen)
    yield from _of_runs(profile, runs, training)


def _of_runs(profile: Profile, runs: Sequence[str | Path], training: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    read = [read_run(Path(run)) for run in runs]
    if (profile.path / "train.parquet").is_file() and profile.path.resolve() not in {r.path.resolve() for r in read}:
        read.insert(0, read_run(profile.path))
    paths = [r.path for r in read]
    if read:
        yield "loss", lambda: training.loss(paths)
    names = [r.name for r in read]
    for i, run in enumerate(read):
        if training.has_scale(run):
            number = f"-{i + 1}" if names.count(run.name) > 1 else ""
            yield f"loss-scale-{run.name}{number}", lambda p=run.path: training.loss_scale(p)
    if len(runs) > 1:
        yield "comparison", lambda: training.comparison(list(runs))
        yield "speed", lambda: training.speed(list(runs))


def _format(profile: Profile, chosen: PrecisionPlan | None) -> str:
    """The format in question: that of most modules which the plan runs low, else fp16."""
    if chosen is not None:
        counts = chosen.counts(profile.modules or None)
        low = [f for f, _ in counts.most_common() if f not in ("fp32", "tf32")]
        if low:
            return low[0]
    return "fp16"


def _scale(profile: Profile, chosen: PrecisionPlan | None) -> int:
    """The exponent of the plan's loss scale, else of the last one that was divided out of gradients; 0 without one."""
    initial = chosen.loss_scale.get("initial") if chosen is not None else None
    if not initial:
        role = next((r for r in _GRADIENTS if r in {s.role.value for s in profile.sites}), None)
        frame = profile.history(("step", "loss_scale"), roles=(role,)) if role is not None else ()
        initial = float(frame.loss_scale[frame.step == frame.step.max()].iloc[-1]) if len(frame) else 1.0
    return int(np.frexp(initial)[1]) - 1 if initial > 0 else 0


def _largest(profile: Profile) -> str:
    """The site with the largest output, else with the largest value."""
    sites = site_rows(profile)[1]
    outputs = [s for s in sites if s.role == Role.OUTPUT.value]
    return max(outputs or sites, key=lambda s: s.amax).name


def _figure(drawn: Any) -> Any:
    if hasattr(drawn, "savefig"):
        return drawn
    return np.ravel(np.asarray(drawn, dtype=object))[0].figure
