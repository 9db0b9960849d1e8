"""What is kept of a run besides its newest checkpoints, and with which settings it may go on."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_checkpoint import PLANS, SETTINGS, Interrupted, Net, interrupted_at, make
from torch import nn

from precscope.errors import UsageError
from precscope.plans import PrecisionPlan
from precscope.tasks import Task, make_task
from precscope.training import checkpoint, train
from precscope.training.log import read_log

HAS_SAFETENSORS = importlib.util.find_spec("safetensors") is not None


# the best one, and the weights alone


def scripted(losses: dict[int, float]) -> Task:
    """A task whose held-out loss after so many steps is as given: it reads the step from a buffer."""
    task = make_task(make)
    task.model.register_buffer("done", torch.zeros((), dtype=torch.int64))

    def count(model: nn.Module, step: int) -> None:
        model.done += 1

    def loss(model: nn.Module, batch) -> torch.Tensor:
        real = F.mse_loss(model(batch[0]), batch[1])
        return real if model.training else real * 0 + losses[int(model.done)]

    task.after_step, task.loss = count, loss
    return task


HELD_OUT = {3: 9.0, 6: 5.0, 9: 7.0, 12: 4.0, 15: 8.0, 18: 6.0}
BEST = {"steps": 18, "eval_every": 3, "checkpoint_every": 4, "keep": 1, "keep_best": True}


def files(out: Path) -> list[str]:
    return sorted(p.name for p in (out / "checkpoints").iterdir())


def test_the_best_is_kept_beside_the_newest(tmp_path):
    result = train(scripted(HELD_OUT), out=tmp_path, **BEST)
    assert files(tmp_path) == ["best-00000012.pt", "best.json", "step-00000018.pt"]
    assert result.best == tmp_path / "checkpoints" / "best-00000012.pt"
    assert checkpoint.load(result.best)["step"] == 12 and int(checkpoint.load(result.best)["model"]["done"]) == 12
    assert checkpoint.best(tmp_path) == (result.best, 12, 4.0)
    told = json.loads((tmp_path / "run.json").read_text())["best"]
    assert told == {"step": 12, "eval_loss": 4.0, "file": "checkpoints/best-00000012.pt"}


def test_the_best_survives_a_resume(tmp_path):
    whole = train(scripted(HELD_OUT), out=tmp_path / "whole", **BEST)
    for stop in (7, 13, 16):
        out = tmp_path / str(stop)
        task = scripted(HELD_OUT)
        after = task.after_step

        def stopping(model, step, after=after, stop=stop):
            if step == stop:
                raise Interrupted
            after(model, step)

        task.after_step = stopping
        with pytest.raises(Interrupted):
            train(task, out=out, **BEST)
        result = train(scripted(HELD_OUT), out=out, resume=True, **BEST)
        assert result.best.name == whole.best.name and files(out) == files(tmp_path / "whole")
        a, b = checkpoint.load(result.best), checkpoint.load(whole.best)
        torch.testing.assert_close(a["model"], b["model"], rtol=0, atol=0)
    assert train(scripted(HELD_OUT), out=out, resume=True, **BEST).best.name == whole.best.name  # a finished run


def test_the_best_of_a_step_that_is_a_checkpoint_too_takes_no_space_twice(tmp_path):
    train(scripted({**HELD_OUT, 18: 1.0}), out=tmp_path, **BEST)
    best, newest = (tmp_path / "checkpoints" / f"{n}-00000018.pt" for n in ("best", "step"))
    assert os.path.samefile(best, newest) and checkpoint.load(best)["step"] == 18


def test_a_held_out_loss_that_is_not_finite_is_never_the_best(tmp_path):
    losses = {**dict.fromkeys(HELD_OUT, float("nan")), 9: 7.0}
    assert train(scripted(losses), out=tmp_path, **BEST).best.name == "best-00000009.pt"


def test_what_is_to_be_kept_needs_a_place(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="keep_best=True needs out="):
        train(make_task(make), steps=2, keep_best=True)
    task = make_task(make)
    task.eval_batches = None
    with pytest.raises(UsageError, match="keep_best=True needs held-out batches"):
        train(task, steps=2, keep_best=True, out=tmp_path / "a")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs the package safetensors: pip install safetensors"):
        train(make_task(make), steps=2, save_model=True, out=tmp_path / "b")


@pytest.mark.skipif(not HAS_SAFETENSORS, reason="safetensors is not installed")
@pytest.mark.parametrize("plan", [None, PLANS["low storage"]], ids=["fp32", "low storage"])
def test_the_weights_alone_as_safetensors(plan, tmp_path):
    from safetensors.torch import load_file, load_model

    task = make_task(make)
    task.model.tied = nn.Linear(8, 16)
    task.model.tied.weight = task.model.fc1.weight
    train(task, out=tmp_path, plan=plan, save_model=True, **SETTINGS)
    stored = load_file(tmp_path / "model.safetensors")
    assert "fc1.weight" in stored and "tied.weight" not in stored and stored["norm.num_batches_tracked"] == 36
    assert stored["fc1.weight"].dtype is (torch.float32 if plan is None else torch.bfloat16)
    other = Net()
    other.tied = nn.Linear(8, 16)
    other.tied.weight = other.fc1.weight
    if plan is not None:
        other.to(torch.bfloat16)
    load_model(other, tmp_path / "model.safetensors")
    for name, value in other.state_dict().items():
        assert torch.equal(value.float(), task.model.state_dict()[name].float()), name


# going on with other settings


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of 18 steps that stopped after 13; the last checkpoint is of 10."""
    out = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Interrupted):
        train(interrupted_at(13), out=out, precision="fp16", **SETTINGS)
    return out


