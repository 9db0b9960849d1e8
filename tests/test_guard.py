"""The guard: what it sees, what it does, and that a run it has nothing to say about is not touched."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from guarded import CASES, STEPS, growing, noisy
from torch import nn

from precscope.errors import RunDirectoryError, TrainingError, UsageError
from precscope.plans import LayerPrecision, PrecisionPlan
from precscope.plans.model import Phase
from precscope.profiles import Profile
from precscope.recording import record
from precscope.replaying import replay
from precscope.tasks import Task, make_task
from precscope.tracing import trace
from precscope.training import train
from precscope.training.guard import Event, GuardConfig, read_events
from precscope.training.guard.actions import NormLimit
from precscope.training.guard.amending import EVERYTHING, OUTSIDE, Names, Promotion, amended
from precscope.training.guard.events import EventLog
from precscope.training.guard.signals import Signals
from precscope.training.halfmatmul import half_matmul_through_fp32
from precscope.training.log import Row, read_log
from precscope.training.tasks.gpt import gpt

pytestmark = pytest.mark.filterwarnings("ignore:guard, step:RuntimeWarning")
RUN = {"steps": STEPS, "lr": 3e-3}
NAMED = ("middle", "attention", "squares")


def parameters(task: Task) -> torch.Tensor:
    return nn.utils.parameters_to_vector(task.model.parameters()).detach().clone()


def actions(out) -> list[tuple[str, str, str]]:
    return [(e.kind, e.action, e.module) for e in read_events(out)]


@pytest.fixture(scope="module")
def in_fp32() -> dict[str, float]:
    return {name: train(growing(name), precision="fp32", **RUN).eval_loss for name in NAMED}


def first_overflow(name: str) -> int:
    """The first step of a plain fp16 run whose forward pass overflows, found without the guard."""
    found: list[int] = []
    task = growing(name, after=lambda model, step: look(step + 1))

    def look(step: int) -> None:
        if found or step < 30:
            return
        low = torch.autocast("cpu", torch.float16)
        with torch.no_grad(), half_matmul_through_fp32(), trace(task.model) as tracer, low:
            task.loss(task.model, task.batches[step % 8])
        if tracer.first_nonfinite is not None:
            found.append(step)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(task, precision="fp16", **RUN)
    return found[0]


# driven into overflow


@pytest.mark.parametrize("name", NAMED)
def test_a_module_driven_into_overflow_is_named_and_promoted_and_the_run_ends_as_in_fp32(name, in_fp32, tmp_path):
    guilty, began = CASES[name][1], first_overflow(name)
    result = train(growing(name), precision="fp16", guard="promote", out=tmp_path / "run", **RUN)
    events = read_events(tmp_path / "run")
    assert [e.module for e in events] == [guilty] * len(events)
    assert began <= events[0].step <= began + 5
    promoted = [e for e in events if e.action == "promote"]
    assert len(promoted) == 1 and promoted[0].step <= began + 5
    assert promoted[0].op.startswith("aten.") and "beyond fp16's 65504" in promoted[0].text
    assert result.eval_loss == pytest.approx(in_fp32[name], rel=0.02)

    plan = PrecisionPlan.load(tmp_path / "run" / "plan.json")
    assert plan == result.plan and plan[guilty].compute in ("bf16", "fp32") and plan.default.compute == "fp16"
    assert plan[guilty].reasons[0].code == "guard"
    assert PrecisionPlan.load(tmp_path / "run" / "plan-start.json") == PrecisionPlan.uniform("fp16")
    assert PrecisionPlan.load(tmp_path / "run" / promoted[0].plan) == plan

    try:  # without the guard, and with the amended plan from the beginning
        assert train(growing(name), precision="fp16", **RUN).eval_loss > 1.5 * in_fp32[name]
    except TrainingError as error:
        assert "not finite at 3 consecutive steps" in str(error)
    again = train(growing(name), plan=plan, **RUN)
    assert again.nonfinite_steps == 0 and again.eval_loss == pytest.approx(in_fp32[name], rel=0.02)


def test_promoted_within_the_module_only():
    """Attention's own code goes up, its linear layers stay: their outputs are not what overflowed."""
    result = train(growing("attention"), precision="fp16", guard="promote", **RUN)
    assert result.plan["attention"].compute == "bf16"
    assert {result.plan[f"attention.{n}"].compute for n in ("query", "key", "value")} == {"fp16"}


