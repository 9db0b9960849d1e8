"""Plans over time: which precision is in force, what goes on through a switch, and what a resumed run finds."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import precscope as ps
from precscope.errors import PlanError, UsageError
from precscope.plans import LayerPrecision, Phase, PrecisionPlan
from precscope.profiles import Profile
from precscope.profiling import train_recorded
from precscope.sites import Role
from precscope.tasks import Task, make_task
from precscope.training import TrainConfig, Trainer, checkpoint, make_precision, phases, train
from precscope.training.guard import Guard
from precscope.training.log import read_log


class Net(nn.Module):
    """Dropout draws, BatchNorm keeps buffers, one parameter is frozen, one buffer is in no state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16, bias=False), nn.Linear(16, 1)
        self.norm, self.drop = nn.BatchNorm1d(16), nn.Dropout(0.3)
        self.fixed = nn.Parameter(torch.full((16,), 1 / 3), requires_grad=False)
        self.register_buffer("mean", torch.zeros(16), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.norm(self.fc1(x)))
        if not self.training:
            return self.fc2(h * self.fixed - 0.1 * self.mean)
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0).to(self.mean.dtype)
        return self.fc2(self.drop(h) * self.fixed)


def make() -> Task:
    x = torch.randn(12, 8, 8, generator=torch.Generator().manual_seed(1))
    return Task(
        model=Net(),
        loss=lambda model, batch: F.mse_loss(model(batch).float(), batch.sum(1, keepdim=True)),
        batches=list(x),
        eval_batches=list(x[:2]),
    )


STEPS = 12
SETTINGS = {"steps": STEPS, "eval_every": 5, "seed": 2}
LOW = PrecisionPlan.uniform("bf16", policy="cast")
SCHEDULES = {
    "fp16, calibration, fp16": phases.parse(["0:fp16", "4:fp32", "8:fp16"]),
    "low early, high late": phases.parse(["0:bf16", "6:fp32"]),
    "plans per module": PrecisionPlan(
        default="fp32",
        phases=[
            Phase(from_step=3, plan=PrecisionPlan(default="fp32", modules={"fc1": "fp16"})),
            Phase(from_step=8, plan=PrecisionPlan(default="bf16", modules={"fc1": "fp32", "norm": "fp32"})),
        ],
    ),
    "stored low in the middle": PrecisionPlan(
        phases=[Phase(from_step=3, plan=LOW), Phase(from_step=8, precision="fp32")]
    ),
    "stored low at both ends": PrecisionPlan(
        default=LOW.default,
        phases=[
            Phase(from_step=4, precision="fp32"),
            Phase(from_step=8, plan=PrecisionPlan.uniform("fp16", policy="cast")),
        ],
    ),
}


class Interrupted(Exception):
    pass


def interrupted_at(step: int) -> Task:
    task = make_task(make)

    def stop(model: nn.Module, now: int) -> None:
        if now == step:
            raise Interrupted

    task.after_step = stop
    return task


def weights(task: Task) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in [*task.model.named_parameters(), *task.model.named_buffers()]}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype is b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_that_stopped_in_any_phase_ends_as_one_that_never_did(schedule, tmp_path):
    plan, whole = SCHEDULES[schedule], make_task(make)
    expected = train(whole, plan=plan, out=tmp_path / "whole", checkpoint_every=4, **SETTINGS)
    for stop, every in ((5, 5), (7, 4), (10, 3)):  # in each phase; from checkpoints within and between phases
        out = tmp_path / str(stop)
        with pytest.raises(Interrupted):
            train(interrupted_at(stop), plan=plan, out=out, checkpoint_every=every, **SETTINGS)
        torch.seed()
        task = make_task(make, seed=99)  # another start, which the checkpoint replaces, what is not trained included
        task.model.fixed.data.add_(1)
        result = train(task, plan=plan, out=out, checkpoint_every=4, resume=True, **SETTINGS)
        assert result.losses == expected.losses, f"stopped at {stop}"
        assert result.scale_history == expected.scale_history
        assert result.evaluations == expected.evaluations
        assert_same(weights(task), weights(whole))
        mine, theirs = checkpoint.latest(out), checkpoint.latest(tmp_path / "whole")
        torch.testing.assert_close(mine["optimizer"], theirs["optimizer"], rtol=0, atol=0)
        assert mine["precision"] == theirs["precision"] and mine["history"] == theirs["history"]
        assert [r.phase for r in read_log(out)] == [r.phase for r in read_log(tmp_path / "whole")]


