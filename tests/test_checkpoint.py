"""Checkpoints: whole or absent, safe to load, and enough to go on bit for bit."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import warnings
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
    for stop in (3, 13):  # before the first checkpoint; between two
        with pytest.raises(Interrupted):
            train(interrupted_at(stop), out=tmp_path / "a", exist="overwrite", **choice, **SETTINGS)
        random.seed(), np.random.seed(None), torch.seed()
        task = make_task(make, seed=0 if stop == 3 else 99)  # another start, which the checkpoint replaces
        result = train(task, out=tmp_path / "a", resume=True, **choice, **SETTINGS)
        assert result.losses == expected.losses, f"stopped at {stop}"
        assert result.scale_history == expected.scale_history
        assert result.evaluations == expected.evaluations and result.eval_loss == expected.eval_loss
        assert_equal_states(state(task), state(whole))
        a, b = checkpoint.latest(tmp_path / "a"), checkpoint.latest(tmp_path / "whole")
        torch.testing.assert_close(a["optimizer"], b["optimizer"], rtol=0, atol=0)
        assert torch.equal(a["random"]["torch"], b["random"]["torch"])
    assert json.loads((tmp_path / "a" / "run.json").read_text())["resumed_from"] == 10


def test_resuming_a_finished_run_trains_nothing_and_gives_its_result(tmp_path):
    task, again = make_task(make), make_task(make, seed=5)
    first = train(task, out=tmp_path, **SETTINGS)
    second = train(again, out=tmp_path, resume=True, **SETTINGS)
    assert second.losses == first.losses and second.eval_loss == first.eval_loss
    assert_equal_states(state(again), state(task))


def test_a_resumed_run_may_stop_again(tmp_path):
    whole = make_task(make)
    expected = train(whole, out=tmp_path / "whole", precision="fp16", **SETTINGS)
    for stop in (7, 12, 17):
        with pytest.raises(Interrupted):
            train(interrupted_at(stop), out=tmp_path / "a", precision="fp16", resume=True, **SETTINGS)
    task = make_task(make, seed=99)
    assert train(task, out=tmp_path / "a", precision="fp16", resume=True, **SETTINGS).losses == expected.losses
    assert_equal_states(state(task), state(whole))


def load_kills():
    """benchmarks/kills.py."""
    path = Path(__file__).parents[1] / "benchmarks" / "kills.py"
    spec = importlib.util.spec_from_file_location("kills_benchmark", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="moments within a write are found through /proc")
@pytest.mark.parametrize("count", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_where_it_was(count):
    """SIGKILL at a call, within a checkpoint's write and between its stages: each process really dies of it."""
    steps, every = (12, 3) if count == 3 else (120, 20)
    outcomes = load_kills().run(count, seed=1, steps=steps, every=every, note=lambda line: None)
    assert len(outcomes) == count and all(o.killed for o in outcomes)
    assert all(o.equal and not o.damaged for o in outcomes), outcomes


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    mine = [tmp_path / "checkpoints" / ".step-00000004.pt.77.tmp", tmp_path / ".train.parquet.77.tmp"]
    others = [tmp_path / "checkpoints" / ".notes.tmp", tmp_path / ".diary.txt.77.tmp"]
    for path in mine + others:
        path.write_text("half")
    train(make_task(make), out=tmp_path, resume=True, **SETTINGS)
    assert not any(p.exists() for p in mine) and all(p.exists() for p in others)


# the files


CONTENT = {"model": {"w": torch.arange(50_000.0)}, "note": "text", "list": [1, 2.5, None]}


def test_the_newest_are_kept(tmp_path):
    for step in (5, 10, 15, 20):
        checkpoint.save(tmp_path, step, CONTENT, keep=2)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-00000020.pt", "step-00000015.pt"]
    content = checkpoint.latest(tmp_path)
    assert content["step"] == 20 and content["schema"] == 1 and content["list"] == [1, 2.5, None]
    assert torch.equal(content["model"]["w"], CONTENT["model"]["w"])
    checkpoint.save_best(tmp_path, 20, CONTENT, loss=1.5)
    (tmp_path / "model.safetensors").write_text("")
    checkpoint.remove_all(tmp_path)
    assert checkpoint.latest(tmp_path) is None and checkpoint.best(tmp_path) is None
    assert [p.name for p in tmp_path.rglob("*")] == ["checkpoints"]


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


def test_after_a_checkpoint_that_failed_the_next_one_that_fits_is_written(tmp_path):
    """The limit is lifted after the second checkpoint would have been written: that of step 15 is there."""
    task, limit = make_task(make), files_no_larger_than(9_000)
    lifted = []

    def lift(model: nn.Module, step: int) -> None:
        if step == 12:
            lifted.append(limit.__exit__(None, None, None))

    task.after_step = lift
    limit.__enter__()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = train(task, out=tmp_path, **SETTINGS)
    finally:
        if not lifted:
            limit.__exit__(None, None, None)
    said = [str(w.message).partition(": cannot write")[0] for w in caught if "no checkpoint" in str(w.message)]
    assert said == ["no checkpoint after step 4", "no checkpoint after step 9"]
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-00000018.pt", "step-00000015.pt"]
    assert result.losses == train(make_task(make), **SETTINGS).losses
    assert not list(tmp_path.rglob(".*.tmp"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB, which only root can make."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs can be mounted here (needs root on Linux)")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full_in_mid_run_keeps_the_previous_checkpoint(small_disk):
    task, out = make_task(make), small_disk / "run"
    held = {}

    def fill(model: nn.Module, step: int) -> None:
        ballast = small_disk / "ballast"
        if step == 7:  # after the checkpoint of step 5
            with suppress_full_disk(), open(ballast, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        if step == 12:  # after that of step 10
            held.update(step=checkpoint.latest(out)["step"], unfinished=list(out.rglob(".*.tmp")))
            ballast.unlink()

    task.after_step = fill
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = train(task, out=out, flush_seconds=1000.0, **SETTINGS)
    said = [str(w.message) for w in caught]
    assert any(m.startswith("no checkpoint after step 9: cannot write") and "No space left" in m for m in said), said
    assert held == {"step": 5, "unfinished": []}
    assert checkpoint.latest(out)["step"] == 18 and len(read_log(out)) == 18
    assert result.losses == train(make_task(make), **SETTINGS).losses


@contextmanager
def suppress_full_disk():
    try:
        yield
    except OSError as error:
        assert error.errno == 28  # ENOSPC


def test_the_directory_is_synced_before_the_old_checkpoint_goes(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 5, CONTENT, keep=1)
    order, sync, replace = [], os.fsync, os.replace

    def fsync(handle: int) -> None:
        order.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}")).name, names()))
        sync(handle)

    def rename(source, target) -> None:
        order.append(("rename", Path(target).name, names()))
        replace(source, target)

    def names() -> list[str]:
        return sorted(p.name for p in (tmp_path / "checkpoints").glob("*.pt"))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    checkpoint.save(tmp_path, 10, CONTENT, keep=1)
    old, new = "step-00000005.pt", "step-00000010.pt"
    assert order == [
        ("sync", f".{new}.{os.getpid()}.tmp", [old]),
        ("rename", new, [old]),
        ("sync", "checkpoints", [old, new]),
    ]
    assert names() == [new]


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