def test_what_comes_to_light_later_is_promoted_too(tmp_path):
    train(growing("stream"), precision="fp16", guard="promote", out=tmp_path / "run", **RUN)
    promoted = [e.module for e in read_events(tmp_path / "run") if e.action == "promote"]
    plan = PrecisionPlan.load(tmp_path / "run" / "plan.json")
    assert promoted[0] == "left" and {plan["left"].compute, plan["right"].compute} == {"bf16"}
    assert plan["head"].compute == "fp16"
    assert len(list((tmp_path / "run").glob("plan-0*.json"))) == len(promoted)


def test_going_back_loses_no_step(in_fp32, tmp_path):
    guard = GuardConfig(action="rollback")
    out = tmp_path / "run"
    result = train(growing("middle"), precision="fp16", guard=guard, out=out, checkpoint_every=25, **RUN)
    assert result.skipped_steps == 0 and [r.step for r in read_log(out)] == list(range(STEPS))
    assert result.eval_loss == pytest.approx(in_fp32["middle"], rel=0.02)
    events = read_events(out)
    assert [e.action for e in events] == ["none", "rollback", "promote"]
    assert events[1].numbers["to"] == 25 and events[2].step == events[0].step, "before the failing step is taken"
    failing = events[0].step
    assert Profile.load(out).steps == list(range(failing - 5, failing + 5)), "the replayed steps are recorded, too"


def test_going_back_in_memory_without_a_run_directory(in_fp32):
    guard = GuardConfig(action="rollback", snapshot_every=20)
    result = train(growing("squares"), precision="fp16", guard=guard, **RUN)
    assert result.eval_loss == pytest.approx(in_fp32["squares"], rel=0.02)


def test_warn_changes_nothing(tmp_path):
    kept = []
    for guard in (None, "warn"):
        task = growing("middle")
        out = tmp_path / str(guard)
        with pytest.raises(TrainingError, match="3 consecutive steps"):
            train(task, precision="fp16", guard=guard, out=out, **RUN)
        kept.append((parameters(task), [r.loss for r in read_log(out)]))
    assert torch.equal(kept[0][0], kept[1][0])
    assert str(kept[0][1]) == str(kept[1][1])  # NaN equals NaN so
    assert actions(tmp_path / "warn") == [("overflow", "warn", "wide")] * 2, "known by then"
    assert not (tmp_path / "warn" / "plan.json").exists()


def test_warns_in_words():
    with pytest.warns(RuntimeWarning, match=r"guard, step \d+: wide, forward: .* beyond fp16's 65504. From here"):
        train(growing("middle"), precision="fp16", guard="promote", **RUN)


# a healthy run


@pytest.mark.parametrize(
    ("action", "precision"), [("skip", "fp32"), ("promote", "bf16"), ("promote", "fp16"), ("rollback", "fp16")]
)
def test_a_guard_that_sees_nothing_changes_nothing(action, precision, tmp_path):
    tiny = partial(make_task, partial(gpt, "tiny"))
    runs = []
    for guard in (None, GuardConfig(action=action, snapshot_every=5)):
        task = tiny()
        out = tmp_path / str(guard is None)
        result = train(task, precision=precision, steps=14, guard=guard, out=out, checkpoint_every=6)
        runs.append((result.losses, result.eval_loss, result.scale_history, parameters(task)))
    assert runs[0][:3] == runs[1][:3] and torch.equal(runs[0][3], runs[1][3])
    assert read_events(out) == [] and not (out / "plan.json").exists()


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_noise_raises_no_alarm(seed, heavy, tmp_path):
    plain = noisy(seed, heavy=heavy)
    train(plain, precision="fp16", steps=100, lr=3e-3)
    task = noisy(seed, heavy=heavy)
    train(task, precision="fp16", steps=100, lr=3e-3, guard="promote", out=tmp_path / "run")
    assert read_events(tmp_path / "run") == []
    assert torch.equal(parameters(task), parameters(plain)), "a look at a suspect leaves no trace"


