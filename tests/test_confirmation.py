"""Advice that is tried on the model: what-if, search, judgement, trial, and ps.recommend(task=...) as a whole.

The models here fail for reasons that ranges at module boundaries do not show, or look as if they would and do not.
"""

from __future__ import annotations

import copy
import math
import time

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import precscope as ps
from precscope.advice.cost import save
from precscope.confirmation.explanation import _Result, explain, percent
from precscope.confirmation.judgement import Judgement, Yardstick
from precscope.confirmation.probe import Outcome, Prober, scattered
from precscope.confirmation.search import find_high
from precscope.confirmation.substitution import Substitution
from precscope.confirmation.tolerance import Tolerance
from precscope.confirmation.trial import run_trial, state_kept


class MeanSquare(nn.Module):
    """Squares what it gets: beyond 255 its square is beyond fp16."""

    def forward(self, x):
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)


class Net(nn.Module):
    def __init__(self, size=1.0):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(16, 32), MeanSquare(), nn.Linear(32, 4)
        with torch.no_grad():
            self.first.weight.mul_(size)

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x))))


def make_task(model=None, **more):
    torch.manual_seed(0)
    model = Net() if model is None else model
    x = torch.randn(32, 16)
    y = (x[:, :4] > 0).float()
    batches = more.pop("batches", lambda step: (x + 0.01 * step, y))
    return ps.Task(
        model=model,
        loss=lambda m, b: F.binary_cross_entropy_with_logits(m(b[0]).float(), b[1]),
        batches=batches,
        optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=1e-2),
        **more,
    )


def profiled(task, path, **settings):
    settings = {"steps": 6, "precision": "fp32", "every": 1, "costs": False} | settings
    return ps.profile(task, out=path, note=lambda text: None, **settings)


def recommended(make, path, formats, **asked):
    profile = profiled(make(), path)
    return ps.recommend(profile, formats=formats, task=make(), costs="model", **asked)


def bits_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def equal(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


# substitution: what-if


@pytest.mark.parametrize("fmt", ["fp16", "bf16"])
def test_all_low_is_plain_autocast(fmt):
    task = make_task()
    batch = task.batch(0)
    prober = Prober(task, policy="autocast", inference=False, scale_exponent=None)
    outcome, memory = prober.all_low(batch, fmt)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[fmt]
    with torch.autocast("cpu", dtype=dtype):
        loss = task.loss(task.model, batch)
    # fp16 products may go through fp32 here: another order of summation
    assert outcome.loss == pytest.approx(float(loss.detach()), rel=1e-4 if fmt == "fp16" else 0)
    assert memory["in", "norm", 0] == [dtype]


def test_none_low_is_plain_fp32():
    task = make_task()
    batch = task.batch(0)
    with Substitution(task.model, "bf16", (), policy="autocast", memory={}):
        loss = task.loss(task.model, batch)
    assert torch.equal(loss, task.loss(task.model, batch))


def test_all_low_under_cast_is_a_low_model():
    task = make_task()
    x, y = task.batch(0)
    prober = Prober(task, policy="cast", inference=False, scale_exponent=None)
    outcome, _ = prober.all_low((x, y), "bf16")
    low = copy.deepcopy(task.model).bfloat16()
    loss = F.binary_cross_entropy_with_logits(low(x.bfloat16()).float(), y)
    assert outcome.loss == float(loss.detach())


def test_one_module_alone_meets_what_it_met_in_the_low_run():
    """Alone in fp16 the norm gets fp16 inputs, hence fails as it does in the low run; alone the others do not."""
    task = make_task(Net(3e3))
    batch = task.batch(0)
    prober = Prober(task, policy="autocast", inference=False, scale_exponent=0)
    reference = prober.reference(batch)
    _, memory = prober.all_low(batch, "fp16")
    judge = Yardstick(Tolerance()).judge
    assert not judge(reference, prober.alone(batch, "fp16", ["norm"], memory)).passed
    assert judge(reference, prober.alone(batch, "fp16", ["last"], memory)).passed
    assert judge(reference, prober.alone(batch, "fp16", ["first"], memory)).passed


def test_a_substitution_leaves_nothing_behind():
    task = make_task()
    before = bits_of(task.model)
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        Substitution(task.model, "bf16", ["norm"], policy="cast", memory={}),
    ):
        raise RuntimeError("on purpose")
    assert not any("forward" in m.__dict__ for m in task.model.modules())
    assert equal(before, bits_of(task.model))


