"""ps.tune: what is chosen from measured candidates, memory counted, sums over micro-batches, loss scale, files, CLI.

What is chosen on this machine depends on its speed: tests of the rule are given times, tests of the whole check that
the choice is what the rule makes of the times that were measured.
"""

from __future__ import annotations

import functools
import json
import shlex

import pytest
import torch
from torch import nn

import precscope as ps
from precscope.cli import main
from precscope.errors import RunDirectoryError, UsageError
from precscope.tasks import load_task
from precscope.tuning import Candidate, Tuning, candidates, load_settings, settings_path, tune, tuner
from precscope.tuning.result import parse_bytes
from precscope.tuning.scaling import choose_growth, largest_scales
from precscope.tuning.sums import measure_sums, stalled

MODULE = """
import torch
import torch.nn.functional as F
import precscope as ps


def make():
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 4))

    def batch(step):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        return x, x[:, :4].argmax(-1)

    return ps.Task(model=model, loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), batches=batch)
"""
namespace: dict = {}
exec(MODULE, namespace)
make = namespace["make"]


def mean_loss(model, batch):
    return model(batch).mean()


def ones_task(rows: int = 8) -> ps.Task:
    """The gradient of each weight is exactly 1 (with inputs of 1 and the sum over one output)."""
    return ps.Task(model=nn.Linear(4, 1, bias=False), loss=mean_loss, batches=[torch.ones(rows, 4)])


def shrinking(half_life: int) -> ps.Task:
    """Gradients that halve every `half_life` steps."""

    def loss(model, batch):
        x, factor = batch
        return factor * model(x).mean()

    return ps.Task(
        model=nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1)), loss=loss,
        optimizer=functools.partial(torch.optim.SGD, lr=1e-6),
        batches=lambda step: (torch.ones(4, 8), 2.0 ** -(step / half_life)),
    )  # fmt: skip


def candidate(name: str, ms: float, *, safe: bool = True, fixed: int = 100, activations: int = 100) -> Candidate:
    return Candidate(name, ms, ms, ms, fixed, activations, safe=safe, note="" if safe else "it overflows")


@pytest.fixture(scope="module")
def tuned() -> Tuning:
    return tune(make, steps=12, effective_batch=24, memory="1MB", train_steps=40, rounds=1, trial_steps=4)


# the whole


def test_choice_follows_from_what_was_measured(tuned):
    safe = {c.name: c.step_ms for c in tuned.candidates if c.safe}
    fastest = min(safe, key=safe.__getitem__)
    expected = fastest if safe[fastest] * tuner.GAIN < safe["fp32"] else "fp32"
    assert tuned.choice == expected
    assert {c.name for c in tuned.candidates} >= {"fp32", "fp16", "bf16"}
    assert all(c.step_ms > 0 and c.memory_bytes > 0 for c in tuned.candidates)
    assert tuned.reasons[0].startswith("stay with fp32" if expected == "fp32" else f"{expected}: a step takes")


def test_effective_batch_becomes_micro_batches(tuned):
    assert (tuned.examples, tuned.accumulate, tuned.split) == (8, 3, 1)
    assert set(tuned.sums) == {"bf16", "fp16"} and all(s.count == s.measured == 3 for s in tuned.sums.values())
    assert any("fits the limit of 1 MB; batches 3 times as large would fit too" in r for r in tuned.reasons)


def test_settings_train_and_are_saved(tuned, tmp_path):
    result = ps.train(make, **{**tuned.settings, "steps": 3})
    assert result.steps == 3 and all(map(torch.isfinite, map(torch.tensor, result.losses)))
    saved = tuned.save(tmp_path / "plan.json")
    assert ps.PrecisionPlan.load(tmp_path / "plan.json") == tuned.plan
    content = load_settings(settings_path(tmp_path / "plan.json"))
    assert content["schema"] == 1 and content["train"]["accumulate"] == 3 and content["choice"] == tuned.choice
    assert content["command"] == saved.command and "--accumulate 3 --steps 40" in saved.command
    assert len(content["candidates"]) == len(tuned.candidates)
    assert tuned.path is None and saved.path == tmp_path / "plan.json"