# resuming


@pytest.mark.parametrize(("action", "dies"), [
    pytest.param("promote", 41, marks=pytest.mark.slow), ("promote", 65), ("rollback", 55)
])  # fmt: skip
def test_a_killed_run_under_a_guard_resumes_bit_identically(action, dies, tmp_path):
    def run(out, task, **more):
        guard = GuardConfig(action=action, quiet_steps=30)
        return train(task, precision="fp16", guard=guard, out=out, checkpoint_every=10, **RUN, **more)

    whole = growing("middle")
    run(tmp_path / "whole", whole)

    def die(model, step):
        if step == dies:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", growing("middle", after=die))
    with open(tmp_path / "killed" / "events.jsonl", "ab") as file:
        file.write(b'{"step": 3, "ki')  # as a kill may leave it
    task = growing("middle")
    run(tmp_path / "killed", task, resume=True)
    assert torch.equal(parameters(task), parameters(whole))
    losses = [[str(r.loss) for r in read_log(tmp_path / name)] for name in ("killed", "whole")]  # NaN is "nan"
    assert losses[0] == losses[1]
    plans = [PrecisionPlan.load(tmp_path / name / "plan.json") for name in ("whole", "killed")]
    assert plans[0] == plans[1]
    events = read_events(tmp_path / "killed")
    assert sum(e.kind == "resume" for e in events) == 1
    told = [(e.step, e.action, e.text) for e in read_events(tmp_path / "whole")]
    assert [t for t in told if t not in [(e.step, e.action, e.text) for e in events]] == []


# signals


def rows(*figures: tuple[float, float, float]) -> list[Row]:
    """Of (loss, norm, scale) each."""
    return [
        Row(i, loss, 1e-3, scale, not math.isfinite(norm), not math.isfinite(loss), norm, 1.0, 0)
        for i, (loss, norm, scale) in enumerate(figures)
    ]


def seen(figures, *, scaled=True, **config) -> list[tuple[str, int]]:
    signals = Signals(GuardConfig(**config))
    found = [(signals.see(row, scaled=scaled), row.step) for row in rows(*figures)]
    return [(signal.kind, step) for signal, step in found if signal is not None]


def test_the_first_falls_of_a_loss_scale_are_expected():
    falling = [(1.0, math.inf, 2.0 ** (16 - i)) for i in range(11)]
    assert seen([*falling, *[(1.0, 1.0, 32.0)] * 50]) == []
    assert seen([(1.0, math.inf, 2.0 ** (16 - i)) for i in range(13)]) == [("scale", 11)], "these do not end"


def test_a_settled_loss_scale_that_does_not_recover_is_an_alarm():
    scale, figures = 65536.0, [(1.0, 1.0, 65536.0)] * 30
    for _ in range(6):
        figures += [(1.0, math.inf, scale), (1.0, 1.0, scale / 2)]
        scale /= 2
    assert seen(figures) == [("scale", 40)]
    one = [(1.0, 1.0, 65536.0)] * 30 + [(1.0, math.inf, 131072.0)] + [(1.0, 1.0, 65536.0)] * 30
    assert seen(one * 6) == [], "grows and falls back: that is how a loss scale lives"


def test_a_loss_that_is_not_finite_is_an_alarm_at_once():
    assert seen([(1.0, 1.0, 1.0), (math.nan, math.nan, 1.0)]) == [("overflow", 1)]
    assert seen([(1.0, math.inf, 1.0)], scaled=False) == [("overflow", 0)], "without a loss scale a gradient, too"


