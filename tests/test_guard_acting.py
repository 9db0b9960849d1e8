"""The guard: whose fault it finds a failure to be, what it leaves out, tries again and records."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from guarded import RUN, actions, growing
from torch import nn

from precscope.errors import TrainingError
from precscope.profiles import Profile
from precscope.recording import record
from precscope.replaying import replay
from precscope.tasks import Task
from precscope.training import train
from precscope.training.guard import GuardConfig, read_events
from precscope.training.guard.actions import NormLimit

pytestmark = pytest.mark.filterwarnings("ignore:guard, step:RuntimeWarning")


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
    settings = {"precision": "fp16", "steps": 70, "initial_scale": 2.0**15}
    result = train(task, guard="promote", out=tmp_path / "run", **settings)
    events = read_events(tmp_path / "run")
    assert {(e.kind, e.action) for e in events} == {("scale", "rescale")}
    assert "taken again" in events[0].text and result.plan is None
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


@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=pytest.mark.slow), "fp16"])
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


@pytest.mark.slow
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
    assert profile.steps == [first.step + i for i in range(4)], "the failing step as it was taken in the end"
    assert {"wide", "norm", "head"} <= set(profile.modules)
    assert json.loads((out / "run.json").read_text())["status"] == "done"
    again = replay(out / f"failing-{first.step:08d}.pt", growing("middle"))
    assert again.reproducible and again.runs[0].first.module == "wide"


def test_a_recorder_that_watches_already_records_densely(tmp_path):
    def recorder(trainer):
        return record(trainer.forward_model, tmp_path / "rec", optimizer=trainer.optimizer, every=25)

    train(growing("middle"), precision="fp16", guard="promote", out=tmp_path / "run", recorder=recorder, **RUN)
    failing = read_events(tmp_path / "run")[0].step
    steps = Profile.load(tmp_path / "rec").steps
    assert set(range(failing, failing + 5)) <= set(steps) and {0, 25, 50, 75} <= set(steps)
    assert len(steps) < 12
    assert not list((tmp_path / "run").glob("stats-*.parquet"))