@pytest.mark.parametrize("layer", ["fp32", "bf16", "fp16", "low"])
def test_phases_that_all_say_the_same_change_nothing(layer, tmp_path):
    entry = LOW.default if layer == "low" else LayerPrecision(layer)
    plain = PrecisionPlan(default=entry)
    phased = plain.replace(phases=[Phase(from_step=3, plan=plain), Phase(from_step=7, precision="plan")])
    one, two = make_task(make), make_task(make)
    expected = train(one, plan=plain, out=tmp_path / "a", checkpoint_every=6, **SETTINGS)
    result = train(two, plan=phased, out=tmp_path / "b", checkpoint_every=6, **SETTINGS)
    assert result.losses == expected.losses and result.eval_loss == expected.eval_loss
    assert result.scale_history == expected.scale_history
    assert_same(weights(two), weights(one))
    a, b = (checkpoint.latest(tmp_path / n)["optimizer"] for n in "ab")
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_loss_scale_rests_and_goes_on_from_where_it_was():
    task = make_task(make)
    plan = phases.parse(["0:fp16", "4:fp32", "8:fp16"]).replace(loss_scale={"initial": 2.0**30, "growth_interval": 2})
    result = train(task, plan=plan, **SETTINGS)
    by_step = dict(result.scale_history)
    before, after = [s for step, s in by_step.items() if step < 4][-1], by_step[8]
    assert by_step[4] == 1  # fp32: no loss scale
    assert before < 2.0**30 and result.skipped_steps > 0
    assert after in (before, before / 2, before * 2)  # step 3's own update is in it


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "nadam"])
def test_optimizer_state_follows_the_parameters_dtype(optimizer):
    makers = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
        "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
        "nadam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    }
    task = make_task(make)

    def make_it(params):
        return makers[optimizer]([p for p in params if p.requires_grad])

    task.optimizer = make_it
    plan = SCHEDULES["stored low in the middle"]
    trainer = Trainer(
        task,
        TrainConfig(**SETTINGS),
        precision=make_precision(None, plan=plan, model=task.model, device=torch.device("cpu")),
        out=None,
    )
    seen = {}

    def look(model, step):
        kinds = set()
        for parameter, state in trainer.optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.dim() > 0:
                    assert value.dtype is parameter.dtype, (step, key)
                    kinds.add(value.dtype)
                elif isinstance(value, torch.Tensor):
                    assert value.dtype is torch.float32, (step, key)  # counts stay exact
        seen[step] = kinds

    task.after_step = look
    trainer.run()
    assert seen[2] == {torch.float32} and seen[3] == {torch.bfloat16} and seen[8] == {torch.float32}
    assert all(p.dtype is torch.float32 for p in task.model.parameters())


def test_a_switch_down_and_up_keeps_what_low_storage_held_and_frozen_parts_whole():
    task, seen = make_task(make), {}
    start = task.model.fixed.detach().clone()
    task.after_step = lambda model, step: seen.update({step: copy.deepcopy(dict(model.named_parameters()))})
    train(task, plan=SCHEDULES["stored low in the middle"], steps=9, lr=1e-30, warmup=0, weight_decay=0.0, seed=2)
    assert seen[7]["fc1.weight"].dtype is torch.bfloat16 and seen[8]["fc1.weight"].dtype is torch.float32
    assert torch.equal(seen[8]["fc1.weight"], seen[7]["fc1.weight"].float())  # no step moved it: nothing else came back
    assert not torch.equal(seen[8]["fc1.weight"], seen[2]["fc1.weight"])
    assert torch.equal(seen[8]["fixed"], start) and torch.equal(task.model.fixed, start)  # never trained: as it was


def test_run_json_and_the_log_say_which_phase_ran_when(tmp_path):
    train(make_task(make), plan=SCHEDULES["plans per module"], out=tmp_path, **SETTINGS)
    told = json.loads((tmp_path / "run.json").read_text())["phases"]
    assert [(p["from_step"], p["precision"], p["why"]) for p in told] == [
        (0, "fp32", "start"),
        (3, "fp32, 1 entry otherwise", "phase"),
        (8, "bf16, 2 entries otherwise", "phase"),
    ]
    rows = read_log(tmp_path)
    assert [r.phase for r in rows] == [0] * 3 + [1] * 5 + [2] * 4
    assert [r.scale != 1 for r in rows] == [False] * 3 + [True] * 5 + [False] * 4
    assert ps.compare([tmp_path]) is not None
    plain = train(make_task(make), precision="bf16", out=tmp_path / "plain", **SETTINGS)
    assert plain.notes == () and {r.phase for r in read_log(tmp_path / "plain")} == {0}
    assert json.loads((tmp_path / "plain" / "run.json").read_text())["phases"] == [
        {"from_step": 0, "precision": "bf16", "why": "start"}
    ]