def resumed(stopped: Path, tmp_path: Path, *, change=None, **settings):
    shutil.copytree(stopped, tmp_path / "a")
    if change is not None:
        path = checkpoint.checkpoints(tmp_path / "a")[0]
        content = checkpoint.load(path)
        change(content)
        torch.save(content, path)
    task = make_task(make)
    return train(task, out=tmp_path / "a", resume=True, **{"precision": "fp16", **SETTINGS, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 3}, r"cannot go on with seed=3 \(was 2\): give the old value, or train anew"),
        ({"weight_decay": 0.0}, r"cannot go on with weight_decay=0.0 \(was 0.1\)"),
        ({"accumulate": 4}, r"cannot go on with accumulate=4 \(was 2\)"),
        ({"betas": (0.9, 0.99), "eps": 1e-6}, r"with betas=\[0.9, 0.99\] \(was \[0.9, 0.95\]\) and eps=1e-06 \(was"),
        ({"schedule": "none"}, r"cannot go on with schedule='none' \(was 'cosine'\)"),
        ({"steps": 8}, r"is of 10 steps, and steps=8 asks for fewer: give at least 10"),
    ],
)
def test_settings_that_cannot_change_on_the_way(settings, message, stopped, tmp_path):
    with pytest.raises(UsageError, match=message):
        resumed(stopped, tmp_path, **settings)


def test_settings_that_may_change_are_said(stopped, tmp_path):
    result = resumed(stopped, tmp_path, steps=20, lr=1e-4, grad_clip=None, keep=3, eval_every=2)
    assert "from step 10 on with steps=20 (was 18), lr=0.0001 (was None), grad_clip=None (was 1.0)" in result.notes
    assert len(result.losses) == 20 and read_log(tmp_path / "a")[19].lr < 2e-5
    assert "from step 10 on with" in json.loads((tmp_path / "a" / "run.json").read_text())["note"]


def test_another_precision_is_said(stopped, tmp_path):
    result = resumed(stopped, tmp_path, precision="bf16")
    assert "from step 10 on in bf16 (was fp16)" in result.notes
    phases = json.loads((tmp_path / "a" / "run.json").read_text())["phases"]
    assert [(p["from_step"], p["precision"]) for p in phases] == [(0, "fp16"), (10, "bf16")]


def test_another_plan_is_said(tmp_path):
    with pytest.raises(Interrupted):
        train(interrupted_at(13), out=tmp_path, plan=PLANS["plan"], **SETTINGS)
    result = train(make_task(make), out=tmp_path, plan=PLANS["plan"].replace(default="fp32"), resume=True, **SETTINGS)
    assert "from step 10 on with another plan than before" in result.notes
    history = json.loads((tmp_path / "run.json").read_text())["phases"]
    assert [(p["from_step"], p["why"]) for p in history] == [(0, "start"), (10, "resumed in another precision")]


def test_a_checkpoint_of_two_processes_goes_on_in_one_with_the_same_batches(stopped, tmp_path):
    def of_two(content):
        content["world"], content["config"]["accumulate"] = 2, 1
        content["random_by_rank"] = content["random_by_rank"] * 2

    result = resumed(stopped, tmp_path, change=of_two)
    assert any(note.startswith("on 1 process (was 2 processes): the same batches to a step") for note in result.notes)


