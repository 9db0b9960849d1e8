"""trace_step, saved steps and their replay, and the command."""

from __future__ import annotations

import collections

import pytest
import torch
from torch import nn

import precscope as ps
from precscope.errors import RunDirectoryError, TaskError, UsageError
from precscope.replaying import Replay, StepTrace, replay, save_step, trace_step
from precscope.training.checkpoint import random_states


class Square(nn.Module):
    def forward(self, x):
        return (x * x).mean(-1, keepdim=True)


class Net(nn.Module):
    """`square` overflows fp16 where `gain` is 100; dropout and a batch norm are there to be put back."""

    def __init__(self, gain=100.0):
        super().__init__()
        self.lin, self.drop, self.norm, self.square = nn.Linear(8, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), Square()
        nn.init.eye_(self.lin.weight)
        self.gain = gain

    def forward(self, x):
        return self.square(self.lin(self.drop(x)) * self.gain) * self.norm(x)


def loss(model, batch):
    return model(batch).float().mean()


def make(gain=100.0, loss=loss, batches=None):
    torch.manual_seed(0)
    if batches is None:
        batches = [torch.full((4, 8), 5.0 + i) + torch.arange(4.0)[:, None] for i in range(2)]
    return ps.Task(model=Net(gain), loss=loss, batches=batches)


def test_a_step_in_fp16_names_the_module_and_bf16_runs_through():
    task = make()
    result = trace_step(task)
    assert isinstance(result, StepTrace)
    assert (result.first.module, result.first.op) == ("square", "aten.mul.Tensor")
    assert (result.precision, result.scale) == ("fp16", 65536.0) and not result.by_scale
    assert trace_step(task, precision="bf16").first is None
    assert trace_step(task, precision="fp32").first is None
    healthy = trace_step(make(gain=1.0), scale=8.0)
    assert healthy.first is None and healthy.scale == 8.0
    assert str(healthy).startswith("every value was finite (")


def test_a_plan_says_the_precision():
    plan = ps.PrecisionPlan.uniform("fp16").replace(modules={"square": {"compute": "fp32"}})
    result = trace_step(make(), plan=plan, scale=1.0)
    assert result.precision == "plan"
    assert result.first is None or result.first.module != "square"
    assert trace_step(make(), plan=ps.PrecisionPlan.uniform("fp32")).first is None


def test_everything_is_left_as_it_was():
    task = make()
    task.model.lin.weight.grad = torch.ones(8, 8)
    task.model.norm.eval()
    before = {k: v.clone() for k, v in task.model.state_dict().items()}
    states = torch.get_rng_state()
    trace_step(task)
    assert all(torch.equal(v, before[k]) for k, v in task.model.state_dict().items())
    assert torch.equal(task.model.lin.weight.grad, torch.ones(8, 8)) and task.model.lin.bias.grad is None
    assert torch.equal(torch.get_rng_state(), states)
    assert task.model.training and not task.model.norm.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in task.model.modules())


def test_an_overflow_of_the_scale_alone():
    result = trace_step(make(gain=1.0), scale=2.0**40)
    assert result.by_scale and result.first.phase == "backward"
    assert "A dynamic loss scale halves itself" in str(result)


def test_a_constant_without_a_place_is_a_finding_other_errors_are_raised():
    def masked(model, batch):
        return model(batch).half().masked_fill(batch[:, :1] > 0, -1e9).float().mean()

    result = trace_step(make(loss=masked))
    assert result.loss is None
    assert any(event.kind == "exception" for event in result.events)
    assert "raised" in str(result)
    with pytest.raises(TaskError, match="scalar"):
        trace_step(make(loss=lambda model, batch: model(batch)))
    with pytest.raises(RuntimeError, match="mat1"):
        trace_step(make(loss=lambda model, batch: model(batch[:, :3]).mean()))


def test_a_saved_step_replays_from_its_weights_batch_and_random_states(tmp_path):
    task = make()
    with torch.no_grad():
        task.model.lin.weight.mul_(2)
    traced = trace_step(task, step=1, seed=7, save=tmp_path / "a" / "step.pt")
    fresh = make()
    mine = fresh.model.lin.weight.clone()
    again = replay(tmp_path / "a" / "step.pt", fresh, times=3)
    assert isinstance(again, Replay) and again.reproducible and len(again.runs) == 3
    assert again.first.key == traced.first.key == again.saved
    assert again.first.inputs == traced.first.inputs  # dropout drew the same
    assert again.why == "3 runs with the same first finding and the same bits and those of the saved run"
    assert torch.equal(fresh.model.lin.weight, mine)


def test_without_random_states_dropout_makes_it_irreproducible(tmp_path):
    task = make()
    save_step(tmp_path / "step.pt", task.model, task.batch(0), None, "fp16", 1.0)
    again = replay(tmp_path / "step.pt", task)
    assert not again.reproducible
    assert "differ in" in again.why and "the file keeps no random states" in again.why
    save_step(tmp_path / "step.pt", task.model, task.batch(0), random_states(), "fp16", 1.0)
    assert replay(tmp_path / "step.pt", task).reproducible


