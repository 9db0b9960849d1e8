"""Twins that a comparison trains: other seeds, the fp32 twin, and what happens to those that are there already."""

from __future__ import annotations

import json

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

import precscope as ps
from precscope.comparison.runs import read_run
from precscope.comparison.seeds import arguments
from precscope.errors import UsageError
from precscope.store import update_json

TASK = """
import torch, precscope as ps
from torch import nn

class Net(nn.Module):
    def __init__(self, width, squeeze):
        super().__init__()
        self.a, self.b, self.squeeze = nn.Linear(8, width, bias=False), nn.Linear(width, 4), squeeze
    def forward(self, x):
        return self.b(torch.tanh(self.a(x * self.squeeze) / self.squeeze))

def task(seed, width=16, squeeze=1.0):
    def batch(step):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1000 * seed + step))
        return x, x[:, :4].argmax(1)
    loss = lambda model, b: nn.functional.cross_entropy(model(b[0]), b[1])
    held_out = [batch(-1 - i) for i in range(4)]
    return ps.Task(model=Net(width, squeeze), loss=loss, batches=batch, eval_batches=held_out)

def make(seed=0):
    return task(seed)

def wide(seed=0):
    return task(seed, width=20)

def flushed(seed=0):  # inputs of 1e-9 are zeros in fp16
    return task(seed, squeeze=1e-9)

def fails_late(seed=0):  # under seed 2 the loss is NaN from step 6 on
    made = task(seed)
    loss = made.loss
    def spoilt(model, b):
        return loss(model, b) * (float("nan") if seed == 2 and b[0].abs().sum() == 0 else 1.0)
    batches = made.batches
    made.batches = lambda step: batches(step) if step < 6 else (torch.zeros(16, 8), batches(step)[1])
    made.loss = spoilt
    return made
"""

COMMON = {"steps": 12, "lr": 1e-2}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "task.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(out, name="make", **options):
    return ps.train(f"task.py:{name}", out=out, **{"precision": out.partition("-")[0], **COMMON, **options})


def started(path):
    return json.loads((path / "run.json").read_text())["started"], (path / "train.parquet").stat().st_mtime_ns


def test_missing_seeds_are_trained_once_and_as_by_hand(folder):
    for word in ("fp32", "bf16"):
        train(word, grad_clip=0.5, betas=(0.8, 0.9), schedule="linear")
    said = []
    first = ps.compare(["fp32", "bf16"], seeds=3, note=said.append)
    (pair,) = first.pairs
    assert pair.seeds == (0, 1, 2) and pair.loss.df == 2 and pair.why_unpaired == ""
    assert said == [f"{r}/seeds/000{s}: training" for s in (1, 2) for r in ("fp32", "bf16")]
    by_hand = train("bf16-hand", precision="bf16", seed=2, grad_clip=0.5, betas=(0.8, 0.9), schedule="linear")
    assert tuple(pd.read_parquet("bf16/seeds/0002/train.parquet").loss) == by_hand.losses
    before = started(folder / "bf16/seeds/0002")
    said.clear()
    again = ps.compare(["fp32", "bf16"], seeds=3, note=said.append)
    assert all(line.endswith("there already") for line in said) and started(folder / "bf16/seeds/0002") == before
    assert again.pairs == first.pairs and ps.compare(["fp32", "bf16"]).pairs == first.pairs
    assert ps.compare(["fp32", "bf16"], seeds=4).pairs[0].seeds == (0, 1, 2, 3)  # only the fourth was missing
    assert started(folder / "bf16/seeds/0002") == before


def test_a_plan_and_a_loss_scale_go_to_the_twins(folder):
    plan = ps.PrecisionPlan(default="fp16", modules={"b": ps.LayerPrecision("fp32")}, loss_scale={"initial": 256.0})
    train("plan", precision=None, plan=plan)
    train("fp16", initial_scale=1024.0)
    train("fp32")
    ps.compare(["fp32", "fp16", "plan"], seeds=2)
    assert ps.PrecisionPlan.load("plan/seeds/0001/plan.json")["b"].compute == "fp32"
    assert pd.read_parquet("plan/seeds/0001/train.parquet").scale.iloc[0] == 256
    assert pd.read_parquet("fp16/seeds/0001/train.parquet").scale.iloc[0] == 1024
    assert read_run(folder / "plan/seeds/0001").precision == "plan"
    assert [p.seeds for p in ps.compare(["fp32", "fp16", "plan"]).pairs] == [(0, 1), (0, 1)]