def test_a_probe_that_raises_says_so():
    class Refuses(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 4)

        def forward(self, x):
            return self.fc(x).masked_fill(torch.ones(4, dtype=torch.bool), -1e9)

    task = make_task(Refuses())
    prober = Prober(task, policy="autocast", inference=False, scale_exponent=0)
    outcome, _ = prober.all_low(task.batch(0), "fp16")
    assert "cannot be converted" in outcome.error
    assert not outcome.finite


# judgement


def outcome(loss, **gradients):
    return Outcome(loss, {k: torch.tensor(v, dtype=torch.float32) for k, v in gradients.items()})


def test_a_small_gradient_near_a_minimum_is_measured_against_its_usual_size():
    exact, low = outcome(0.5, w=[1e-6, 0.0]), outcome(0.5, w=[0.0, 1e-6])
    assert not Yardstick(Tolerance()).judge(exact, low).passed
    assert Yardstick(Tolerance(), gradients={"w": 1e-3}).judge(exact, low).passed


def test_the_loss_is_measured_against_itself_and_the_span_of_the_run():
    exact, low = outcome(1e-5, w=[1.0]), outcome(1e-3, w=[1.0])
    assert not Yardstick(Tolerance()).judge(exact, low).passed
    assert Yardstick(Tolerance(), loss_span=2.0).judge(exact, low).passed


def test_a_parameter_that_gets_no_gradient_counts_as_wholly_wrong():
    judged = Yardstick(Tolerance()).judge(outcome(1.0, w=[1.0, 2.0]), outcome(1.0))
    assert judged.numbers["gradient_error"] == pytest.approx(1.0)
    assert not judged.passed


def test_order_is_lost_where_values_collapse():
    before = torch.linspace(0.991, 0.9999, 200)
    exact = Outcome(1.0, {}, before)
    after = before.bfloat16().float()
    judged = Yardstick(Tolerance()).judge(exact, Outcome(1.0, {}, after))
    pairs = [(a, b) for i, a in enumerate(after.tolist()) for b in after.tolist()[i + 1 :]]
    assert judged.numbers["order_lost"] == pytest.approx(sum(a >= b for a, b in pairs) / len(pairs))
    assert not judged.passed


def test_the_sample_of_an_output_is_of_all_its_classes():
    """Logits [64, 256] in steps of 32 elements would be of 8 classes; of 256 x 8 classes in 512, of one."""
    logits = torch.arange(64 * 256) % 256
    assert len(scattered(logits, 512).unique()) > 200
    assert torch.equal(scattered(logits[:100], 512), logits[:100])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_fails_for_certain(bad):
    exact = outcome(1.0, w=[1.0])
    assert Yardstick(Tolerance()).judge(exact, outcome(bad, w=[1.0])).score == math.inf
    assert Yardstick(Tolerance()).judge(exact, outcome(1.0, w=[bad])).score == math.inf
    assert "not finite" in Yardstick(Tolerance()).judge(exact, outcome(1.0, w=[bad])).text


# search


class Oracle:
    """The whole holds where every culprit is high; alone, culprits score `harm`."""

    def __init__(self, culprits, harm=10.0):
        self.culprits, self.harm, self.calls = frozenset(culprits), harm, 0

    def holds(self, high):
        self.calls += 1
        return Judgement(0.1 if self.culprits <= high else self.harm, "", {})

    def alone(self, units):
        self.calls += 1
        return Judgement(self.harm if self.culprits & frozenset(units) else 0.01, "", {})


