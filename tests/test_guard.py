"""The guard: what it does where a module leaves the range; a run that it has nothing to say about is not touched."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from guarded import CASES, RUN, STEPS, Scales, actions, growing, noisy, parameters, relative_loss

from precscope.errors import TrainingError
from precscope.plans import PrecisionPlan
from precscope.plans.model import Phase
from precscope.profiles import Profile
from precscope.tasks import make_task
from precscope.tracing import trace
from precscope.training import train
from precscope.training.guard import GuardConfig, read_events
from precscope.training.halfmatmul import half_matmul_through_fp32
from precscope.training.log import read_log
from precscope.training.tasks.gpt import gpt

pytestmark = pytest.mark.filterwarnings("ignore:guard, step:RuntimeWarning")
NAMED = ("middle", "attention", "squares")


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


@pytest.mark.parametrize("name", ["middle", pytest.param("attention", marks=pytest.mark.slow), "squares"])
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
    if name == "attention":  # its linear layers stay: their outputs are not what overflowed
        assert {plan[f"attention.{n}"].compute for n in ("query", "key", "value")} == {"fp16"}
    assert PrecisionPlan.load(tmp_path / "run" / "plan-start.json") == PrecisionPlan.uniform("fp16")
    assert PrecisionPlan.load(tmp_path / "run" / promoted[0].plan) == plan

    try:  # without the guard, and with the amended plan from the beginning
        assert train(growing(name), precision="fp16", **RUN).eval_loss > 1.5 * in_fp32[name]
    except TrainingError as error:
        assert "not finite at 3 consecutive steps" in str(error)
    again = train(growing(name), plan=plan, **RUN)
    assert again.nonfinite_steps == 0 and again.eval_loss == pytest.approx(in_fp32[name], rel=0.02)


def test_what_comes_to_light_later_is_promoted_too(tmp_path):
    train(growing("stream"), precision="fp16", guard="promote", out=tmp_path / "run", **RUN)
    promoted = [e.module for e in read_events(tmp_path / "run") if e.action == "promote"]
    plan = PrecisionPlan.load(tmp_path / "run" / "plan.json")
    assert promoted[0] == "left" and {plan["left"].compute, plan["right"].compute} == {"bf16"}
    assert plan["head"].compute == "fp16"
    assert len(list((tmp_path / "run").glob("plan-0*.json"))) == len(promoted)


def test_steps_that_were_left_out_are_taken_again(in_fp32, tmp_path):
    called: list[int] = []
    task = growing("middle", after=lambda model, step: called.append(step))
    with pytest.warns(RuntimeWarning, match=r"guard, step \d+: wide, forward: .* beyond fp16's 65504. From here"):
        result = train(task, precision="fp16", guard="promote", out=tmp_path / "run", **RUN)
    first, promoted = read_events(tmp_path / "run")
    assert f"2 steps left out, taken again from step {first.step} on" in promoted.text
    assert result.skipped_steps == 0 and [r.step for r in read_log(tmp_path / "run")] == list(range(STEPS))
    assert called == list(range(STEPS)), "after_step is called once for each step"
    assert result.eval_loss == pytest.approx(in_fp32["middle"], rel=0.005)


@pytest.mark.parametrize("name, format", [("joined", "bf16"), ("joined unseen", "fp32")])
def test_where_formats_do_not_mix_fp32_is_taken_for_as_many_modules_as_need_it(name, format):
    true = train(growing(name), precision="fp32", **RUN).eval_loss
    result = train(growing(name), precision="fp16", guard="promote", **RUN)
    assert {n: result.plan[n].compute for n in ("left", "right", "head")} == {
        "left": format, "right": format, "head": "fp16"
    }  # fmt: skip
    assert result.eval_loss == pytest.approx(true, rel=0.02)


def test_code_outside_every_module_is_promoted_with_the_module_whose_output_it_takes(tmp_path):
    def task():
        made = growing("middle")
        torch.manual_seed(0)
        made.model, made.loss = Scales(), relative_loss
        return made

    true = train(task(), precision="fp32", **RUN).eval_loss
    result = train(task(), precision="fp16", guard="promote", out=tmp_path / "run", **RUN)
    promoted = read_events(tmp_path / "run")[-1]
    assert (promoted.module, promoted.action) == ("(outside)", "promote")
    assert set(promoted.numbers["modules"]) < {"", "project"} and result.plan["body.0"].compute == "fp16"
    assert result.eval_loss == pytest.approx(true, rel=0.02)


def test_overflow_in_silence_before_anything_is_usual_is_found_and_gone_back_on(tmp_path):
    true = train(growing("early"), precision="fp32", **RUN).eval_loss
    result = train(growing("early"), precision="fp16", guard="rollback", out=tmp_path / "run", **RUN)
    events = read_events(tmp_path / "run")
    assert [(e.action, e.module) for e in events] == [("rollback", "body.2"), ("promote", "body.2")]
    assert 20 < events[1].step < events[0].step, "looked for from the last sound step on"
    assert result.eval_loss == pytest.approx(true, rel=0.02)


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


def test_a_run_with_phases_is_guarded(in_fp32, tmp_path):
    plan = PrecisionPlan.uniform("fp16").replace(phases=[Phase(from_step=30, precision="bf16"), 
                                                         Phase(from_step=40, precision="plan")])  # fmt: skip
    result = train(growing("middle"), plan=plan, guard="promote", out=tmp_path / "run", **RUN)
    assert actions(tmp_path / "run")[-1] == ("overflow", "promote", "wide")
    assert [p.from_step for p in result.plan.phases] == [30, 40]
    assert result.eval_loss == pytest.approx(in_fp32["middle"], rel=0.02)


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


# a healthy run


@pytest.mark.parametrize(
    ("action", "precision"),
    [
        pytest.param("skip", "fp32", marks=pytest.mark.slow),
        pytest.param("promote", "bf16", marks=pytest.mark.slow),
        ("promote", "fp16"),
        ("rollback", "fp16"),
    ],
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
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_noise_raises_no_alarm(seed, heavy, tmp_path):
    plain = noisy(seed, heavy=heavy)
    train(plain, precision="fp16", steps=100, lr=3e-3)
    task = noisy(seed, heavy=heavy)
    train(task, precision="fp16", steps=100, lr=3e-3, guard="promote", out=tmp_path / "run")
    assert read_events(tmp_path / "run") == []
    assert torch.equal(parameters(task), parameters(plain)), "a look at a suspect leaves no trace"


# resuming


@pytest.mark.parametrize(("action", "dies", "every"), [
    pytest.param("promote", 65, 10, marks=pytest.mark.slow),
    ("promote", 44, 43),  # from amid the steps that are taken again
    pytest.param("rollback", 55, 10, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_killed_run_under_a_guard_resumes_bit_identically(action, dies, every, tmp_path):
    def run(out, task, **more):
        guard = GuardConfig(action=action, quiet_steps=30)
        return train(task, precision="fp16", guard=guard, out=out, checkpoint_every=every, **RUN, **more)

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