def test_command_line(tmp_path, monkeypatch, capsys):
    def cli(line):
        monkeypatch.setattr("sys.argv", shlex.split(line))
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
        return capsys.readouterr().out

    (tmp_path / "my_task.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    said = cli("precscope tune my_task.py:make --steps 10 --formats bf16,fp32 --rounds 1 --trial-steps 2 "
               "--effective-batch 12 --train-steps 4")  # fmt: skip
    assert said.startswith("choice: ") and "wrote plan.json, plan.tuning.json" in said
    assert "2 micro-batches of 8 make 16 examples per step, and not 12: batches are not cut" in " ".join(said.split())
    assert max(len(line) for line in said.splitlines() if not line.startswith("next: ")) <= 80
    command = said.split("next: ")[1].splitlines()[0]
    assert command == json.loads((tmp_path / "plan.tuning.json").read_text())["command"]
    cli(command)
    assert json.loads((tmp_path / "runs" / "tuned" / "run.json").read_text())["steps"] == 4


# the rule


@pytest.mark.parametrize(("found", "limit", "expected"), [
    ([("fp32", 10), ("bf16", 5)], None, ("bf16", 1)),
    ([("fp32", 10), ("bf16", 9.9)], None, ("fp32", 1)),  # within two in a hundred
    ([("fp32", 10), ("bf16", 12)], None, ("fp32", 1)),
])  # fmt: skip
def test_the_fastest_is_chosen_where_it_gains(found, limit, expected):
    name, split, _ = tuner._chosen([candidate(n, ms) for n, ms in found], limit)
    assert (name, split) == expected


def test_a_gain_that_may_be_chance_is_told():
    base, sure = Candidate("fp32", 10, 9.5, 11, 100, 100), Candidate("bf16", 9, 8.9, 9.2, 100, 100)
    assert "overlap" not in tuner._chosen([base, sure], None)[2]
    name, _, why = tuner._chosen([base, Candidate("bf16", 9, 8, 9.6, 100, 100)], None)
    assert name == "bf16" and why.endswith("but the rounds overlap: with other work on the machine this may be "
                                           "chance (--rounds 9 tells)")  # fmt: skip


def test_what_is_not_safe_is_not_chosen_and_named():
    found = [candidate("fp32", 10), candidate("fp16", 4, safe=False), candidate("plan", 6)]
    name, _, why = tuner._chosen(found, None)
    assert name == "plan" and why.endswith("fp16 takes 4 ms but may not be chosen (it overflows)")
    name, _, why = tuner._chosen(found[:2], None)
    assert name == "fp32" and "but fp16 may not be chosen (it overflows)" in why


def test_memory_limit_decides_before_speed():
    large = candidate("fp32", 5, activations=1000)
    small = candidate("bf16", 8, activations=400)
    name, split, why = tuner._chosen([large, small], 600)
    assert (name, split) == ("bf16", 1) and why.endswith("and fp32 does not fit the memory limit")
    assert tuner._chosen([large, small], 2000)[:2] == ("fp32", 1)
    assert tuner._chosen([large, small], 300)[:2] == ("bf16", 2)  # 400 in halves beside 100 that stay
    text = tuner._of_memory(small, 300, 4, 2, 32)
    assert "make the task's batches 2 times smaller to 16 examples; 4 x 2 = 8 micro-batches" in text
    with pytest.raises(UsageError, match="limit of 100 B is too small: .* alone need 100 B; raise it, or shard"):
        tuner._chosen([large, small], 100)


def test_plain_autocast_may_be_chosen_only_where_the_plan_is_that():
    layer = ps.LayerPrecision("fp32", reasons=("not fp16: logits reach 1e5",), evidence={"forbidden": ["fp16"]})
    confirmed = {"passed": True}
    mixed = ps.PrecisionPlan(default="bf16", modules={"a": layer, "b": "bf16"}, confirmed=confirmed)
    judged = tuner._judged(candidate("fp16", 1), mixed, None)
    assert not judged.safe and judged.note == "not safe for a: not fp16: logits reach 1e5"
    assert tuner._judged(candidate("plan", 1), mixed, None).safe
    unconfirmed = tuner._judged(candidate("plan", 1), mixed.replace(confirmed=None), None)
    assert not unconfirmed.safe and unconfirmed.note == "the plan was not confirmed on the model"
    uniform = ps.PrecisionPlan(default="bf16", modules={"a": "bf16"}, confirmed=confirmed)
    assert tuner._judged(candidate("bf16", 1), uniform, tuner._uniform(uniform)).safe
    assert not tuner._judged(candidate("fp16", 1), uniform, "bf16").safe
    assert not tuner._judged(candidate("bf16", 1), uniform.replace(confirmed=None), "bf16").safe


def test_uniform_plan_trains_bit_for_bit_like_plain_autocast():
    plan = tuner._plan_of("bf16", ps.PrecisionPlan.uniform("bf16"))
    assert plan.modules == {} and plan.default.compute == "bf16"
    one, other = ps.train(make, steps=4, plan=plan), ps.train(make, steps=4, precision="bf16")
    assert one.losses == other.losses