@pytest.mark.parametrize("count", [3, 10, 47, 200, 2000])
@pytest.mark.parametrize("culprits", [[], [1], [0, 2]])
def test_culprits_are_found_within_the_budget(count, culprits):
    names = [f"layers.{i}" for i in range(count)]
    oracle = Oracle(names[i] for i in culprits)
    budget = 2 * count + 12
    found = find_high(names, oracle.holds, oracle.alone, budget=budget)
    assert found.high == oracle.culprits
    assert oracle.calls <= budget
    if not culprits:
        assert oracle.calls == 1


def test_many_modules_are_tried_in_groups():
    names = [f"layers.{i}" for i in range(1000)]
    oracle = Oracle(["layers.777"])
    assert find_high(names, oracle.holds, oracle.alone, budget=2020).high == {"layers.777"}
    assert oracle.calls < 100


def test_a_container_is_let_go_before_the_module_in_it():
    """What a child does shows in its parent: both score, the child alone suffices."""

    class Nested(Oracle):
        def alone(self, units):
            self.calls += 1
            return Judgement(10.0 if {"block", "block.act"} & frozenset(units) else 0.01, "", {})

    oracle = Nested(["block.act"])
    found = find_high(["", "block", "block.fc", "block.act"], oracle.holds, oracle.alone, budget=28)
    assert found.high == {"block.act"}


def test_harm_that_no_single_module_does_keeps_everything_high():
    class Joint(Oracle):
        def alone(self, units):
            self.calls += 1
            return Judgement(0.1, "", {})

    names = [f"m{i}" for i in range(6)]
    oracle = Joint(names)
    found = find_high(names, oracle.holds, oracle.alone, budget=32)
    assert found.high == frozenset(names)
    assert found.after.passed


# trial


def test_a_trial_trains_and_is_undone():
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    task = make_task(model)
    task.optimizer = optimizer
    before, batches = bits_of(model), [task.batch(i) for i in range(8)]
    generator = torch.get_rng_state()
    with state_kept(task):
        exact = run_trial(task, batches)
    assert exact.losses[-1] < exact.losses[0]
    assert equal(before, bits_of(model))
    assert not optimizer.state
    assert torch.equal(generator, torch.get_rng_state())
    with state_kept(task):
        low = run_trial(task, batches, plan=ps.PrecisionPlan.uniform("bf16"))
    assert low.losses == pytest.approx(exact.losses, rel=0.02)
    assert low.losses != exact.losses


# the whole


def test_a_square_inside_a_module_is_found_and_explained(tmp_path):
    plan = recommended(lambda: make_task(Net(3e3)), tmp_path / "run", ("fp16", "fp32"))
    assert plan.status == "confirmed"
    assert {n for n in ("first", "norm", "last") if plan[n].compute == "fp32"} == {"norm"}
    text = plan["norm"].reasons[0].text
    assert "aten.mul" in text and "65504" in text
    assert plan.confirmed["forward_passes"] <= 2 * plan.confirmed["modules"] + 20


def test_large_values_that_do_no_harm_are_left_low(tmp_path):
    """LayerNorm bears what the hand-written norm does not, and 2e4 is within two binades of fp16's end."""

    def make():
        task = make_task(Net(3e3))
        task.model.norm = nn.LayerNorm(32)
        return task

    plan = recommended(make, tmp_path / "run", ("fp16", "fp32"))
    assert plan.status == "confirmed"
    assert {plan[n].compute for n in ("first", "norm", "last")} == {"fp16"}
    assert "plain fp16 autocast is already right" in plan.made_from["says"]


def test_without_a_task_the_plan_is_predicted(tmp_path):
    profile = profiled(make_task(), tmp_path / "run")
    plan = ps.recommend(profile, formats=("bf16", "fp32"), costs="model")
    assert plan.status == "predicted"


def test_confirming_leaves_everything_as_it_was(tmp_path):
    profile = profiled(make_task(), tmp_path / "run")
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 4))
    task = make_task(model)
    profile = profiled(make_task(copy.deepcopy(model)), tmp_path / "run2")
    task.optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before, generator = bits_of(model), torch.get_rng_state()
    ps.recommend(profile, formats=("fp16", "bf16", "fp32"), task=task, costs="model")
    assert equal(before, bits_of(model))
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert not task.optimizer.state
    assert model.training and not any("forward" in m.__dict__ for m in model.modules())