def test_another_finding_than_the_saved_one_is_not_a_reproduction(tmp_path):
    task = make()
    found = trace_step(task, scale=1.0).first
    save_step(tmp_path / "step.pt", make(gain=1.0).model, task.batch(0), random_states(), "fp16", 1.0, found=found)
    again = replay(tmp_path / "step.pt", make(gain=1.0))
    assert not again.reproducible
    assert (
        again.why == "the 2 runs are equal, but the file says square, forward (aten.mul.Tensor) and they say no finding"
    )


def test_plans_and_modes_are_kept(tmp_path):
    task = make()
    trace_step(task, plan=ps.PrecisionPlan.uniform("fp16"), save=tmp_path / "step.pt")
    again = replay(tmp_path / "step.pt", task)
    assert again.reproducible and again.runs[0].precision == "plan"
    task.model.eval()  # no dropout: what the file says counts
    save_step(tmp_path / "eval.pt", task.model, task.batch(0), None, "fp32", None)
    task.model.train()
    assert replay(tmp_path / "eval.pt", task).reproducible
    assert task.model.training


Batch = collections.namedtuple("Batch", "x")


def test_a_batch_that_a_safe_file_cannot_hold_is_asked_for_again(tmp_path):
    task = make(loss=lambda model, batch: model(batch.x).mean(), batches=[Batch(torch.ones(4, 8) * n) for n in (1, 9)])
    trace_step(task, step=1, save=tmp_path / "step.pt")
    assert torch.load(tmp_path / "step.pt", weights_only=True)["batch"] is None
    assert replay(tmp_path / "step.pt", task).reproducible


def test_a_view_does_not_bring_its_base(tmp_path):
    data = torch.zeros(10_000, 8)
    task = make(batches=[data[:4]])
    trace_step(task, save=tmp_path / "step.pt", precision="bf16")
    assert (tmp_path / "step.pt").stat().st_size < 60_000


def test_weights_of_a_checkpoint(tmp_path):
    settings = {"checkpoint_every": 2, "lr": 1e-2, "schedule": "none", "precision": "fp16", "initial_scale": 256.0}
    ps.train(make(gain=1.0), steps=4, out=tmp_path / "run", **settings)
    task = make(gain=1.0)
    start = trace_step(task, precision="fp32", step=4)
    later = trace_step(task, precision="fp32", run=tmp_path / "run")
    assert later.loss != start.loss
    assert trace_step(task, run=tmp_path / "run").scale == 256.0
    with pytest.raises(RunDirectoryError, match="has no checkpoint: train with --checkpoint-every"):
        trace_step(task, run=tmp_path)


def test_files_that_cannot_be_replayed(tmp_path):
    task = make()
    with pytest.raises(RunDirectoryError, match="no file .*: save a step with precscope trace TASK --save"):
        replay(tmp_path / "none.pt", task)
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(RunDirectoryError, match="cannot be read as a saved step"):
        replay(tmp_path / "text.pt", task)
    torch.save({"a": 1}, tmp_path / "other.pt")
    with pytest.raises(RunDirectoryError, match="is not a step saved by precscope"):
        replay(tmp_path / "other.pt", task)
    trace_step(task, save=tmp_path / "step.pt")
    content = torch.load(tmp_path / "step.pt", weights_only=True)
    torch.save({**content, "schema": 99}, tmp_path / "newer.pt")
    with pytest.raises(RunDirectoryError, match="has schema 99, this precscope reads up to 1: upgrade"):
        replay(tmp_path / "newer.pt", task)
    stranger = ps.Task(model=nn.Linear(2, 2), loss=loss, batches=[torch.ones(1, 2)])
    with pytest.raises(RunDirectoryError, match="was made with another model .*: give the task that made it"):
        replay(tmp_path / "step.pt", stranger)
    with pytest.raises(UsageError, match="times must be 2 or more, not 1"):
        replay(tmp_path / "step.pt", task, times=1)


TASK = """
import torch, precscope as ps
from torch import nn

class Square(nn.Module):
    def forward(self, x):
        return x * x

def make():
    model = nn.Sequential(nn.Linear(4, 4), Square())
    nn.init.constant_(model[0].weight, 100.0)
    return ps.Task(model=model, loss=lambda m, b: m(b).float().mean(), batches=[torch.ones(2, 4)])
"""


def test_the_command(precscope_cli, tmp_path):
    (tmp_path / "task.py").write_text(TASK)
    done = precscope_cli("trace", "task.py:make", "--save", "step.pt")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1, forward: aten.mul.Tensor\n  cause   mul: 4")
    assert "line    task.py:7 in forward: return x * x" in done.stdout
    assert "wrote step.pt\nnext: precscope trace task.py:make --replay step.pt" in done.stdout
    done = precscope_cli("trace", "task.py:make", "--replay", "step.pt")
    assert done.returncode == 0 and "\nreproducible: 2 runs with the same first finding" in done.stdout
    done = precscope_cli("trace", "task.py:make", "--precision", "bf16")
    assert done.returncode == 0 and done.stdout.startswith("every value was finite (")
    done = precscope_cli("trace", "task.py:make", "--replay", "none.pt")
    assert done.returncode == 1 and "error: no file none.pt" in done.stderr
    assert precscope_cli("trace", "task.py:make", "--precision", "fp7").returncode == 2