def test_a_spike_needs_loss_and_norm_for_several_steps():
    draw = torch.Generator().manual_seed(0)
    quiet = [(1 + 0.1 * a, math.exp(0.2 * b), 1.0) for a, b in torch.randn(80, 2, generator=draw).tolist()]
    spike = (9.0, 60.0, 1.0)
    assert seen(quiet + [spike] * 2 + quiet[:10], scaled=False) == []
    assert seen(quiet + [spike] * 3, scaled=False) == [("spike", 82)]
    assert seen(quiet + [(9.0, 1.0, 1.0)] * 3, scaled=False) == [("suspect", 82)], "worth a look, no more"


def test_state_of_the_signals_goes_through_a_checkpoint():
    draw = torch.Generator().manual_seed(0)
    figures = rows(*((a, abs(b), 8.0) for a, b in torch.randn(90, 2, generator=draw).tolist()))
    signals, later = Signals(GuardConfig()), Signals(GuardConfig())
    for row in figures:
        signals.see(row, scaled=True)
    later.load_state_dict(json.loads(json.dumps(signals.state_dict())))
    assert later.state_dict() == signals.state_dict()


# whose fault it is


def test_too_high_a_loss_scale_is_no_modules_fault(tmp_path):
    """The loss grows, and all gradients with it: the scale comes down, and nothing is promoted."""
    task = growing("middle")
    task.after_step = None
    plain = task.loss
    factor = {"now": 1.0}
    task.loss = lambda model, batch: plain(model, batch) * factor["now"]

    def grow(model, step):
        factor["now"] = 2.0 ** max(0, min(step - 30, 14))

    task.after_step = grow
    train(task, precision="fp16", guard="promote", out=tmp_path / "run", steps=70, initial_scale=2.0**15)
    events = read_events(tmp_path / "run")
    assert {(e.kind, e.action) for e in events} == {("scale", "none")}
    assert "the loss scale" in events[0].text and "is too high" in events[0].text


class Flushing(nn.Module):
    """0/0 in fp16, whose eps of 1e-8 is 0; sound in bf16 and fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.small = nn.Linear(16, 4), nn.Parameter(torch.ones(()))

    def forward(self, x):
        x = self.inner(x)
        size = (x * self.small.to(x.dtype)).abs()
        return x * (size + 1e-8) / (size + 1e-8)


def test_what_is_undefined_in_fp16_alone_is_the_modules_fault(tmp_path):
    task = growing("middle")
    task.model = nn.Sequential(nn.Linear(16, 16), Flushing())

    def shrink(model, step):
        if step == 10:
            with torch.no_grad():
                model[1].small.zero_()
                model[1].small.requires_grad_(False)

    task.after_step = shrink
    train(task, precision="fp16", guard="promote", out=tmp_path / "run", steps=30)
    events = read_events(tmp_path / "run")
    assert {e.module for e in events} == {"1"} and events[-1].action == "promote"
    assert "0/0" in events[0].text and "1e-08" in events[0].text


def test_nan_in_the_data_is_no_modules_fault(tmp_path):
    task = growing("middle")
    task.after_step = None
    batches = list(task.batches)
    task.batches = lambda step: batches[step % 8] if step != 12 else (batches[0][0] * math.nan, batches[0][1])
    train(task, precision="fp16", guard="promote", out=tmp_path / "run", steps=30)
    assert actions(tmp_path / "run") == [("data", "warn", "")]


def test_what_fails_in_fp32_too_is_no_matter_of_precision(tmp_path):
    class Log(nn.Module):
        def forward(self, x):
            return torch.log(x.float() - 1e6)

    task = growing("middle")
    task.model, task.after_step = nn.Sequential(nn.Linear(16, 4), Log()), None
    with pytest.raises(TrainingError, match="consecutive steps"):
        train(task, precision="bf16", guard="promote", out=tmp_path / "run", steps=10)
    (event, *_) = read_events(tmp_path / "run")
    assert (event.kind, event.action, event.module) == ("everywhere", "warn", "1")
    assert "fp32 is not finite there either" in event.text


def test_where_no_format_helps_the_run_ends_and_says_so(tmp_path):
    class Stubborn(nn.Module):
        """Casts to fp16 by itself, and refuses to run without autocast."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.size = nn.Linear(16, 4), 1.0

        def forward(self, x):
            if not torch.is_autocast_enabled("cpu"):
                raise RuntimeError("this needs autocast")
            return self.inner(x).half() * self.size

    task = growing("middle")
    task.model = nn.Sequential(nn.Linear(16, 16), Stubborn())
    task.after_step = lambda model, step: setattr(model[1], "size", 6e4 * step if step > 5 else 1.0)
    with pytest.raises(TrainingError, match="no safer format makes the step finite"):
        train(task, precision="fp16", guard="promote", out=tmp_path / "run", steps=30)
    assert read_events(tmp_path / "run")[-1].action == "stop"