def test_the_task_that_was_profiled_is_tried_as_it_was_and_as_it_is(tmp_path):
    """Zero inputs make 0/0 in fp16 until the biases have moved: only the state before training shows it."""

    class Unit(nn.Module):
        def forward(self, x):
            return F.normalize(x, dim=-1, eps=1e-12)

    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.unit, self.head = nn.Linear(16, 32), Unit(), nn.Linear(32, 4)
            nn.init.zeros_(self.fc.bias)

        def forward(self, x):
            return self.head(self.unit(self.fc(x)))

    torch.manual_seed(0)
    x, y = torch.randn(32, 16), (torch.randn(32, 4) > 0).float()
    x[-2:] = 0
    task = make_task(Tower(), batches=[(x, y)])
    before = bits_of(task.model)
    profile = profiled(task, tmp_path / "run", steps=20)
    trained = bits_of(task.model)
    assert not equal(before, trained)
    plan = ps.recommend(profile, formats=("fp16", "fp32"), task=task, costs="model")
    assert equal(trained, bits_of(task.model))
    assert plan.confirmed["states"] == ["trained", "start"]
    assert "fp32" in {plan["unit"].compute, plan["fc"].compute}
    fresh = ps.recommend(profile, formats=("fp16", "fp32"), task=make_task(Tower(), batches=[(x, y)]), costs="model")
    assert "fp32" in {fresh["unit"].compute, fresh["fc"].compute}


def test_a_run_that_went_nan_in_fp16_names_its_one_culprit(tmp_path):
    """NaN went through everything behind it; shadow steps and the trial on the model clear the others."""

    def make():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(16, 32), nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
        )
        with torch.no_grad():
            model[1].weight.mul_(3e6)
        return make_task(model)

    with pytest.raises(ps.PrecscopeError, match="not finite at 3 consecutive steps"):
        profiled(make(), tmp_path / "run", precision="fp16")
    profile = ps.Profile.load(tmp_path / "run")
    assert profile.table.nan.sum() > 0
    plan = ps.recommend(profile, formats=("fp16", "fp32"), task=make(), costs="model")
    assert plan.status == "confirmed"
    assert [str(i) for i in range(6) if plan[str(i)].compute == "fp32"] == ["1"]


def test_a_model_that_training_broke_is_tried_as_it_was(tmp_path):
    task = make_task()
    profile = profiled(task, tmp_path / "run")
    with torch.no_grad():
        task.model.last.weight.fill_(math.nan)
    plan = ps.recommend(profile, formats=("bf16", "fp32"), task=task, costs="model")
    assert plan.status == "confirmed" and plan.confirmed["states"] == ["start", "trained"]
    assert bool(task.model.last.weight.isnan().all())


def test_positions_in_bf16_are_found_though_nothing_overflows(tmp_path):
    class Positions(nn.Module):
        def forward(self, t):
            angle = t[:, None] * torch.tensor([1.0, 0.5, 0.25, 0.125], dtype=t.dtype)
            return torch.cat([angle.sin(), angle.cos()], 1)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions, self.head = Positions(), nn.Sequential(nn.Linear(8, 512), nn.Linear(512, 256))

        def forward(self, t):
            return self.head(self.positions(t))

    def make():
        torch.manual_seed(0)
        t = torch.linspace(700.3, 900.7, 64)
        return ps.Task(model=Model(), loss=lambda m, b: m(b).square().mean(), batches=[t], forward=lambda m, b: m(b))

    profile = profiled(make(), tmp_path / "run", train=False, steps=2)
    plan = ps.recommend(profile, formats=("bf16", "fp32"), policy="cast", task=make(), costs="model")
    assert plan["positions"].compute == "fp32"
    assert plan["head.1"].compute == "bf16"
    assert plan.status == "confirmed"
    assert "an ulp of bf16" in plan["positions"].reasons[0].text