@pytest.mark.parametrize("schedule", ["fp16, calibration, fp16", "stored low in the middle"])
def test_a_recorder_sees_unscaled_gradients_in_every_phase_and_changes_nothing(schedule, tmp_path):
    plan = SCHEDULES[schedule]
    bare, watched = make_task(make), make_task(make)
    expected = train(bare, plan=plan, **SETTINGS)
    result = train_recorded(watched, out=tmp_path, plan=plan, every=1, ops=False, shadow_every=None, **SETTINGS)
    assert result.losses == expected.losses
    assert_same(weights(watched), weights(bare))
    profile = Profile.load(tmp_path)
    history = profile.history()
    grads = history[(history.module == "fc2") & (history.role == "grad_output")]
    assert sorted(grads.step.unique()) == list(range(STEPS))
    sizes = grads.groupby("step").amax.max()
    assert np.isfinite(sizes).all() and sizes.max() < 100 * sizes.min(), sizes  # a scale of 65536 would show


def test_shadow_steps_in_every_phase(tmp_path):
    plan = SCHEDULES["fp16, calibration, fp16"]
    bare, watched = make_task(make), make_task(make)
    expected = train(bare, plan=plan, **SETTINGS)
    result = train(watched, plan=plan, out=tmp_path, shadow_every=3, **SETTINGS)
    assert result.losses == expected.losses
    truth = Profile.load(tmp_path).truth
    worst = truth.groupby("step").rel_error.max()
    assert worst[6] < 1e-5 and worst[0] > 1e-5 and worst[9] > 1e-5, worst  # step 6 ran in fp32


def test_phases_within_a_phase():
    inner = PrecisionPlan(
        default="fp32", phases=[Phase(from_step=4, precision="bf16"), Phase(from_step=9, precision="fp16")]
    )
    plan = PrecisionPlan(phases=[Phase(from_step=2, plan=inner), Phase(from_step=8, precision="fp32")])
    assert phases.starts(plan) == (0, 2, 4, 8)
    assert [plan.at_step(s).default.compute for s in (0, 2, 4, 7, 8, 9)] == [
        "fp32",
        "fp32",
        "bf16",
        "bf16",
        "fp32",
        "fp32",
    ]


def test_going_back_into_an_earlier_phase_trains_as_that_phase_says(tmp_path):
    plan = SCHEDULES["stored low in the middle"]
    whole = make_task(make)
    expected = train(whole, plan=plan, **SETTINGS)
    task = make_task(make)
    trainer = Trainer(
        task,
        TrainConfig(checkpoint_every=2, keep=9, **SETTINGS),
        precision=make_precision(None, plan=plan, model=task.model, device=torch.device("cpu")),
        out=tmp_path,
    )
    gone_back = []

    class GoingBack(Guard):
        """Goes back once, from the last phase into the one before."""

        def begin(self, trainer):
            pass

        def allows(self, allowed, norm):
            return allowed

        def after_reading(self, trainer, rows):
            if rows[-1].step == 9 and not gone_back:
                gone_back.append(trainer.in_force)
                trainer.rollback(checkpoint.load(checkpoint.checkpoints(tmp_path)[2]))
                assert trainer.next_step == 4 and checkpoint.checkpoints(tmp_path)[0].name == "step-00000004.pt"
                assert task.model.fc1.weight.dtype is torch.bfloat16

        def state_dict(self):
            return {}

    trainer.guard = GoingBack()
    result = trainer.run(
        recorder=lambda t: ps.record(
            t.forward_model, tmp_path, optimizer=t.optimizer, every=1, flush_every=4, exist="append"
        )
    )
    assert gone_back == [8]
    assert result.losses == expected.losses and result.evaluations == expected.evaluations
    assert_same(weights(task), weights(whole))
    rows = read_log(tmp_path)
    assert [r.step for r in rows] == list(range(STEPS)) and rows[5].phase == rows[4].phase < rows[-1].phase
    told = json.loads((tmp_path / "run.json").read_text())
    assert [p["why"] for p in told["phases"]] == ["start", "phase", "went back", "phase"]
    assert told["recorded_steps"] == STEPS
    once, twice = tmp_path / "once", tmp_path  # each step once, with the numbers of a run that never went back
    train(make_task(make), plan=plan, out=once, recorder=lambda t: ps.record(
        t.forward_model, once, optimizer=t.optimizer, every=1, exist="append"), **SETTINGS)  # fmt: skip
    first, second = (Profile.load(path) for path in (once, twice))
    assert first.steps == second.steps == list(range(STEPS))
    counts = [dict(zip(p.sites, p.table.counts, strict=True)) for p in (first, second)]
    seen = [site for site in first.sites if site.role is not Role.STATE]  # of which some compare with steps before
    assert {site.role for site in seen} == set(Role) - {Role.STATE}
    assert all(np.array_equal(counts[0][site], counts[1][site]) for site in seen)


