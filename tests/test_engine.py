"""Training on several processes: equal to one process, resumed as if not stopped, ended when one of them dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranked_training
import torch
from test_distributed import launch, succeed

from precscope.errors import UsageError
from precscope.profiles import Profile
from precscope.training.engine import Engine, Strategy

SCRIPT = Path(ranked_training.__file__)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("strategy", "world"),
    [("ddp", 2), *(pytest.param(*p, marks=pytest.mark.slow) for p in (("fsdp", 2), ("ddp", 4), ("fsdp", 4)))],
)  # fmt: skip
def test_equal_to_one_process_over_the_same_global_batch(tmp_path, strategy, world):
    """Accumulation and clipping included; fp32, a plan of bf16, and one of fp16 with a loss scale. In 16 bits a sum
    taken in another order may round to the other side."""
    torch.set_num_threads(1)
    succeed(launch(world, "equal", strategy, tmp_path, script=SCRIPT))
    for kind in ("fp32", "bf16", "fp16"):
        task, close = ranked_training.make(), 2e-6 if kind == "fp32" else 1e-4
        one = ranked_training.run(task, tmp_path / f"one-{kind}", None, world=1, plan=ranked_training.plan(kind))
        for rank in range(world):
            many = json.loads((tmp_path / f"{kind}-{rank}.json").read_text())
            assert many["losses"] == pytest.approx(one["losses"], rel=close)
            assert many["eval"] == pytest.approx(one["eval"], rel=close)
            for name, sums in one["sums"].items():
                assert many["sums"][name] == pytest.approx(sums, rel=50 * close, abs=close), (kind, name)
            assert f"{world} processes, {strategy}" in many["notes"]
        if strategy == "fsdp" and kind == "bf16":
            notes = " ".join(many["notes"])
            assert "gathers 2 of 4 units in their planned format: blocks.0, blocks.2" in notes
            assert "blocks.1 to the plan's hooks: autocast tells the operations inside apart" in notes
            assert "(root) to the plan's hooks: several precisions" in notes


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_resumed_is_not_stopped_bit_for_bit(tmp_path, strategy):
    """With a plan, dropout (a stream of its own on each process), BatchNorm, and a loss scale."""
    succeed(launch(2, "resume", strategy, tmp_path, script=SCRIPT))
    for kind in ("bf16", "fp16"):
        whole, part = json.loads((tmp_path / f"{kind}-0.json").read_text())
        assert whole["losses"] == part["losses"]
        for rank in (0, 1):
            whole, part = json.loads((tmp_path / f"{kind}-{rank}.json").read_text())
            assert whole["sums"] == part["sums"] and whole["eval"] == part["eval"]
        assert any("BatchNorm" in note for note in whole["notes"])
    # a whole checkpoint: one process goes on from it
    task = ranked_training.noisy()
    options = {"plan": ranked_training.plan("bf16"), "schedule": "constant", "warmup": 0, "steps": 7}
    one = ranked_training.run(task, tmp_path / "bf16-part", None, world=1, resume=True, **options)
    assert len(one["losses"]) == 7


def train_in_background(tmp_path: Path, task: str, *options: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1", "PIDS": str(tmp_path)}
    command = [sys.executable, "-m", "precscope", "train", f"{SCRIPT}:{task}", "--processes", "2", *options]
    return subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_killed_process_ends_all_and_is_named(tmp_path):
    running = train_in_background(tmp_path, "endless", "--steps", "100000", "--out", "run")
    pids = [tmp_path / f"pid-{rank}" for rank in (0, 1)]
    for _ in range(600):
        if all(p.exists() and p.read_text() for p in pids) or running.poll() is not None:
            break
        time.sleep(0.1)
    assert running.poll() is None, running.communicate()
    os.kill(int(pids[1].read_text()), signal.SIGKILL)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 1
    assert f"process 1 of 2 (pid {pids[1].read_text()}) was killed by SIGKILL" in said
    assert "1/stderr.log" in said
    with pytest.raises(ProcessLookupError):
        os.kill(int(pids[0].read_text()), 0)


@pytest.mark.slow
def test_a_process_that_raises_is_named_with_what_it_said(tmp_path):
    running = train_in_background(tmp_path, "raising", "--steps", "8", "--out", "run", "--strategy", "ddp")
    _, said = running.communicate(timeout=100)
    assert running.returncode == 1
    last = said.strip().splitlines()[-1]
    assert "process 1 of 2" in last and "exit code 1" in last and "on purpose, in process 1" in last
    log = Path(last.rpartition("its output is in ")[2])
    assert "on purpose, in process 1" in log.read_text()


@pytest.mark.slow
def test_torchrun_ends_all_and_names_the_killed_process(tmp_path):
    script = tmp_path / "go.py"
    script.write_text("import precscope as ps, ranked_training\nps.train(ranked_training.endless(), steps=100000)\n")
    environment = {**os.environ, "PYTHONPATH": f"{SCRIPT.parents[1]}{os.pathsep}{SCRIPT.parent}", "PIDS": str(tmp_path)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    pids = [tmp_path / f"pid-{rank}" for rank in (0, 1)]
    for _ in range(600):
        if all(p.exists() and p.read_text() for p in pids):
            break
        time.sleep(0.1)
    os.kill(int(pids[1].read_text()), signal.SIGKILL)
    said, _ = running.communicate(timeout=60)
    assert running.returncode != 0 and "rank      : 1" in said and "Signal 9 (SIGKILL)" in said


def test_verify_is_refused_with_processes(precscope_cli):
    done = precscope_cli("train", "gpt", "--processes", "2", "--verify", "--precision", "bf16")
    assert done.returncode == 2 and "--verify trains two runs" in done.stderr


def test_one_process_is_the_default(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    engine = Engine.from_environment(None, CPU)
    assert type(engine) is Engine and (engine.world, engine.rank, engine.main) == (1, 0, True)
    assert [engine.micro_index(3, i, 2) for i in range(2)] == [6, 7]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert type(Engine.from_environment(None, CPU)) is Engine


def test_what_cannot_be_is_refused(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="'ddp' needs processes that a launcher started: torchrun .*--processes 2"):
        Engine.from_environment("ddp", CPU)
    with pytest.raises(UsageError, match="must be 'ddp' or 'fsdp', or None for one process, not 'deepspeed'"):
        Engine.from_environment("deepspeed", CPU)
    with pytest.raises(UsageError, match="are for strategy 'ddp'"):
        Strategy("fsdp", sync_batchnorm=True)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UsageError, match="the environment lacks MASTER_ADDR"):
        Engine.from_environment("ddp", CPU)


@pytest.mark.slow
def test_what_only_some_tasks_do_wrong(tmp_path):
    succeed(launch(2, "wrong", "-", tmp_path, script=SCRIPT))
    said = json.loads((tmp_path / "said-0.json").read_text())
    assert "did not call the model that it was given" in said["part"]
    assert "holds the parameters as they were before FSDP2 sharded them" in said["stale"]
    assert "sync_batchnorm needs GPUs" in said["sync"]
    run = Profile.load(tmp_path / "recorded")
    assert run.run["merged_over"] == 2 and run.run["status"] == "done" and run.truth is not None


@pytest.mark.slow
def test_one_process_that_is_slow_or_fails_alone(tmp_path):
    """It writes a checkpoint for longer than collectives wait; its shadow step fails; it sees other checkpoints."""
    succeed(launch(2, "alone", "ddp", tmp_path, script=SCRIPT))
    first, second = (json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in (0, 1))
    assert first["files"] == 1
    for said in (first, second):
        assert said["warned"] == ["no shadow steps: running a step in fp32 raised ZeroDivisionError: not in fp32"]
    assert "ZeroDivisionError: not in fp32, and not on all processes: train without shadow_every" in second["local"]
    assert "process 0 of 2 cannot go on: another one is gone" in first["local"]
    assert first["losses"] == second["losses"] == 4  # those before the resume included
    for said in (first, second):
        assert "is of 4 steps for process 0 and none for process 1" in said["refused"]
    assert "2 processes, ddp" in Profile.load(tmp_path / "shadowed").run["note"]


@pytest.mark.slow
def test_low_parameters_and_phases_in_units_of_fsdp2(tmp_path):
    succeed(launch(2, "sharded", "fsdp", tmp_path, script=SCRIPT))
    for plain, guarded in json.loads((tmp_path / "0.json").read_text()).values():
        assert plain == guarded and plain[-1] < plain[0]