def test_gradients_below_fp16_keep_modules_high_without_loss_scaling_only(tmp_path):
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
        x, y = torch.randn(64, 16), torch.randn(64, 4)
        return ps.Task(
            model=model, loss=lambda m, b: 1e-8 * F.mse_loss(m(b[0]).float(), b[1]), batches=[(x, y)],
            optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=1e-2, eps=1e-16),
        )  # fmt: skip

    profile = profiled(make(), tmp_path / "run")
    ask = {"formats": ("fp16", "fp32"), "costs": "model"}
    scaled = ps.recommend(profile, task=make(), **ask)
    assert {scaled["0"].compute, scaled["2"].compute} == {"fp16"}
    unscaled = ps.recommend(profile, task=make(), loss_scaling=False, **ask)
    assert unscaled["2"].compute == "fp32"
    assert "loss scale" in unscaled["2"].reasons[0].text


def test_a_task_that_fails_in_fp32_is_refused(tmp_path):
    profile = profiled(make_task(), tmp_path / "run")
    task = make_task()
    with torch.no_grad():
        task.model.first.weight[0, 0] = math.nan
    with pytest.raises(ps.PrecscopeError, match="not finite in fp32"):
        ps.recommend(profile, formats=("bf16", "fp32"), task=task, costs="model")


def test_wrong_counts_are_refused(tmp_path):
    profile = profiled(make_task(), tmp_path / "run")
    with pytest.raises(ps.UsageError, match="batches must be 1 or more"):
        ps.recommend(profile, task=make_task(), batches=0)


def test_the_whole_step_is_timed_where_costs_were_measured(tmp_path):
    """Module times promise ten times the speed; but what runs under autocast is made to wait here."""

    def made():
        task = make_task()
        task.model.first.register_forward_pre_hook(
            lambda module, inputs: time.sleep(0.02) if torch.is_autocast_enabled("cpu") else None
        )
        return task

    profile = profiled(made(), tmp_path / "run")
    rows = [
        {"module": m, "format": f, "time_ms": t, "how": "measured", "cast_ms_per_element": 1e-9}
        for m in ("", "first", "norm", "last")
        for f, t in (("fp32", 10.0), ("bf16", 1.0))
    ]
    save(pd.DataFrame(rows), tmp_path / "run" / "cost.parquet")
    plan = ps.recommend(profile, formats=("bf16", "fp32"), task=made())
    assert set(plan.made_from["step_ms"]) == {"plan", "main", "fp32"}
    assert {layer.compute for layer in plan.modules.values()} == {"fp32"}
    assert "low precision gains nothing on this device" in plan.made_from["says"]
    assert ps.recommend(profile, formats=("bf16", "fp32"))["first"].compute == "bf16"  # predicted from the same times


# explanation


def test_an_explanation_needs_a_difference():
    """Of a module's ops in fp32 and the same ones again nothing is told; of those in fp16 the op that overflows."""
    task = make_task(Net(3e3))
    batch = task.batch(0)
    prober = Prober(task, policy="autocast", inference=False, scale_exponent=0)
    _, memory = prober.all_low(batch, "fp16")
    logs = []
    for run in (prober.reference, prober.reference, lambda b: prober.alone(b, "fp16", ["norm"], memory)):
        with prober.logged(["norm"]) as log:
            run(batch)
        logs.append(log.results["norm"])
    assert len(logs[0]) > 3
    assert explain(logs[0], logs[1], "fp16") is None
    found = explain(logs[0], logs[2], "fp16")
    assert (found.op, found.phase) == ("aten.mul", "forward") and found.numbers["limit"] == 65504


def test_an_ulp_is_not_given_beyond_the_end_of_the_format():
    exact, low = _result("mm", [3e11, 1e11], 2e11), _result("mm", [65504.0, 65504.0], 65504.0)
    text = explain([exact], [low], "fp16").text
    assert "fp16 ends at 65504" in text and "ulp" not in text


def test_a_variance_that_became_negative_is_not_blamed_on_eps():
    exact = _result("rsqrt", [1.0, 2.0], 1.0, input_min=0.25)
    low = _result("rsqrt", [math.nan, 2.0], 1.0, input_min=-0.5)
    explanation = explain([exact], [low], "bf16")
    assert "takes values down to -0.5" in explanation.text
    assert "eps" not in explanation.fix and "clamp at 0" in explanation.fix