@pytest.mark.parametrize(
    ("world", "accumulate", "message"),
    [
        (2, 2, r"was on 2 processes with accumulate=2, 4 micro-batches to a step, .*would take 2: give accumulate=4"),
        (3, 1, r"was on 3 processes with accumulate=1, 3 micro-batches .*would take 2: give accumulate=3"),
    ],
)
def test_a_checkpoint_of_other_processes_with_other_batches_is_refused(world, accumulate, message, stopped, tmp_path):
    def other(content):
        content["world"], content["config"]["accumulate"] = world, accumulate

    with pytest.raises(UsageError, match=message):
        resumed(stopped, tmp_path, change=other)


def test_a_run_with_checkpoints_of_before_phases_goes_on(stopped, tmp_path):
    """Keys that came later are not needed."""

    def older(content):
        for key in ("in_force", "history", "buffers", "unrounded", "stored", "world", "task"):
            del content[key]

    assert len(resumed(stopped, tmp_path, change=older).losses) == 18


def test_state_in_a_dtype_of_its_own_comes_back_in_it(tmp_path):
    """torch's load_state_dict casts all state to the parameter's dtype; NAdam's running product is a float32 scalar."""

    def with_nadam(task: Task) -> Task:
        task.optimizer = lambda params: torch.optim.NAdam(params, lr=1e-2)
        return task

    whole, plan = with_nadam(make_task(make)), PLANS["low storage"]
    expected = train(whole, out=tmp_path / "whole", plan=plan, **SETTINGS)
    with pytest.raises(Interrupted):
        train(with_nadam(interrupted_at(13)), out=tmp_path / "a", plan=plan, **SETTINGS)
    task = with_nadam(make_task(make, seed=99))
    assert train(task, out=tmp_path / "a", plan=plan, resume=True, **SETTINGS).losses == expected.losses
    a, b = checkpoint.latest(tmp_path / "a"), checkpoint.latest(tmp_path / "whole")
    assert a["optimizer"]["state"][0]["mu_product"].dtype is torch.float32
    torch.testing.assert_close(a["optimizer"], b["optimizer"], rtol=0, atol=0)


def test_a_log_of_before_phases_is_read(tmp_path):
    import pyarrow.parquet as pq

    train(make_task(make), out=tmp_path, **SETTINGS)
    path = tmp_path / "train.parquet"
    rows = read_log(tmp_path)
    pq.write_table(pq.read_table(path).drop_columns(["phase"]), path)
    assert [r._replace(eval_loss=0) for r in read_log(tmp_path)] == [r._replace(eval_loss=0) for r in rows]


# with a guard


def stopped_under_guard(out: Path) -> None:
    train(make_task(make), steps=6, schedule="none", checkpoint_every=6, out=out, guard="promote", precision="bf16")


def test_another_precision_under_a_guard_that_amended_nothing(tmp_path):
    stopped_under_guard(tmp_path)
    settings = {"steps": 9, "schedule": "none", "out": tmp_path, "resume": True, "guard": "promote"}
    result = train(make_task(make), precision="fp16", **settings)
    assert any("from step 6 on in fp16 (was bf16)" in note for note in result.notes)


def test_a_plan_that_a_guard_has_amended_goes_on_and_another_one_is_refused(tmp_path):
    """What the guard adds to a plan is in the checkpoint: here one promotion, made by hand."""
    stopped_under_guard(tmp_path)
    path = checkpoint.checkpoints(tmp_path)[0]
    state = checkpoint.load(path)
    start = PrecisionPlan.uniform("bf16")
    promoted = [["fc1", "fp32", "by hand", ""]]
    state["guard"]["planner"] = {
        "start": start.to_json(), "episodes": [{"promotions": promoted, "since": 4, "quiet": 0, "trying": False}]
    }  # fmt: skip
    state["plan"], state["word"] = start.replace(modules={"fc1": "fp32"}).to_json(), "plan"
    checkpoint.save(tmp_path, 6, state)
    settings = {"steps": 9, "schedule": "none", "out": tmp_path, "resume": True}
    with pytest.raises(UsageError, match=r"guard of the run in .* has amended another plan .*leave guard= out"):
        train(make_task(make), precision="fp16", guard="promote", **settings)
    result = train(make_task(make), precision="bf16", guard="promote", **settings)
    assert result.plan["fc1"].compute == "fp32" and result.plan["fc2"].compute == "bf16"