def test_running_statistics_do_not_keep_what_a_skipped_step_left_there():
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.norm, self.head = nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 4)

        def forward(self, x):
            return self.head(self.norm(self.wide(x)))

    task = growing("middle")
    task.model = Normed()

    def grow(model, step):
        if step >= 20:
            with torch.no_grad():
                model.wide.weight.mul_(1.5).clamp_(-3e5, 3e5)

    task.after_step = grow
    result = train(task, precision="fp16", guard="promote", steps=60)
    assert math.isfinite(result.eval_loss) and torch.isfinite(task.model.norm.running_mean).all()


# skipping


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_far_beyond_the_usual_gradient_is_left_out(precision):
    def task():
        made = growing("middle")
        batches = list(made.batches)
        made.batches = lambda step: batches[step % 8] if step != 90 else (batches[0][0], 30 * batches[0][1])
        made.after_step, made.optimizer = None, partial(torch.optim.SGD, lr=0.1)
        return made

    more = {"initial_scale": 64.0} if precision == "fp16" else {}
    runs = {
        g: train(task(), precision=precision, guard=g, steps=100, lr=0.1, grad_clip=None, **more)
        for g in (None, "skip")
    }
    assert runs["skip"].skipped_steps == runs[None].skipped_steps + 1
    assert runs["skip"].scale_history == runs[None].scale_history, "the loss scale is not to blame"
    assert runs["skip"].losses[:91] == runs[None].losses[:91]
    assert runs["skip"].losses[91] < runs[None].losses[91]


def test_a_new_level_of_gradients_becomes_usual():
    limit, yes = NormLimit(10.0), torch.tensor(True)
    taken = [bool(limit.allows(yes, torch.tensor(1.0 if step < 80 else 50.0))) for step in range(300)]
    assert all(taken[:80]) and not any(taken[80:100]) and all(taken[200:])
    assert not limit.allows(torch.tensor(False), torch.tensor(math.inf))
    assert limit.allows(yes, torch.tensor(50.0)), "inf does not enter the median"


def test_going_back_from_a_spike_that_is_no_matter_of_precision_leaves_its_steps_out(tmp_path):
    def task():
        made = growing("middle")
        batches = list(made.batches)
        made.batches = lambda step: (
            batches[step % 8] if step not in (90, 91, 92) else (batches[0][0], 30 * batches[0][1])
        )
        made.after_step, made.optimizer = None, partial(torch.optim.SGD, lr=0.1)
        return made

    settings = {"precision": "bf16", "steps": 110, "lr": 0.1, "grad_clip": None}
    result = train(task(), guard="rollback", out=tmp_path / "run", **settings)
    assert [e.action for e in read_events(tmp_path / "run")] == ["rollback", "skip"]
    assert "not a matter of precision" in read_events(tmp_path / "run")[-1].text
    assert result.skipped_steps == 3
    assert result.eval_loss < 0.9 * train(task(), **settings).eval_loss


