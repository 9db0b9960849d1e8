"""The order of things: profile, recommend, time the candidates, choose, add up gradients, read off the loss scale."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..confirmation import recommend
from ..errors import UsageError
from ..formats import get_format
from ..plans import LayerPrecision, PrecisionPlan
from ..profiles import Profile
from ..profiling import profile
from ..reporting.numbers import bytes_text
from ..tasks import Task, TaskRef, load_task
from . import candidates as timing
from .candidates import Candidate
from .result import Tuning, parse_bytes
from .scaling import choose_growth, half_modules
from .sums import TOLERANCE, Sums, measure_sums, stalled

GAIN = 1.02
"""What low precision must gain over fp32 in whole steps: less is not worth another format."""
_UNTRIED = "nothing speaks against it, but it was not tried on the model: another choice is predicted faster"

_FORMATS = ("fp16", "bf16", "fp32")
_LEAST_STEPS, _RECORDED = 10, 8  # fewest steps of a profile; how many of them are recorded

Note = Callable[[str], None]


def tune(
    task: str | TaskRef | Task | Callable[..., Task],
    *,
    steps: int = 50,
    formats: Sequence[str] = _FORMATS,
    accumulate: int | None = None,
    effective_batch: int | None = None,
    batch: int | None = None,
    memory: int | str | None = None,
    train_steps: int = 500,
    out: str | Path | None = None,
    exist: str = "error",
    seed: int = 0,
    lr: float | None = None,
    rounds: int = timing.ROUNDS,
    trial_steps: int = 32,
    note: Note | None = None,
) -> Tuning:
    """Choose format, loss scale and gradient accumulation for a task on this device, from a short profile.

    task: the function that makes it, by name or itself: several runs start equal, on a new model each. steps: of the
    profile. formats: what may be chosen, of fp32, bf16 and fp16. accumulate: micro-batches (batches of the task) per
    optimizer step; or effective_batch: the wanted examples per step, of which each batch of the task holds `batch`
    (None: the first dimension of its first tensor). memory: limit in bytes, or "4GiB", for one micro-batch.
    train_steps: length of the run to come. out, exist: keep the profile in this directory, see `ps.profile` (None: it
    is thrown away). rounds: of timing, 8 steps each. trial_steps, note: as in `recommend`. lr, seed: as in `ps.train`.

    The plan that `recommend` confirms is timed in whole training steps beside fp32 and plain autocast. What may be
    chosen is fp32, the plan, and plain autocast where the plan is just that; the fastest of those that fit is, where it
    gains more than 2% over fp32.

    Raises UsageError and TaskError for what cannot be done as asked, TrainingError where the task cannot train.
    """
    ref = _factory(task)
    names = _formats(formats)
    _check_counts(accumulate, effective_batch, steps=steps, train_steps=train_steps, batch=batch, rounds=rounds)
    limit = parse_bytes(memory) if memory is not None else None
    count, examples = _micro_batches(ref, accumulate, effective_batch, batch, seed)
    common: dict[str, Any] = {"seed": seed, "lr": lr}
    with tempfile.TemporaryDirectory() if out is None else nullcontext(str(out)) as folder:
        recorded, kept = _profiled(ref, folder, exist, steps, count, names, note, common)
        plan = recommend(kept, formats=names, task=recorded, trial_steps=trial_steps, note=note)
        found = _timed(ref, plan, names, rounds, note, common)
        better = _hopeful(plan, found)
        if better is not None:  # whole steps gain what single modules did not promise
            asked = {"formats": (better, "fp32"), "costs": "model", "trial_steps": trial_steps}
            plan = recommend(kept, task=recorded, note=note, **asked)
            found = _timed(ref, plan, names, rounds, note, common)
        choice, split, why = _chosen(found, limit)
        chosen = _plan_of(choice, plan)
        accumulated = count * split
        chosen, scale_words = _scaled(chosen, kept, train_steps)
        sums: dict[str, Sums] = {}
        against = {f: stalled(kept, f) for f in ("bf16", "fp16")}
        if accumulated > 1:
            _say(note, f"adding up the gradients of {min(accumulated, 256)} micro-batches")
            fresh = ref.make(seed=seed)
            sums = measure_sums(fresh, accumulated, scale=chosen.loss_scale.get("initial", 2.0**16))
    reasons = [why, _of_plan(plan), *scale_words, *_of_sums(accumulated, sums, against)]
    if effective_batch is not None and count * (examples or 0) != effective_batch:
        reasons.append(
            f"{count} micro-batches of {examples} make {count * (examples or 0)} examples per step, and not "
            f"{effective_batch}: batches are not cut"
        )
    if limit is not None:
        reasons.append(_of_memory(next(c for c in found if c.name == choice), limit, count, split, examples))
    return Tuning(
        task=ref.name, choice=choice, plan=chosen, accumulate=accumulated, candidates=tuple(found),
        reasons=tuple(r for r in reasons if r), steps=train_steps, split=split, examples=examples, memory_limit=limit,
        sums=sums, lr=lr, seed=seed,
    )  # fmt: skip


def _factory(task: Any) -> TaskRef:
    if isinstance(task, Task):
        owner = getattr(task.factory, "__self__", None)
        if not isinstance(owner, TaskRef):
            raise UsageError(
                "tune trains several models that start equal and needs the function that makes the task, not one "
                "task: give the function, or its name (file.py:function)"
            )
        return owner
    return load_task(task)


def _formats(formats: Sequence[str]) -> tuple[str, ...]:
    if isinstance(formats, str):
        formats = [f for f in formats.replace(",", " ").split() if f]
    names = tuple(dict.fromkeys(get_format(f).name for f in formats))
    unknown = [f for f in names if f not in _FORMATS]
    if unknown or "fp32" not in names:
        what = f"not {unknown[0]}" if unknown else "and fp32 must be among them, as the way out"
        raise UsageError(f"tune chooses from {', '.join(_FORMATS)}, {what}: --formats fp16,bf16,fp32")
    return names


def _check_counts(accumulate: int | None, effective: int | None, **others: int | None) -> None:
    if accumulate is not None and effective is not None:
        raise UsageError("give accumulate (micro-batches) or effective_batch (examples), not both")
    for name, value in {"accumulate": accumulate, "effective_batch": effective, **others}.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UsageError(f"{name} must be an integer of at least 1, not {value!r}")


def _micro_batches(
    ref: TaskRef, accumulate: int | None, effective: int | None, batch: int | None, seed: int
) -> tuple[int, int | None]:
    """(micro-batches per step, examples in each where that is known)."""
    from torch.utils._pytree import tree_leaves

    task = ref.make(seed=seed)
    shapes = [t.shape for t in tree_leaves(task.batch(0)) if hasattr(t, "shape")]
    examples = batch if batch is not None else next((int(s[0]) for s in shapes if len(s)), None)
    if effective is None:
        return accumulate or task.accumulate, examples
    if examples is None:
        raise UsageError(
            "cannot see how many examples a batch of this task holds: give batch=, or accumulate= in micro-batches"
        )
    return math.ceil(effective / examples), examples


def _profiled(
    ref: TaskRef,
    folder: str,
    exist: str,
    steps: int,
    count: int,
    formats: tuple[str, ...],
    note: Note | None,
    common: dict[str, Any],
) -> tuple[Task, Profile]:
    """A run in bf16 (fp32's range, so that nothing is censored) where that may be chosen; (its task, its profile).

    As many steps as asked for where accumulation does not make them dear: else fewer, at least 10.
    """
    task = ref.make(seed=common["seed"])
    run = max(min(steps, _LEAST_STEPS), min(steps, 4 * steps // count))
    precision = "bf16" if "bf16" in formats else "fp16" if "fp16" in formats else "fp32"
    _say(note, f"profiling {run} steps in {precision}")
    kept = profile(
        task, out=folder, steps=run, precision=precision, every=max(1, run // _RECORDED), exist=exist,
        accumulate=count, formats=formats, note=note, **common,
    )  # fmt: skip
    return task, kept


def _timed(
    ref: TaskRef, plan: PrecisionPlan, formats: tuple[str, ...], rounds: int, note: Note | None, common: dict[str, Any]
) -> list[Candidate]:
    """fp32 first, plain autocast in each low format, and the plan where it is none of these; who may be chosen."""
    uniform = _uniform(plan)
    runs: dict[str, PrecisionPlan | None] = {"fp32": None, **{f: None for f in formats if f != "fp32"}}
    if uniform is None:
        runs["plan"] = plan
    found = timing.measure(ref, runs, rounds=rounds, note=note, **common)
    return [_judged(c, plan, uniform) for c in found]


def _judged(candidate: Candidate, plan: PrecisionPlan, uniform: str | None) -> Candidate:
    """Plain autocast may be chosen where the confirmed plan is just that."""
    if candidate.name == "fp32" or not candidate.safe:
        return candidate
    if candidate.name in ("plan", uniform):
        kept = plan.status == "confirmed"
        return candidate if kept else _with(candidate, "the plan was not confirmed on the model")
    against = [(n, layer) for n, layer in plan.modules.items() if candidate.name in layer.evidence.get("forbidden", ())]
    if against:
        name, layer = against[0]
        more = f" and {len(against) - 1} more" if len(against) > 1 else ""
        said = [str(r) for r in layer.reasons if candidate.name in str(r)] or [str(r) for r in layer.reasons]
        return _with(candidate, f"not safe for {name or '(root)'}{more}: {said[0] if said else 'see the plan'}")
    return _with(candidate, _UNTRIED)


def _with(candidate: Candidate, why: str) -> Candidate:
    return replace(candidate, safe=False, note=why)


def _hopeful(plan: PrecisionPlan, found: Sequence[Candidate]) -> str | None:
    """The fastest low format, where the plan is fp32 for want of gain and whole steps gain."""
    if _uniform(plan) != "fp32":
        return None
    base = found[0].step_ms
    open_ = [c for c in found[1:] if c.step_ms * GAIN < base and c.note == _UNTRIED]
    return min(open_, key=lambda c: c.step_ms).name if open_ else None


def _uniform(plan: PrecisionPlan) -> str | None:
    """The one format that all modules compute in, None where they differ."""
    used = {layer.compute for layer in plan.modules.values()} | {plan.default.compute}
    return next(iter(used)) if len(used) == 1 else None


def _chosen(found: Sequence[Candidate], limit: int | None) -> tuple[str, int, str]:
    """(name, split, why): the fastest that may be chosen and fits; where none fits as it is, the one that needs the
    fewest parts."""
    safe = [c for c in found if c.safe]
    splits = {c.name: _parts(c, limit) for c in safe}
    fitting = [c for c in safe if splits[c.name] is not None]
    if not fitting:
        needs = min(c.fixed_bytes for c in safe)
        raise UsageError(
            f"a memory limit of {bytes_text(limit or 0)} is too small: parameters, gradients and optimizer state alone "
            f"need {bytes_text(needs)}; raise it, or shard the model over devices"
        )
    fewest = min(splits[c.name] or 1 for c in fitting)
    rivals = [c for c in fitting if splits[c.name] == fewest]
    base, best = found[0], min(rivals, key=lambda c: c.step_ms)
    if base in rivals and best.step_ms * GAIN >= base.step_ms:
        best = base
    return best.name, fewest, _words(best, base, found, rivals)


def _words(best: Candidate, base: Candidate, found: Sequence[Candidate], rivals: Sequence[Candidate]) -> str:
    fastest = min((c for c in found[1:] if c.step_ms == c.step_ms), key=lambda c: c.step_ms, default=None)
    if best is base:
        if fastest is None:
            return "fp32: it is all that may be chosen"
        speed = base.step_ms / fastest.step_ms
        said = f"stay with fp32: a step takes {base.step_ms:.4g} ms, and {fastest.name} {fastest.step_ms:.4g} ms"
        if speed > GAIN and not fastest.safe:
            return f"{said}, but {fastest.name} may not be chosen ({fastest.note})"
        return f"{said} ({speed:.2f} times as fast): low precision gains nothing on this device"
    said = f"{best.name}: a step takes {best.step_ms:.4g} ms, in fp32 {base.step_ms:.4g} ms"
    said += f" ({base.step_ms / best.step_ms:.2f} times as fast)"
    if base in rivals and best.slowest_ms >= base.fastest_ms:
        said += ", but the rounds overlap: with other work on the machine this may be chance (--rounds 9 tells)"
    if base not in rivals:
        said += ", and fp32 does not fit the memory limit"
    if fastest is not None and fastest is not best and not fastest.safe and fastest.step_ms < best.step_ms:
        said += f"; {fastest.name} takes {fastest.step_ms:.4g} ms but may not be chosen ({fastest.note})"
    return said


def _parts(candidate: Candidate, limit: int | None) -> int | None:
    """Into how many parts a micro-batch must be cut to fit, None where no cut helps."""
    if limit is None or candidate.memory_bytes <= limit:
        return 1
    left = limit - candidate.fixed_bytes
    return math.ceil(candidate.activation_bytes / left) if left > 0 else None


def _plan_of(choice: str, plan: PrecisionPlan) -> PrecisionPlan:
    """The plan of a choice: one default where one format does for all."""
    if choice == "plan":
        return plan
    kept: dict[str, Any] = (
        {"confirmed": plan.confirmed, "made_from": plan.made_from} if _uniform(plan) == choice else {}
    )
    kept |= {"loss_scale": plan.loss_scale} if choice == "fp16" else {}
    return PrecisionPlan(default=LayerPrecision(choice), **kept)


def _scaled(plan: PrecisionPlan, kept: Profile, steps: int) -> tuple[PrecisionPlan, list[str]]:
    """The plan with its loss scale tuned, and why."""
    half = half_modules(kept, plan)
    if not half:
        return plan, ["no loss scale is needed: nothing computes in fp16"]
    growth = choose_growth(kept, half, steps=steps)
    scale = {**plan.loss_scale, "growth_interval": growth.interval}
    words = []
    if "interval" in scale:
        lo, hi = (int(e) for e in scale["interval"])
        ends = f"{scale.get('lo_site')} needs at least 2^{lo}, {scale.get('hi_site')} bears at most 2^{hi}"
        start = f"loss scale: start at 2^{math.log2(scale['initial']):g}; recorded gradients allow 2^{lo} to 2^{hi} "
        start += f"({ends})"
        words.append(start if lo <= hi else f"{start}: no single scale suits all, so some gradients will be lost")
    words.append(f"growth interval {growth.interval}: {growth.text}")
    return plan.replace(loss_scale=scale), words


def _of_plan(plan: PrecisionPlan) -> str:
    said = str(plan.made_from.get("says", "")).strip()
    return f"the plan ({plan.status}): {said}" if said else ""


def _of_sums(count: int, sums: dict[str, Sums], against: dict[str, list[str]]) -> list[str]:
    if count == 1:
        return ["one micro-batch per step: nothing is summed up"]
    words = [
        f"accumulate {count} micro-batches: with fp32 parameters (autocast) gradients are summed in fp32, which keeps "
        "such sums"
    ]
    for fmt, found in sums.items():
        fits = found.survives and not against[fmt]
        verdict = "would do" if fits else f"would need an fp32 accumulator ({TOLERANCE:.0%} are tolerated)"
        words.append(
            f"parameters stored in {fmt} {verdict}: {found}" + (f". {against[fmt][0]}" if against[fmt] else "")
        )
    return words


def _of_memory(chosen: Candidate, limit: int, count: int, split: int, examples: int | None) -> str:
    needs = f"{bytes_text(chosen.memory_bytes)} for one micro-batch in {chosen.name} ({bytes_text(chosen.fixed_bytes)} "
    needs += f"stay, {bytes_text(chosen.activation_bytes)} are kept for the backward pass)"
    if split > 1:
        to = f" to {examples // split} examples" if examples and examples >= split else ""
        return (
            f"memory: {needs}, more than the limit of {bytes_text(limit)}: make the task's batches {split} times "
            f"smaller{to}; {count} x {split} = {count * split} micro-batches then give the same step"
        )
    room = (limit - chosen.fixed_bytes) // max(chosen.activation_bytes, 1)
    more = ""
    if count > 1 and room >= 2:
        larger = int(min(room, count))
        more = f"; batches {larger} times as large would fit too, with {math.ceil(count / larger)} per step"
    return f"memory: {needs} fits the limit of {bytes_text(limit)}{more}"


def _say(note: Note | None, text: str) -> None:
    if note is not None:
        note(text)