def test_whole_steps_that_gain_bring_fp32_plans_back_to_question():
    fp32 = ps.PrecisionPlan(default="fp32", modules={"a": "fp32"}, confirmed={"passed": True})
    found = [
        tuner._judged(c, fp32, "fp32") for c in (candidate("fp32", 10), candidate("bf16", 5), candidate("fp16", 7))
    ]
    assert tuner._hopeful(fp32, found) == "bf16"
    assert tuner._hopeful(fp32, [found[0], candidate("bf16", 9.9)]) is None
    assert tuner._hopeful(fp32.replace(modules={"a": "bf16"}), found) is None


# memory


def test_memory_is_that_of_the_tensors():
    ref = load_task(ones_task)
    (found,) = candidates.measure(ref, {"fp32": None}, rounds=1, steps=2)
    weights = 4 * 4
    assert found.fixed_bytes == weights * 4 + 4  # weights, gradients, two moments; AdamW's step count
    assert found.activation_bytes == 8 * 4 * 4  # the input, for the weight's gradient; the weight itself stays anyway


def test_a_precision_that_cannot_train_is_not_safe():
    def overflowing():
        return ps.Task(model=nn.Linear(4, 1), loss=lambda m, b: m(b).mean() * 1e300 * 1e300, batches=[torch.ones(2, 4)])

    (found,) = candidates.measure(load_task(overflowing), {"fp32": None}, rounds=1, steps=5)
    assert not found.safe and "was not finite" in found.note and found.step_ms != found.step_ms


# sums over micro-batches


def test_low_sum_stalls_where_theory_says():
    sums = measure_sums(ones_task(), 1024, formats=("bf16", "fp16"), limit=1024)
    assert sums["bf16"].error == 0.75  # each adds 2^-10: the sum stops at 256 of 1024
    assert not sums["bf16"].survives and sums["bf16"].swallowed == 1.0
    assert sums["fp16"].error == 0.0 and sums["fp16"].survives  # 1024 < 2048
    assert dict(sums["bf16"].curve)[256] == 0.0 and dict(sums["bf16"].curve)[512] == 0.5
    assert "stops growing at 256 to 512 times one contribution" in str(sums["bf16"])


def test_sums_beyond_the_limit_are_extrapolated():
    short = measure_sums(make(), 64, formats=("bf16",), limit=16)["bf16"]
    assert short.measured == 16 and short.error >= 2 * short.curve[-1][1] and "extrapolated from 16" in str(short)
    whole = measure_sums(make(), 64, formats=("bf16",))["bf16"]
    assert whole.measured == 64 and whole.error / 4 < short.error < whole.error * 4


def test_measuring_sums_leaves_everything_as_it_was():
    task = make()
    model = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4)).eval()
    task = ps.Task(model=model, loss=task.loss, batches=task.batches)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    measure_sums(task, 4)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state()) and not model.training
    assert all(p.grad is None for p in model.parameters())


def test_large_gradients_do_not_overflow_the_fp16_sum():
    task = ones_task()
    task.loss = lambda model, batch: 1e4 * model(batch).mean()
    assert measure_sums(task, 8, formats=("fp16",))["fp16"].error < 1e-3


def test_recorded_runs_tell_which_sums_stall(tmp_path):
    profile = ps.profile(ones_task(), out=tmp_path / "run", steps=1, every=1, precision="fp32", accumulate=600, lr=1e-6,
                         costs=False, ops=False, shadow_every=None)  # fmt: skip
    (told,) = stalled(profile, "bf16")
    assert told.startswith("(root): params fp32: 600 backward passes a step add up") and "256 to 512 times" in told
    assert stalled(profile, "fp16") == []


# loss scale


@pytest.fixture(scope="module")
def shrunk(tmp_path_factory):
    out = tmp_path_factory.mktemp("shrunk") / "run"
    return ps.profile(shrinking(60), out=out, steps=121, every=10, precision="fp32", costs=False, ops=False,
                      shadow_every=None, schedule="none")  # fmt: skip


def test_growth_follows_shrinking_gradients(shrunk):
    steps, fits = largest_scales(shrunk, ["0", "1"])
    assert steps[0] == 0 and fits[-1] - fits[0] == 2
    growth = choose_growth(shrunk, ["0", "1"], steps=100_000)
    assert 24 <= growth.interval <= 36  # half of 60 steps per binade
    assert "rose from 2^" in growth.text and f"one skipped step in {growth.interval + 1}" in growth.text