def test_values_that_a_mask_made_infinite_are_no_amax():
    exact = _result("add", [5.0, -math.inf, 4.0], 5.0)
    low = _result("add", [4.0, -math.inf, 5.0], 5.0)
    explanation = explain([exact], [low], "bf16")
    assert explanation.numbers["output_amax"] == 5.0 and "inf" not in explanation.text


def test_large_shares_are_told_as_factors():
    assert (percent(0.123), percent(9.99), percent(80893.04)) == ("12%", "999%", "8.09e+04 times")
    assert percent(0.1234, "its size", digits=1) == "12.3% of its size"
    assert percent(506.0, "its size") == "506 times its size"


def test_a_result_that_is_zero_in_fp32_has_no_relative_error():
    text = explain([_result("mm", [0.0, 0.0], 27.0)], [_result("mm", [0.0, 3.0], 27.0)], "bf16").text
    assert "in bf16 they are up to 3" in text and "%" not in text


def _result(op, values, input_amax, input_min=0.0):
    return _Result(op, "forward", torch.tensor(values), input_amax, True, input_min)


# models that are well, and look otherwise


def test_a_masked_output_is_no_reason_to_refuse_and_hides_nothing(tmp_path):
    class Masked(Net):
        def forward(self, x):
            return torch.cat([super().forward(x), x[:, :4]], 1).masked_fill(torch.arange(8) >= 4, -math.inf)

    def make(size=1.0):
        task = make_task(Masked(size))
        task.loss = lambda m, b: F.binary_cross_entropy_with_logits(m(b[0]).float()[:, :4], b[1])
        return task

    plan = recommended(make, tmp_path / "a", ("fp16", "fp32"))
    assert plan.status == "confirmed" and {plan[n].compute for n in ("first", "norm", "last")} == {"fp16"}
    plan = recommended(lambda: make(3e3), tmp_path / "b", ("fp16", "fp32"))
    assert {n for n in ("first", "norm", "last") if plan[n].compute == "fp32"} == {"norm"}


def test_infinities_of_the_output_must_be_where_fp32_has_them():
    exact = Outcome(outputs=torch.tensor([1.0, -math.inf, 3.0]))
    judge = Yardstick(Tolerance()).judge
    assert judge(exact, Outcome(outputs=torch.tensor([1.0, -math.inf, 3.0]))).passed
    for bad in ([1.0, -math.inf, math.inf], [1.0, 0.0, 3.0], [1.0, math.inf, 3.0], [math.nan, -math.inf, 3.0]):
        assert judge(exact, Outcome(outputs=torch.tensor(bad))).score == math.inf


def test_outputs_of_another_size_are_told():
    judged = Yardstick(Tolerance()).judge(Outcome(outputs=torch.ones(3)), Outcome(outputs=torch.ones(2)))
    assert not judged.passed and "the output has 2 values, in fp32 3" in judged.text and "forward=" in judged.text


def test_integers_of_the_output_are_compared_one_by_one():
    exact = Outcome(outputs=torch.tensor([0.0, 900.0, 3.0, 4.0] * 25), discrete=True)
    one = exact.outputs.clone()
    one[1] = 0.0
    judge = Yardstick(Tolerance()).judge
    assert judge(exact, Outcome(outputs=one)).passed
    judged = judge(exact, Outcome(outputs=exact.outputs.roll(1)))
    assert not judged.passed and "of the output's integers differ" in judged.text


def test_a_gradient_of_zero_is_measured_against_all_gradients():
    exact, judge = outcome(1.0, w=[0.0, 0.0], v=[1.0]), Yardstick(Tolerance()).judge
    assert judge(exact, outcome(1.0, w=[1e-6, 0.0], v=[1.0])).passed
    assert not judge(exact, outcome(1.0, w=[0.9, 0.0], v=[1.0])).passed
    assert judge(outcome(1.0, w=[0.0]), outcome(1.0, w=[0.1])).score == math.inf


