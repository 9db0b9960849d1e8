"""Checkpoints: whole or absent, safe to load, and enough to go on bit for bit."""

from __future__ import annotations

import json
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from precscope.errors import RunDirectoryError
from precscope.plans import PrecisionPlan
from precscope.tasks import Task, make_task
from precscope.training import checkpoint, train
from precscope.training.log import read_log


class Net(nn.Module):
    """Dropout draws from the generator, BatchNorm keeps buffers: both must survive a resume."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 1)
        self.norm, self.drop = nn.BatchNorm1d(16), nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.drop(F.relu(self.norm(self.fc1(x)))))


def make() -> Task:
    """A task whose loader shuffles; 5 batches per epoch."""
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(x, x.sum(1, keepdim=True))
    return Task(
        model=Net(),
        loss=lambda model, batch: F.mse_loss(model(batch[0]), batch[1]),
        batches=DataLoader(data, batch_size=8, shuffle=True),
        eval_batches=DataLoader(data, batch_size=20),
    )


SETTINGS = {"steps": 18, "accumulate": 2, "checkpoint_every": 5, "eval_every": 4, "seed": 2, "initial_scale": 2.0**15}


class Interrupted(Exception):
    pass


def interrupted_at(step: int) -> Task:
    def stop(model: nn.Module, now: int) -> None:
        if now == step:
            raise Interrupted

    task = make_task(make)
    task.after_step = stop
    return task


def state(task: Task) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in task.model.state_dict().items()}


def assert_equal_states(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


PLANS = {
    "plan": PrecisionPlan(default="bf16", modules={"fc2": "fp16"}),
    "low storage": PrecisionPlan.uniform("bf16", policy="cast"),
}


@pytest.mark.parametrize("how", ["fp32", "bf16", "fp16", *PLANS])
def test_a_resumed_run_is_bit_identical_to_one_that_never_stopped(how, tmp_path):
    choice = {"plan": PLANS[how]} if how in PLANS else {"precision": how}
    whole = make_task(make)
    expected = train(whole, out=tmp_path / "whole", **choice, **SETTINGS)
    for stop in (13, 3, 17):  # between checkpoints; before the first one; in the last stretch
        with pytest.raises(Interrupted):
            train(interrupted_at(stop), out=tmp_path / "a", exist="overwrite", **choice, **SETTINGS)
        random.seed(), np.random.seed(None), torch.seed()
        # another start, to be replaced by the checkpoint's, where there is one (taking a plan off gives values that low
        # storage never changed their unrounded start back, so there the start counts)
        task = make_task(make, seed=0 if stop == 3 or how == "low storage" else 99)
        result = train(task, out=tmp_path / "a", resume=True, **choice, **SETTINGS)
        assert result.losses == expected.losses, f"stopped at {stop}"
        assert result.scale_history == expected.scale_history
        assert result.evaluations == expected.evaluations and result.eval_loss == expected.eval_loss
        assert_equal_states(state(task), state(whole))
        a, b = checkpoint.latest(tmp_path / "a"), checkpoint.latest(tmp_path / "whole")
        torch.testing.assert_close(a["optimizer"], b["optimizer"], rtol=0, atol=0)
        assert torch.equal(a["random"]["torch"], b["random"]["torch"])
    assert json.loads((tmp_path / "a" / "run.json").read_text())["resumed_from"] == 15


def test_resuming_a_finished_run_trains_nothing_and_gives_its_result(tmp_path):
    task, again = make_task(make), make_task(make, seed=5)
    first = train(task, out=tmp_path, **SETTINGS)
    second = train(again, out=tmp_path, resume=True, **SETTINGS)
    assert second.losses == first.losses and second.eval_loss == first.eval_loss
    assert_equal_states(state(again), state(task))


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from test_checkpoint import SETTINGS, make, make_task, train
task = make_task(make)
def slowly(model, step):
    time.sleep(0.02)
    print(step, flush=True)
task.after_step = slowly
train(task, out=sys.argv[1], resume=True, flush_seconds=0.0, **SETTINGS)
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    whole = make_task(make)
    expected = train(whole, out=tmp_path / "whole", **SETTINGS)
    command = [sys.executable, "-c", SCRIPT.format(tests=str(Path(__file__).parent)), str(tmp_path / "a")]
    seen = []
    for stop in (7, 14):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
        for line in process.stdout:
            if int(line) == stop:
                time.sleep(0.01 * stop)  # somewhere within a step, a log write or a checkpoint
                break
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        rows = read_log(tmp_path / "a")
        seen.append(checkpoint.latest(tmp_path / "a")["step"])
        assert [r.step for r in rows] == list(range(len(rows))) and len(rows) >= seen[-1]  # the log is never behind
    assert 5 <= seen[0] <= seen[1] and seen[1] >= 10
    task = make_task(make)
    result = train(task, out=tmp_path / "a", resume=True, **SETTINGS)
    assert result.losses == expected.losses and result.eval_loss == expected.eval_loss
    assert_equal_states(state(task), state(whole))


# the files


CONTENT = {"model": {"w": torch.arange(50_000.0)}, "note": "text", "list": [1, 2.5, None]}


def test_the_newest_are_kept(tmp_path):
    for step in (5, 10, 15, 20):
        checkpoint.save(tmp_path, step, CONTENT, keep=2)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-00000020.pt", "step-00000015.pt"]
    content = checkpoint.latest(tmp_path)
    assert content["step"] == 20 and content["schema"] == 1 and content["list"] == [1, 2.5, None]
    assert torch.equal(content["model"]["w"], CONTENT["model"]["w"])
    checkpoint.remove_all(tmp_path)
    assert checkpoint.latest(tmp_path) is None


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


def with_a_flipped_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    torch.save([1, 2, 3], path)


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("ran-code"),))


def with_code(path: Path) -> None:
    torch.save({"schema": 1, "step": 10, "x": Malicious()}, path)


def newer(path: Path) -> None:
    torch.save({"schema": 2, "step": 10}, path)


@pytest.mark.parametrize("damage", [truncated, with_a_flipped_bit, emptied, foreign, with_code, newer])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for step in (5, 10):
        checkpoint.save(tmp_path, step, CONTENT)
    newest, previous = checkpoint.checkpoints(tmp_path)
    damage(newest)
    with pytest.warns(RuntimeWarning, match=r"step-00000010.pt .*: going on from step-00000005.pt"):
        assert checkpoint.latest(tmp_path)["step"] == 5
    with pytest.raises(RunDirectoryError) as caught:
        checkpoint.load(newest)
    assert "\n" not in str(caught.value)
    damage(previous)
    with pytest.raises(RunDirectoryError, match=r"no checkpoint in .* can be read .*: move them away to start anew"):
        checkpoint.latest(tmp_path)
    assert not (tmp_path / "ran-code").exists(), "loading runs no code"


def test_a_newer_schema_says_upgrade(tmp_path):
    path = checkpoint.save(tmp_path, 10, CONTENT)
    newer(path)
    with pytest.raises(RunDirectoryError, match="has schema 2, this precscope reads up to 1: upgrade"):
        checkpoint.load(path)


@contextmanager
def files_no_larger_than(size: int):
    """The kernel refuses writes beyond `size` bytes of a file, as a full disk does."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_write_that_fails_keeps_the_previous_one(tmp_path):
    checkpoint.save(tmp_path, 5, CONTENT, keep=1)
    with files_no_larger_than(20_000), pytest.raises(RunDirectoryError, match="cannot write .*step-00000010.pt"):
        checkpoint.save(tmp_path, 10, CONTENT, keep=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000005.pt"]
    assert checkpoint.latest(tmp_path)["step"] == 5


def test_training_goes_on_where_a_checkpoint_cannot_be_written(tmp_path):
    twin, task = make_task(make), make_task(make)
    expected = train(twin, **SETTINGS)
    with files_no_larger_than(9_000), pytest.warns(RuntimeWarning, match="no checkpoint after step"):
        result = train(task, out=tmp_path / "a", **SETTINGS)
    assert result.losses == expected.losses
    assert checkpoint.latest(tmp_path / "a") is None and len(read_log(tmp_path / "a")) == 18


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    train(make_task(make), out=tmp_path, **SETTINGS)
    task = make_task(make)
    task.model.fc2 = nn.Linear(16, 2)
    with pytest.raises(RunDirectoryError, match="was made with another model or optimizer") as caught:
        train(task, out=tmp_path, resume=True, **SETTINGS)
    assert "\n" not in str(caught.value)


def test_random_states_come_back():
    states = checkpoint.random_states()
    drawn = [float(torch.rand(())), np.random.rand(), np.random.randn(), random.random(), random.gauss(0, 1)]
    torch.rand(7), np.random.rand(3), random.random()
    checkpoint.set_random_states(states)
    assert drawn == [float(torch.rand(())), np.random.rand(), np.random.randn(), random.random(), random.gauss(0, 1)]