def test_growth_of_steady_gradients_follows_the_length_of_the_run(tmp_path):
    profile = ps.profile(ones_task(), out=tmp_path / "run", steps=4, every=1, precision="fp32", costs=False, ops=False,
                         shadow_every=None)  # fmt: skip
    assert [choose_growth(profile, [""], steps=n).interval for n in (10, 500, 100_000)] == [20, 50, 2000]
    assert "stayed near 2^" in choose_growth(profile, [""], steps=100_000).text


def test_tuned_scale_is_trained_with(shrunk):
    plan = ps.recommend(shrunk, formats=("fp16", "fp32"), costs="model")
    assert plan["0"].compute == "fp16"
    plan, words = tuner._scaled(plan, shrunk, 100_000)
    interval = plan.loss_scale["growth_interval"]
    assert words[0].startswith("loss scale: start at 2^") and words[1].startswith(f"growth interval {interval}:")
    history = ps.train(shrinking(60), steps=2 * interval + 5, plan=plan, schedule="none").scale_history
    (_, first), *later = history  # what comes after two doublings may be an overflow
    assert later[:2] == [(interval, 2 * first), (2 * interval, 4 * first)]


def test_no_scale_without_fp16(shrunk):
    plan = ps.PrecisionPlan.uniform("bf16")
    assert tuner._scaled(plan, shrunk, 100) == (plan, ["no loss scale is needed: nothing computes in fp16"])


# mistakes


@pytest.mark.parametrize(("text", "expected"), [
    ("4GiB", 4 * 2**30), ("500 MB", 500_000_000), ("2e9", 2_000_000_000), ("1kb", 1000), ("64", 64), (1000, 1000),
    ("1.5g", 1_500_000_000), ("3MiB", 3 * 2**20),
])  # fmt: skip
def test_sizes_of_memory(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["much", "4 apples", "", "0", "-1GB", float("inf"), float("nan")])
def test_sizes_that_are_none(text):
    with pytest.raises(UsageError, match="write 4GiB, 500MB or a number of bytes"):
        parse_bytes(text)


@pytest.mark.parametrize(("wrong", "message"), [
    ({"formats": "bf16"}, "fp32 must be among them"),
    ({"formats": "e4m3,fp32"}, "tune chooses from fp16, bf16, fp32, not e4m3"),
    ({"accumulate": 2, "effective_batch": 8}, "not both"),
    ({"accumulate": 0}, "accumulate must be an integer of at least 1, not 0"),
    ({"steps": 0}, "steps must be an integer of at least 1"),
    ({"rounds": 0}, "rounds must be an integer of at least 1, not 0"),
    ({"batch": 0, "effective_batch": 8}, "batch must be an integer of at least 1, not 0"),
])  # fmt: skip
def test_mistakes_are_told(wrong, message):
    with pytest.raises(UsageError, match=message):
        tune(make, **wrong)


def test_a_task_made_by_hand_cannot_be_tuned():
    with pytest.raises(UsageError, match="needs the function that makes the task"):
        tune(make())


def test_batches_of_unknown_size():
    def odd():
        return ps.Task(
            model=nn.Linear(1, 1), loss=lambda m, b: m(torch.full((1, 1), b["x"])).mean(), batches=[{"x": 1.0}]
        )

    with pytest.raises(UsageError, match="give batch=, or accumulate= in micro-batches"):
        tune(odd, effective_batch=8)
    assert tuner._micro_batches(load_task(odd), None, 8, 3, 0) == (3, 3)


def test_unknown_candidate_and_damaged_files(tuned, tmp_path):
    with pytest.raises(UsageError, match="no candidate 'e4m3' was tried; there are fp32"):
        tuned.candidate("e4m3")
    assert tuned.candidate("bf16").name == "bf16"
    path = tmp_path / "plan.tuning.json"
    with pytest.raises(RunDirectoryError, match="cannot be read as tuned settings"):
        load_settings(path)
    path.write_text("[]")
    with pytest.raises(RunDirectoryError, match="no schema number"):
        load_settings(path)
    path.write_text('{"schema": 2}')
    with pytest.raises(RunDirectoryError, match="reads up to 1: upgrade"):
        load_settings(path)


def test_the_table_fits_a_narrow_terminal(monkeypatch):
    from precscope.tuning.candidates import Candidate
    from precscope.tuning.result import _table

    made = {
        "step_ms": 1234.5,
        "fastest_ms": 1200.25,
        "slowest_ms": 1300.75,
        "fixed_bytes": 2**33,
        "activation_bytes": 2**33,
    }
    for columns in (60, 72, 80, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = _table([Candidate("bf16", **made, note="word " * 30)])
        assert max(map(len, lines)) <= min(columns, 80) and any("bf16" in line for line in lines)