def test_fp32_gradients_of_an_fp16_phase_do_not_reach_into_a_bf16_phase(tmp_path):
    """Autograd widens gradients of fp16 parameters, and would go on to do so where they are bf16: a run resumed there
    could not know."""
    low = [PrecisionPlan(default=LayerPrecision(f, params=f)) for f in ("fp16", "bf16")]
    plan = PrecisionPlan(phases=[Phase(from_step=2, plan=low[0]), Phase(from_step=4, plan=low[1])])
    settings = {**SETTINGS, "updates": "stochastic", "plan": plan, "checkpoint_every": 5}
    whole, task = make_task(make), make_task(make)
    expected = train(whole, out=tmp_path / "whole", **settings)
    with pytest.raises(Interrupted):
        train(interrupted_at(6), out=tmp_path / "part", **settings)
    result = train(task, out=tmp_path / "part", resume=True, **settings)
    assert result.losses == expected.losses
    assert_same(weights(task), weights(whole))
    assert all(p.grad_dtype is p.dtype for p in whole.model.parameters())  # fp32 again, and their gradients too


# making them


def test_parse():
    plan = phases.parse(["0:fp16", "100:float32", "120:fp16"])
    assert [(p.from_step, p.precision) for p in plan.phases] == [(0, "fp16"), (100, "fp32"), (120, "fp16")]
    assert plan.default.compute == "fp16"
    base = PrecisionPlan(default="bf16", modules={"fc2": "fp32"})
    late = phases.parse(["50:fp32", "60:plan"], plan=base)
    assert late.at_step(0).default.compute == "bf16" and late.at_step(55).default.compute == "fp32"
    assert late.at_step(60)["fc2"].compute == "fp32" and late.at_step(60).default.compute == "bf16"


def test_parse_takes_a_plan_file(tmp_path):
    PrecisionPlan(default="bf16", modules={"fc2": "fp32"}).save(tmp_path / "late.json")
    plan = phases.parse(["0:fp32", f"5:{tmp_path}/late.json"])
    assert plan.at_step(5)["fc2"].compute == "fp32" and plan.at_step(5)["fc1"].compute == "bf16"
    assert PrecisionPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["100:fp32"], "the first phase begins at step 100: let it begin at step 0"),
        ([], "the first phase is missing"),
        (["fp32"], "a phase is STEP:PRECISION, for instance 100:fp32, not 'fp32'"),
        (["0:"], "a phase is STEP:PRECISION"),
        (["-1:fp16"], "a phase is STEP:PRECISION"),
        (["0:fp17"], "phase '0:fp17': 'fp17' is not one of fp32, tf32, bf16, fp16, e4m3, e5m2, the path of a plan"),
        (["0:plan"], "phase '0:plan' asks for the plan, and none is given: add --plan plan.json"),
        (["0:missing.json"], "missing.json: no such file"),
        (["0:fp16", "5:fp32", "5:fp16"], "from_step must rise from phase to phase, got \\[0, 5, 5\\]"),
    ],
)
def test_parse_says_what_is_wrong(texts, message):
    with pytest.raises(UsageError, match=message):
        phases.parse(texts)


def test_a_plan_with_phases_takes_no_second_ones():
    with pytest.raises(UsageError, match="the plan has phases of its own: leave --phase out"):
        phases.parse(["5:fp32"], plan=phases.parse(["0:fp16"]))


def test_a_phase_that_does_not_fit_the_model_is_refused_before_the_first_step():
    task = make_task(make)
    before = weights(task)
    plan = PrecisionPlan(phases=[Phase(from_step=9, plan=PrecisionPlan(modules={"fc3": "bf16"}))])
    with pytest.raises(PlanError, match=r"phase from step 9: the plan was made for another model: no module 'fc3'"):
        train(task, plan=plan, **SETTINGS)
    assert_same(weights(task), before)


def test_several_processes_do_not_switch_storage():
    task = make_task(make)
    with pytest.raises(PlanError, match="step 3 stores parameters in another format .* a run of 2 processes cannot"):
        phases.check(SCHEDULES["stored low in the middle"], task.model, steps=9, processes=2)
    assert phases.check(SCHEDULES["fp16, calibration, fp16"], task.model, steps=9, processes=2) == []


def test_a_phase_beyond_the_end_is_said():
    result = train(make_task(make), plan=phases.parse(["0:fp32", "40:fp16"]), **SETTINGS)
    assert result.notes == ("the phase from step 40 on is never reached: the run ends after 12 steps",)