def test_a_recorded_gradient_that_is_not_finite_acquits_nothing():
    exact, low = outcome(1.0, w=[1.0, 0.0]), outcome(1.0, w=[0.0, 1.0])
    assert not Yardstick(Tolerance(), gradients={"w": math.inf}).judge(exact, low).passed


def test_an_untrained_model_that_says_nearly_the_same_of_everything_may_be_low(tmp_path):
    """A detector's last layer begins at the logarithm of the prior: its outputs differ by less than an ulp of bf16."""

    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
        nn.init.normal_(model[2].weight, std=0.01)
        nn.init.constant_(model[2].bias, -4.6)
        return make_task(model)

    plan = recommended(make, tmp_path / "run", ("bf16", "fp32"))
    assert plan.status == "confirmed" and {plan[n].compute for n in ("0", "1", "2")} == {"bf16"}


# what a user's model and task may be like


def test_what_modules_keep_in_plain_attributes_is_as_before(tmp_path):
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.cache, self.calls, self.seen, self.kinds = None, 0, {"first": 1}, [0]

        def forward(self, x):
            self.calls += 1
            self.seen[x.dtype] = self.late = x.detach()
            self.kinds.append(x.dtype)
            if self.cache is None or self.cache.dtype != x.dtype:
                self.cache = torch.linspace(0, 1, 16).to(x.dtype)
            return x * self.cache

    def make():
        return make_task(nn.Sequential(nn.Linear(16, 16), Cached(), nn.Linear(16, 4)))

    profile, task = profiled(make(), tmp_path / "run"), make()
    seen = task.model[1].seen
    plan = ps.recommend(profile, formats=("bf16", "fp32"), task=task, costs="model")
    cached = task.model[1]
    assert plan.status == "confirmed"
    assert (cached.cache, cached.calls, cached.seen, cached.kinds) == (None, 0, {"first": 1}, [0])
    assert cached.seen is seen and not hasattr(cached, "late")


def test_trials_with_the_tasks_own_optimizer_start_equal_and_leave_it_as_it_was():
    torch.manual_seed(0)
    task = make_task()
    optimizer = task.optimizer = torch.optim.Adam(task.model.parameters(), lr=1e-2)
    batches = [task.batch(i) for i in range(6)]
    for batch in batches:
        optimizer.zero_grad()
        task.loss(task.model, batch).backward()
        optimizer.step()
    held = {p: dict(s) for p, s in optimizer.state.items()}
    values = copy.deepcopy([list(s.values()) for s in held.values()])
    state = bits_of(task.model)
    with state_kept(task):
        first = run_trial(task, batches)
        task.model.load_state_dict(state)
        second = run_trial(task, batches)
    assert first.losses == second.losses
    assert equal(state, bits_of(task.model))
    for (parameter, kept), old in zip(held.items(), values, strict=True):
        assert all(optimizer.state[parameter][k] is v for k, v in kept.items())
        assert all(torch.equal(v, o) for v, o in zip(kept.values(), old, strict=True))


def test_a_plan_of_fp8_and_fp32_is_really_tried(tmp_path):
    def make():
        torch.manual_seed(0)
        return make_task(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)))

    plan = recommended(make, tmp_path / "run", ("e4m3", "fp32"))
    assert "e4m3" in {layer.compute for layer in plan.modules.values()}
    assert plan.status == "confirmed" and plan.confirmed["score"] > 0
    assert plan.confirmed["trial"]["loss_plan"] != plan.confirmed["trial"]["loss_fp32"]


def test_what_bf16_is_too_coarse_for_is_not_given_fp8(tmp_path):
    class Cancels(nn.Linear):
        """A matrix product whose result is a small difference of large values."""

        def forward(self, x):
            return super().forward(x) + 300.0 - 300.0

    def make():
        torch.manual_seed(0)
        task = make_task(nn.Sequential(nn.Linear(16, 64), nn.Tanh(), Cancels(64, 64), nn.Tanh(), nn.Linear(64, 4)))
        return task

    plan = recommended(make, tmp_path / "run", ("e4m3", "bf16", "fp32"))
    assert plan.status == "confirmed" and plan["2"].compute == "fp32"
    assert plan["0"].compute != "fp32"