def test_what_cannot_be_looked_at_again_promotes_the_whole_model(in_fp32, tmp_path):
    """A generator, and two micro-batches a step: the first of them cannot be read again."""
    task = growing("middle")
    batches = list(task.batches)
    task.batches = (batches[i // 2 % 8] for i in range(2 * STEPS))
    result = train(task, precision="fp16", guard="rollback", out=tmp_path / "run", accumulate=2, **RUN)
    events = read_events(tmp_path / "run")
    assert [(e.kind, e.action, e.module) for e in events][-1] == ("unexplained", "promote", "(all)")
    assert "cannot go back" in events[-1].text and result.plan.default.compute == "bf16"
    assert result.eval_loss == pytest.approx(in_fp32["middle"], rel=0.02)


# quiet again


def test_a_demoted_format_is_tried_again_and_kept_or_not(tmp_path):
    """The weights grow and shrink again. The first try comes too early, the second holds."""
    task = growing("middle")
    start = {n: p.detach().clone() for n, p in task.model.wide.named_parameters()}

    def wave(model, step):
        if 20 <= step < 45:
            with torch.no_grad():
                model.grow()
        elif step == 60:
            with torch.no_grad():
                for name, parameter in model.wide.named_parameters():
                    parameter.copy_(start[name])

    task.after_step = wave
    guard = GuardConfig(action="promote", quiet_steps=15)
    result = train(task, precision="fp16", guard=guard, out=tmp_path / "run", steps=130, lr=3e-3)
    quiet = [(e.step, e.action) for e in read_events(tmp_path / "run") if e.kind == "quiet"]
    assert [action for _, action in quiet] == ["keep", "retry", "restore"]
    assert quiet[1][0] - quiet[0][0] == 31, "twice as long after a failure"
    assert result.plan["wide"].compute == "fp16"


def test_a_retry_that_fails_later_is_taken_back(tmp_path):
    task = growing("middle")
    start = {n: p.detach().clone() for n, p in task.model.wide.named_parameters()}

    def waves(model, step):
        with torch.no_grad():
            if 20 <= step < 60 or 80 <= step < 120:
                model.grow()
            elif step == 62:
                for name, parameter in model.wide.named_parameters():
                    parameter.copy_(start[name])

    task.after_step = waves
    guard = GuardConfig(action="promote", quiet_steps=40, overflow_repeats=1)
    result = train(task, precision="fp16", guard=guard, out=tmp_path / "run", steps=130, lr=3e-3)
    events = [e for e in read_events(tmp_path / "run") if e.action in ("promote", "retry")]
    assert [e.action for e in events] == ["promote", "retry", "promote"]
    assert "back to the safer format of wide, for twice as long" in events[-1].text
    assert result.plan["wide"].compute == "bf16"


def test_harm_that_never_shows_is_found_by_comparing_with_fp32(tmp_path):
    """bf16 from the first step on, loss and norm as usual: positions beyond 256 are not told apart."""

    class Positions(nn.Module):
        def forward(self, x):
            return torch.sin(x.to(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype) * 7)

    torch.manual_seed(0)
    inputs = torch.arange(512.0).reshape(8, 64, 1)
    model = nn.Sequential(nn.Linear(1, 1, bias=False), Positions(), nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    nn.init.ones_(model[0].weight).requires_grad_(False)
    batches = [(x, torch.sin(x * 7)) for x in inputs]
    task = Task(model=model, loss=lambda m, b: F.mse_loss(m(b[0]).float(), b[1]), batches=batches)
    train(task, precision="bf16", guard="promote", out=tmp_path / "run", steps=30)
    (event,) = read_events(tmp_path / "run")
    assert (event.step, event.kind, event.action) == (19, "harm", "promote")
    assert set(event.numbers["modules"]) <= {"0", "1"} and "off that of fp32" in event.text


# what is recorded


def test_steps_around_an_alarm_are_recorded_and_the_failing_one_is_kept(tmp_path):
    out = tmp_path / "run"
    train(growing("middle"), precision="fp16", guard=GuardConfig(action="promote", dense_steps=4), out=out, **RUN)
    first = read_events(out)[0]
    profile = Profile.load(out)
    assert profile.steps == [first.step + 1 + i for i in range(5)]
    assert {"wide", "norm", "head"} <= set(profile.modules)
    assert json.loads((out / "run.json").read_text())["status"] == "done"
    again = replay(out / f"failing-{first.step:08d}.pt", growing("middle"))
    assert again.reproducible and again.runs[0].first.module == "wide"


def test_a_recorder_that_watches_already_records_densely(tmp_path):
    def recorder(trainer):
        return record(trainer.forward_model, tmp_path / "rec", optimizer=trainer.optimizer, every=25)

    train(growing("middle"), precision="fp16", guard="promote", out=tmp_path / "run", recorder=recorder, **RUN)
    promoted = read_events(tmp_path / "run")[-1].step
    steps = Profile.load(tmp_path / "rec").steps
    assert set(range(promoted + 1, promoted + 6)) <= set(steps) and {0, 25, 50, 75} <= set(steps)
    assert len(steps) < 12
    assert not list((tmp_path / "run").glob("stats-*.parquet"))


# swallowed updates


def low_storage(lr: float, **more):
    task = growing("middle")
    task.after_step = None
    plan = PrecisionPlan.uniform("bf16", params="bf16")
    return task, {"plan": plan, "steps": 60, "lr": lr, "schedule": "constant", "warmup": 0, **more}


def test_swallowed_updates_move_the_parameters_to_fp32(tmp_path):
    task, settings = low_storage(1e-6)
    result = train(task, guard="promote", out=tmp_path / "run", **settings)
    (event,) = read_events(tmp_path / "run")
    assert (event.kind, event.action) == ("swallowed", "promote") and event.numbers["share"] > 0.5
    assert "below half an ulp" in event.text
    assert result.plan[event.module].params == "fp32" and result.plan[event.module].compute == "bf16"


@pytest.mark.parametrize(("lr", "updates"), [(3e-2, "nearest"), (1e-6, "stochastic")])
def test_storage_that_loses_nothing_raises_no_alarm(lr, updates, tmp_path):
    task, settings = low_storage(lr, updates=updates)
    train(task, guard="promote", out=tmp_path / "run", **settings)
    assert read_events(tmp_path / "run") == []


# plans


def names() -> Names:
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "b": nn.Linear(2, 2)})
    model["again"] = model["b"]
    return Names(model)


def test_a_promotion_leaves_what_is_within_the_module():
    plan = amended(PrecisionPlan.uniform("fp16"), [Promotion("a", "bf16", "why")], names())
    assert {n: plan[n].compute for n in ("", "a", "a.0", "b")} == {"": "fp16", "a": "bf16", "a.0": "fp16", "b": "fp16"}
    assert plan["a"].reasons[0].text == "why"


def test_the_root_the_outside_and_everything_can_be_promoted():
    base = PrecisionPlan.uniform("fp16")
    root = amended(base, [Promotion("", "fp32", "why")], names())
    assert root[""].compute == "fp32" and root["a.0"].compute == "fp16" and root.default.compute == "fp16"
    outside = amended(base, [Promotion(OUTSIDE, "bf16", "why")], names())
    assert outside.default.compute == "bf16" and outside[""].compute == outside["a"].compute == "fp16"
    mixed = base.replace(modules={"a": LayerPrecision("e4m3"), "b": LayerPrecision("fp32")})
    every = amended(mixed, [Promotion(EVERYTHING, "bf16", "why")], names())
    assert (every.default.compute, every["a"].compute, every["b"].compute) == ("bf16", "bf16", "fp32")


def test_all_names_of_a_shared_module_are_promoted():
    plan = amended(PrecisionPlan.uniform("fp16"), [Promotion("again", "fp32", "why")], names())
    assert plan["b"].compute == plan["again"].compute == "fp32"


def test_phases_are_promoted_too_and_never_lowered():
    phases = [Phase(from_step=5, precision="fp32"), Phase(from_step=9, plan=PrecisionPlan.uniform("fp16")),
              Phase(from_step=12, precision="plan")]  # fmt: skip
    base = PrecisionPlan.uniform("fp16").replace(phases=phases)
    plan = amended(base, [Promotion("b", "bf16", "why")], names())
    assert [plan.at_step(s)["b"].compute for s in (0, 5, 9, 12)] == ["bf16", "fp32", "bf16", "bf16"]
    assert [plan.at_step(s)["a"].compute for s in (0, 5, 9, 12)] == ["fp16", "fp32", "fp16", "fp16"]
    assert PrecisionPlan.from_json(plan.to_json()) == plan


def test_a_run_with_phases_is_guarded(in_fp32, tmp_path):
    plan = PrecisionPlan.uniform("fp16").replace(phases=[Phase(from_step=30, precision="bf16"), 
                                                         Phase(from_step=40, precision="plan")])  # fmt: skip
    result = train(growing("middle"), plan=plan, guard="promote", out=tmp_path / "run", **RUN)
    assert actions(tmp_path / "run")[-1] == ("overflow", "promote", "wide")
    assert [p.from_step for p in result.plan.phases] == [30, 40]
    assert result.eval_loss == pytest.approx(in_fp32["middle"], rel=0.02)


# files and settings


def test_events_are_lines_and_a_cut_one_is_left_out(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.write(Event(3, "spike", "warn", "text", numbers={"x": math.inf}))
    with open(path, "ab") as file:
        file.write(b'{"schema": 1, "step"')
    assert [e.step for e in read_events(tmp_path)] == [3]
    EventLog(path).write(Event(4, "scale", "none", "more"))
    assert [(e.step, e.schema) for e in read_events(path)] == [(3, 1), (4, 1)]
    assert read_events(path)[0].numbers == {"x": "inf"}
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(RunDirectoryError, match="line 1, is damaged"):
        read_events(path)
    with pytest.raises(RunDirectoryError, match="precscope train --guard warn"):
        read_events(tmp_path / "elsewhere.jsonl")
    path.write_text('{"schema": 9, "step": 1}\n')
    with pytest.raises(RunDirectoryError, match="schema 9"):
        read_events(path)


def test_events_that_cannot_be_written_are_said_once(tmp_path):
    log = EventLog(tmp_path / "gone" / "events.jsonl")
    with pytest.warns(RuntimeWarning, match="its events are lost"):
        log.write(Event(1, "spike", "warn", "text"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log.write(Event(2, "spike", "warn", "text"))
    assert len(log.events) == 2


@pytest.mark.parametrize(("settings", "message"), [
    ({"action": "promot"}, "one of warn, skip, promote, rollback, not 'promot'"),
    ({"window": 0}, "window must be an integer of at least 1"),
    ({"tolerance": 0.0}, "tolerance must be a positive number"),
    ({"quiet_steps": 1.5}, "quiet_steps must be an integer"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        GuardConfig(**settings)
    assert GuardConfig(quiet_steps=None, dense_steps=0).action == "warn"


# several processes

_WORKER = """
import os, sys, warnings
sys.path[:0] = {paths!r}
warnings.simplefilter("ignore")
from guarded import STEPS, growing
from precscope.training import train
result = train(growing("squares"), precision="fp16", guard="rollback", strategy=sys.argv[1], out=sys.argv[2],
               steps=STEPS, lr=3e-3, checkpoint_every=20)
with open(f"ended-{{os.environ['RANK']}}", "w") as file:
    file.write(f"{{result.eval_loss!r}} {{result.plan['body.2'].compute}}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_several_processes_act_alike(strategy, in_fp32, tmp_path):
    here = Path(__file__).parent
    (tmp_path / "work.py").write_text(_WORKER.format(paths=[str(here), str(here.parent)]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "work.py"), strategy, str(tmp_path / "run")],
        capture_output=True, text=True, timeout=200, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "ended-0").read_text() == (tmp_path / "ended-1").read_text()
    assert [e.action for e in read_events(tmp_path / "run")] == ["rollback", "promote"]
    assert {e.module for e in read_events(tmp_path / "run")} == {"body.2"}