def test_guard_and_compilation_go_to_the_twins(folder):
    train("bf16", guard="promote")
    update_json(folder / "bf16/run.json", {"compile_config": {"backend": "eager"}})
    again = arguments(read_run(folder / "bf16"), None)
    assert again["guard"].action == "promote" and again["compile"].backend == "eager"
    twin = arguments(read_run(folder / "bf16"), "fp32")
    assert "guard" not in twin and twin["precision"] == "fp32" and twin["steps"] == 12
    update_json(folder / "bf16/run.json", {"guard": None, "compile_config": None})
    assert not {"guard", "compile"} & set(arguments(read_run(folder / "bf16"), None))


def test_seeds_of_a_guarded_run(folder):
    """They begin with the plan that the run began with; where the guard's settings are not known, that is told."""
    plan = ps.PrecisionPlan(modules={"a": "bf16"})
    for out in ("fp32", "plan"):
        train(out, **({"precision": None, "plan": plan} if out == "plan" else {}))
    plan.save(folder / "plan/plan-start.json")
    ps.PrecisionPlan(modules={"a": "fp32"}).save(folder / "plan/plan.json")  # as a guard amends it
    ps.compare(["fp32", "plan"], seeds=2)
    assert ps.PrecisionPlan.load("plan/seeds/0001/plan.json")["a"].compute == "bf16"
    assert ps.compare(["fp32", "plan"]).pairs[0].seeds == (0, 1)  # the same plan, although plan.json differs
    (folder / "plan/events.jsonl").write_text("")
    content = json.loads((folder / "plan/run.json").read_text())
    content.pop("guard", None)
    (folder / "plan/run.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"ran under a guard.*with --guard and --seed 1 --out plan/seeds/0001"):
        ps.compare(["fp32", "plan"], seeds=3)
    assert not (folder / "fp32/seeds/0002").exists()


def test_a_seed_that_someone_else_trained_is_not_overwritten(folder):
    train("fp32")
    train("bf16")
    train("bf16/seeds/0001", precision="bf16", seed=1, lr=5e-2)
    before = started(folder / "bf16/seeds/0001")
    with pytest.raises(UsageError, match=r"bf16/seeds/0001 holds another run \(its lr was 0.05, .*: move it away"):
        ps.compare(["fp32", "bf16"], seeds=2)
    assert started(folder / "bf16/seeds/0001") == before and not (folder / "fp32/seeds").exists()


def test_a_killed_seed_goes_on_and_a_changed_configuration_starts_anew(folder):
    for word in ("fp32", "bf16"):
        train(word, checkpoint_every=4)
    ps.compare(["fp32", "bf16"], seeds=2)
    twin = folder / "bf16/seeds/0001"
    whole = pd.read_parquet(twin / "train.parquet")
    (twin / "checkpoints/step-00000012.pt").unlink()  # as a kill after step 9 leaves it
    pq.write_table(pq.read_table(twin / "train.parquet").slice(0, 9), twin / "train.parquet")
    update_json(twin / "run.json", {"status": "running", "eval_loss": None})
    said = []
    ps.compare(["fp32", "bf16"], seeds=2, note=said.append)
    assert said == ["fp32/seeds/0001: there already", "bf16/seeds/0001: goes on"]
    assert json.loads((twin / "run.json").read_text())["resumed_from"] == 8
    assert tuple(pd.read_parquet(twin / "train.parquet").loss) == tuple(whole.loss)
    train("bf16", checkpoint_every=4, lr=2e-2, exist="overwrite")
    assert ps.compare(["fp32", "bf16"]).pairs[0].seeds == (0,)
    said.clear()
    found = ps.compare(["fp32", "bf16"], seeds=2, note=said.append)
    assert said[1] == "bf16/seeds/0001: its lr was 0.01, the run's is 0.02: training anew"
    assert found.pairs[0].seeds == (0, 1) and read_run(twin).settings["lr"] == 0.02


def test_a_seed_killed_before_its_first_row_starts_again(folder):
    train("fp32")
    train("bf16")
    twin = folder / "bf16/seeds/0001"
    twin.mkdir(parents=True)
    update_json(twin / "run.json", {"schema": 1, "status": "running", "twin_of": "bf16"})
    assert ps.compare(["fp32", "bf16"], seeds=2).pairs[0].seeds == (0, 1)


def test_a_seed_that_diverges_is_an_outcome_and_stays(folder):
    train("fp32")
    train("bf16", "fails_late")
    said = []
    found = ps.compare(["fp32", "bf16"], seeds=3, note=said.append)
    (pair,) = found.pairs
    assert pair.why_unpaired.startswith("another task")
    assert pair.kind == "diverged" and "seed 2: stopped at step 8" in pair.verdict
    assert any("bf16/seeds/0002" in line and "not finite" in line for line in said)
    said.clear()
    ps.compare(["fp32", "bf16"], seeds=3, note=said.append)
    assert "bf16/seeds/0002: there already" in said


def test_runs_that_cannot_be_made_again_say_what_to_do(folder):
    train("fp32")
    ps.train(ps.tasks.make_task("task.py:make").factory(), out="ref", precision="bf16", **COMMON)
    from task import make

    torch.manual_seed(0)
    ps.train(make(), out="hand", precision="bf16", **COMMON)
    with pytest.raises(UsageError, match=r"hand was trained on a task made by hand.*pass task= \(--task\)"):
        ps.compare(["fp32", "hand"], seeds=2)
    assert not (folder / "fp32/seeds").exists()  # refused before anything was trained
    found = ps.compare(["fp32", "hand"], seeds=2, task="task.py:make")
    assert found.pairs[0].seeds == (0, 1) and found.pairs[0].why_unpaired == ""
    with pytest.raises(UsageError, match=r"now makes a Net of 244 parameters, and bf16 trained a Net of 196"):
        train("bf16")
        ps.compare(["bf16"], seeds=2, task="task.py:wide")
    (folder / "task.py").rename(folder / "moved.py")
    with pytest.raises(UsageError, match=r"cannot be made again \(no file task.py.*pass task="):
        ps.compare(["fp32", "bf16"], seeds=5)
    assert ps.compare(["fp32", "bf16"], seeds=2, task="moved.py:make").pairs[0].seeds == (0, 1)
    update_json(folder / "bf16/run.json", {"world_size": 2})
    with pytest.raises(UsageError, match=r"trained on 2 processes: .*torchrun.*bf16/seeds/0001"):
        ps.compare(["fp32", "bf16"], seeds=2)
    update_json(folder / "bf16/run.json", {"world_size": 1, "status": "running"})
    with pytest.raises(UsageError, match=r"not finished: 12 of 12 steps: finish it first"):
        ps.compare(["fp32", "bf16"], seeds=2)


@pytest.mark.parametrize("seeds", [1, 0, True, 2.5])
def test_numbers_of_seeds_that_make_no_sense(folder, seeds):
    train("fp32")
    with pytest.raises(UsageError, match="integer of at least 2"):
        ps.compare(["fp32"], seeds=seeds)


def test_verify_trains_the_fp32_twin_once(folder):
    train("bf16")
    said = []
    found = ps.verify("bf16", note=said.append)
    assert found.passed and found.baseline == "bf16-fp32" and found.pairs[0].kind == "one seed"
    assert found.pairs[0].why_unpaired == "" and read_run(folder / "bf16-fp32").precision == "fp32"
    by_hand = train("fp32")
    assert tuple(pd.read_parquet("bf16-fp32/train.parquet").loss) == by_hand.losses
    assert ps.verify("bf16", out="fp32", note=said.append).passed  # made by hand, and just that twin
    assert said == ["bf16-fp32: training", "fp32: there already"]
    assert ps.verify("bf16", seeds=3).pairs[0].seeds == (0, 1, 2)
    train("bf16", steps=14, exist="overwrite")
    said.clear()
    assert ps.verify("bf16", note=said.append).passed  # the twin follows the run
    assert said == ["bf16-fp32: its steps was 12, the run's is 14: training anew"]


def test_the_fp32_twin_stores_in_fp32_too(folder):
    train("fp32-low", params="bf16", updates="stochastic")
    found = ps.verify("fp32-low")
    assert found.baseline == "fp32-low-fp32" and found.pairs[0].loss.mean != 0
    assert "settings differ too: params bf16 against None, updates stochastic against None" in found.pairs[0].notes
    twin = read_run(folder / "fp32-low-fp32")
    assert twin.is_fp32 and not read_run(folder / "fp32-low").is_fp32
    assert tuple(twin.log.loss) == train("fp32").losses
    said = []
    for _ in range(2):
        (pair,) = ps.compare(["fp32-low-fp32", "fp32-low"], seeds=2, note=said.append).pairs
        assert pair.seeds == (0, 1)
    assert said[1::2] == ["fp32-low/seeds/0001: training", "fp32-low/seeds/0001: there already"]
    assert read_run(folder / "fp32-low/seeds/0001").precision == read_run(folder / "fp32-low").precision


def test_verify_keeps_its_hands_off_other_runs(folder):
    train("fp32")
    with pytest.raises(UsageError, match="its twin would be itself"):
        ps.verify("fp32")
    train("bf16", seed=1)
    before = started(folder / "fp32")
    with pytest.raises(UsageError, match=r"fp32 holds another run \(its seed was 0, the run's is 1\).*--verify-out"):
        ps.verify("bf16", out="fp32")
    assert started(folder / "fp32") == before
    ps.verify("bf16")
    train("plan", precision="bf16", steps=14)
    before = started(folder / "bf16-fp32")
    with pytest.raises(UsageError, match=r"bf16-fp32 holds another run \(its seed was 1, the run's is 0\)"):
        ps.verify("plan", out="bf16-fp32")  # the twin of another run
    assert started(folder / "bf16-fp32") == before


def test_verify_fails_where_the_loss_does_not_hold(folder):
    train("fp16", "flushed", steps=40, lr=5e-2)
    found = ps.verify("fp16", seeds=3)
    assert not found.passed and found.pairs[0].kind == "worse"
    assert found.pairs[0].loss.share > 0.1


def test_on_the_command_line(folder, capsys, monkeypatch):
    from precscope.cli import main

    def cli(*arguments):
        monkeypatch.setattr("sys.argv", ["precscope", *arguments])
        monkeypatch.setenv("COLUMNS", "80")
        try:
            main()
        except SystemExit as stop:
            return stop.code or 0, capsys.readouterr()
        return 0, capsys.readouterr()

    steps = ("--steps", "30", "--lr", "0.05")
    status, said = cli("train", "task.py:make", "--precision", "bf16", *steps, "--out", "a", "--verify")
    assert status == 0 and "within the margin of 2%" in " ".join(said.out.split())
    assert "next: precscope compare a-fp32 a --seeds 5" in said.out
    status, said = cli(
        "train", "task.py:flushed", "--precision", "fp16", *steps, "--out", "b", "--verify", "--verify-out", "twin"
    )  # fmt: skip
    assert status == 1 and "worse than the margin of 2%" in " ".join(said.out.split())
    assert read_run(folder / "twin").precision == "fp32"
    status, said = cli("train", "task.py:make", "--verify")
    assert status == 2 and "give --plan or --precision" in said.err and not (folder / "runs").exists()
    status, said = cli(
        "compare", "a-fp32", "a", "--seeds", "3", "--json", "c.json", "--figure", "f.svg", "--margin", "0.05"
    )  # fmt: skip
    assert status == 0 and "a: equivalent within 5%" in said.out and "wrote f.svg" in said.out
    assert max(len(line) for line in said.out.splitlines() if not line.startswith("next: ")) <= 80
    assert "a/seeds/0002: training" in said.err
    assert json.loads((folder / "c.json").read_text())["pairs"][0]["kind"] == "equivalent"