def test_confirming_batches_are_those_after_the_recorded_micro_batches(tmp_path):
    """Where a step takes two micro-batches, the batches after n steps are those from 2 n on."""
    asked = []
    task = make_task(accumulate=2)
    batches = task.batches

    def noted(step):
        asked.append(step)
        return batches(step)

    task.batches = noted
    profile = profiled(task, tmp_path, steps=3)
    assert set(asked) == set(range(6))
    asked.clear()
    task._reader = None
    ps.recommend(profile, formats=("bf16", "fp32"), task=task, costs="model")
    assert asked and min(asked) >= 6


def test_a_confirmed_plan_tells_the_noise_that_was_priced(tmp_path):
    """What was tried is no longer bound by its predicted noise; the evidence still says how large that is."""
    profile = profiled(make_task(), tmp_path, steps=12, precision="bf16", shadow_every=3)
    asked = {"formats": ("bf16", "fp32"), "costs": "model"}
    predicted, tried = ps.recommend(profile, **asked), ps.recommend(profile, task=make_task(), **asked)
    for name, layer in tried.modules.items():
        assert layer.evidence["loss_noise"] == predicted[name].evidence["loss_noise"]
    std = [layer.evidence["loss_noise"][layer.compute] for layer in tried.modules.values()]
    assert max(std) > 0
    assert math.sqrt(sum(s * s for s in std)) == pytest.approx(tried.made_from["loss_noise"]["plan"])


def test_a_function_of_steps_that_ends_is_asked_no_further(tmp_path):
    x = torch.randn(32, 16)
    few = [(x, (x[:, :4] > 0).float())] * 6
    plan = recommended(lambda: make_task(batches=lambda step: few[step]), tmp_path / "run", ("bf16", "fp32"))
    assert plan.status == "confirmed" and plan.confirmed["batches"] == 1


def test_a_task_that_is_none_and_a_model_that_is_another_are_refused(tmp_path):
    profile = profiled(make_task(), tmp_path / "run")
    with pytest.raises(ps.UsageError, match=r"file.py:function\), not 3"):
        ps.recommend(profile, formats=("bf16", "fp32"), task=3, costs="model")
    with pytest.raises(ps.PrecscopeError, match=r"no module 'first'.*give the task that was profiled"):
        ps.recommend(profile, formats=("bf16", "fp32"), task=make_task(nn.Linear(16, 4)), costs="model")


class _LowBackwardIsNaN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.low = x.dtype is not torch.float32
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan if ctx.low else gradient


class BadBackward(nn.Module):
    def forward(self, x):
        return _LowBackwardIsNaN.apply(x)


@pytest.mark.parametrize(
    "count,bad", [(3, (1,)), (3, (1, 2)), (12, (5,)), (12, tuple(range(1, 12, 2))), (60, (20, 41))]
)
def test_passes_of_the_whole_recommendation_are_counted_and_few(tmp_path, count, bad):
    """Where no loss scale gives finite gradients, one judgement takes several passes: they count."""

    def make():
        torch.manual_seed(0)
        layers = [BadBackward() if i in bad else nn.Linear(16, 16) for i in range(count)]
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight)
        task = make_task(nn.Sequential(*layers))
        task.loss = lambda m, b: m(b[0]).float().square().mean()
        task.optimizer = lambda model: torch.optim.SGD(model.parameters(), lr=1e-3)
        return task

    profile, task = profiled(make(), tmp_path / "run", steps=3), make()
    passes = []
    task.model.register_forward_hook(lambda *_: passes.append(1))
    plan = ps.recommend(profile, formats=("fp16", "fp32"), task=task, costs="model", trial_steps=0)
    assert plan.status == "confirmed"
    assert len(passes) == plan.confirmed["forward_passes"] <= 2 * plan.confirmed["modules"] + 20
    assert all(plan[str(i)].compute == "fp32" or plan[str(i - 1)].compute == "fp32" for i in bad)
