"""Runs side by side: pairs, intervals and verdicts against SciPy, and what is never averaged away."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

import precscope as ps
from precscope.comparison import Against, Difference
from precscope.comparison.curves import CurvePoint, end_of, mean_interval, moving_average, spread
from precscope.comparison.equivalence import paired, ratio, t_interval, tost, unpaired
from precscope.comparison.wording import judged, signed, speed_text
from precscope.errors import RunDirectoryError, UsageError
from precscope.reporting.pairs import pairs_text
from precscope.store import write_json

LEVELS = {"margin": 0.02, "confidence": 0.95}


def make_run(path, *, loss=1.0, seed=0, steps=40, ms=2.0, losses=None, log_steps=None, **about):
    """A run directory as the trainer leaves it, its held-out loss `loss`, its curve coming down to it."""
    path.mkdir(parents=True)
    step = np.arange(log_steps or steps)
    pd.DataFrame({
        "step": step, "loss": loss + np.exp(-step / 5.0) if losses is None else losses, "lr": 1e-3, "scale": 1.0,
        "skipped": step < about.pop("skipped", 0), "nonfinite": False, "grad_norm": 1.0, "time_ms": ms,
        "memory_bytes": 10**9, "eval_loss": np.nan,
    }).to_parquet(path / "train.parquet")  # fmt: skip
    settings = {"steps": steps, "accumulate": 1, "lr": 1e-3, "seed": seed, **about.pop("train", {})}
    write_json(path / "run.json", {
        "schema": 1, "status": "done", "task": "t", "task_ref": "task.py:make", "model": "MLP", "parameters": 10,
        "precision": path.name.partition("-")[0], "seed": seed, "eval_loss": loss, "peak_memory_bytes": 10**9,
        "train": settings, **about,
    })  # fmt: skip
    return path


def make_group(path, losses, **about):
    """A run under seed 0 and its twins under 1, 2, ..."""
    run = make_run(path, loss=losses[0], **about)
    for seed, loss in enumerate(losses[1:], 1):
        make_run(path / "seeds" / f"{seed:04d}", loss=loss, seed=seed, **{"precision": path.name, **about})
    return run


def against(tmp_path, name="bf16", **options) -> Against:
    (only,) = ps.compare([tmp_path / "fp32", tmp_path / name], **options).pairs
    return only


# --- intervals and tests ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_paired_intervals_and_tests_are_scipys(n):
    rng = np.random.default_rng(n)
    base = rng.normal(3, 0.2, n)
    run = base + rng.normal(0.01, 0.03, n)
    ours = paired(run, base, **LEVELS)
    theirs = stats.ttest_rel(run, base)
    np.testing.assert_allclose(ours.interval, theirs.confidence_interval(0.95), rtol=1e-9)
    np.testing.assert_allclose(ours.inner_interval, theirs.confidence_interval(0.90), rtol=1e-9)
    bound = 0.02 * base.mean()
    above = stats.ttest_1samp(run - base, -bound, alternative="greater").pvalue
    below = stats.ttest_1samp(run - base, bound, alternative="less").pvalue
    assert ours.p_equivalence == pytest.approx(max(above, below), rel=1e-9)


def test_unpaired_intervals_and_tests_are_welchs():
    rng = np.random.default_rng(0)
    run, base = rng.normal(3.02, 0.05, 4), rng.normal(3.0, 0.2, 7)
    ours = unpaired(run, base, **LEVELS)
    np.testing.assert_allclose(
        ours.interval, stats.ttest_ind(run, base, equal_var=False).confidence_interval(0.95), rtol=1e-9
    )
    bound = 0.02 * base.mean()
    above = stats.ttest_ind(run + bound, base, equal_var=False, alternative="greater").pvalue
    below = stats.ttest_ind(run - bound, base, equal_var=False, alternative="less").pvalue
    assert ours.p_equivalence == pytest.approx(max(above, below), rel=1e-9)
    assert ours.sizes == (4, 7) and not ours.paired


def test_a_case_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t(0.975; 2) = 4.30265."""
    found = paired([11.0, 12.0, 13.0], [10.0, 10.0, 10.0], **LEVELS)
    assert (found.mean, found.baseline, found.df) == (2.0, 10.0, 2)
    np.testing.assert_allclose(found.interval, (2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5), rtol=1e-5)
    assert found.share == 0.2 and found.bound == pytest.approx(0.2)


def test_both_ways_to_say_equivalent_agree():
    """TOST at 5% refutes both sides exactly where the 90% interval lies within the margin."""
    rng = np.random.default_rng(1)
    seen = set()
    for _ in range(300):
        base = rng.normal(3, 0.1, 4)
        found = paired(base + rng.normal(0.02, 0.03, 4), base, **LEVELS)
        lo, hi = found.inner_interval
        inside = -found.bound < lo and hi < found.bound
        assert (found.p_equivalence < 0.05) == inside == (found.kind == "equivalent")
        seen.add(found.kind)
    assert seen == {"equivalent", "undecided", "worse"}


losses = st.lists(st.floats(0.1, 100, allow_subnormal=False), min_size=2, max_size=8)


@given(losses, st.integers(0, 2**32 - 1))
def test_swapping_runs_flips_the_sign(run, seed):
    base = list(np.random.default_rng(seed).permutation(run) * 1.01)
    there, back = paired(run, base, **LEVELS), paired(base, run, **LEVELS)
    assert there.mean == -back.mean and there.se == back.se
    assert there.interval == tuple(-x for x in reversed(back.interval))
    assert tost(there.mean, there.se, there.df, 0.05) == pytest.approx(
        tost(back.mean, back.se, back.df, 0.05), abs=1e-12
    )
    kinds = {"worse": "better", "better": "worse"}
    assume("equivalent" not in (there.kind, back.kind))  # the margin is of the baseline, which is the other one
    assert back.kind == kinds.get(there.kind, there.kind)


@given(losses, st.floats(0.001, 0.5), st.floats(0.5, 2.0))
def test_a_wider_margin_and_another_unit_never_lose_equivalence(run, margin, factor):
    base = np.add(run, 0.01)
    one = paired(run, base, margin=margin, confidence=0.95)
    wider = paired(run, base, margin=2 * margin, confidence=0.95)
    assert wider.p_equivalence <= one.p_equivalence
    scaled = paired(np.multiply(run, factor), base * factor, margin=margin, confidence=0.95)
    assert scaled.share == pytest.approx(one.share, rel=1e-6, abs=1e-12)


def test_the_interval_covers_as_often_as_it_says_and_equivalence_errs_no_more():
    rng = np.random.default_rng(2)
    covered = equivalent = 0
    trials, bound = 4000, 0.02 * 3.0
    for _ in range(trials):
        base = np.full(5, 3.0)
        found = paired(base + rng.normal(bound, 0.02, 5), base, **LEVELS)  # the truth lies just on the margin
        lo, hi = found.interval
        covered += lo <= bound <= hi
        equivalent += found.kind == "equivalent"
    assert covered / trials == pytest.approx(0.95, abs=0.012)
    assert equivalent / trials == pytest.approx(0.05, abs=0.012)  # at the margin the test errs as often as it may


def test_equal_runs_are_equivalent_and_one_seed_has_no_interval():
    same = paired([2.0, 3.0], [2.0, 3.0], **LEVELS)
    assert (same.kind, same.p_equivalence, same.interval) == ("equivalent", 0.0, (0.0, 0.0))
    assert paired([2.5, 3.5], [2.0, 3.0], **LEVELS).p_equivalence == 1.0  # equal to the bit, and far
    one = paired([2.0], [2.0], **LEVELS)
    assert one.kind == "one seed" and math.isnan(one.interval[0]) and math.isnan(one.p_equivalence)
    assert unpaired([2.0], [2.0, 2.1], **LEVELS).kind == "one seed"
    assert math.isnan(t_interval(1.0, math.nan, 0, 0.95)[0])


def test_a_speed_says_what_it_rests_on():
    assert speed_text(ratio([2.0, 2.1, 1.9], confidence=0.95)) == "2.00x [1.76, 2.26]"
    assert speed_text(ratio([2.0], confidence=0.95)) == "2.00x (one ratio, no interval)"
    assert speed_text(ratio([0.5, 8.0], confidence=0.95)) == "2.00x (the pairs differ too much to say more)"
    assert speed_text(ratio([], confidence=0.95)) == "–"


def test_ratios_are_averaged_on_the_logarithm():
    found = ratio([2.0, 0.5, 1.0], confidence=0.95)
    assert found.mean == pytest.approx(1.0) and found.n == 3
    expected = stats.ttest_1samp(np.log([2.0, 0.5, 1.0]), 0).confidence_interval(0.95)
    np.testing.assert_allclose(np.log(found.interval), expected, rtol=1e-9)
    assert ratio([math.nan, 2.0], confidence=0.95).n == 1
    assert math.isnan(ratio([], confidence=0.95).mean)


@pytest.mark.parametrize(("shares", "words"), [
    ([0.001, -0.001, 0.002, 0.0, -0.002], "equivalent within 2%"),
    ([0.05, 0.06, 0.055, 0.052, 0.058], "different: worse by 5.50%"),
    ([-0.05, -0.06, -0.055, -0.052, -0.058], "different: better by 5.50%"),
    ([0.0, 0.06, -0.03, 0.01, 0.02], "undecided: the interval [-1.92%, +4.32%] reaches beyond the margin of 2%"),
    ([0.01], "one seed: no interval over seeds; difference +1.00% (within the margin of 2%); use --seeds 5"),
    ([0.03], "one seed: no interval over seeds; difference +3.00% (worse than the margin of 2%); use --seeds 5"),
])  # fmt: skip
def test_verdicts_in_words(shares, words):
    said = judged(paired(np.add(1.0, shares), np.ones(len(shares)), **LEVELS))
    assert said.startswith(words)


def test_a_sure_difference_within_the_margin_is_equivalent():
    found = paired([1.005, 1.0051, 1.0049], [1.0, 1.0, 1.0], **LEVELS)
    assert found.interval[0] > 0 and found.kind == "equivalent"


def test_small_differences_keep_a_digit():
    assert [signed(x) for x in (0.0, -1e-17, 0.012, -0.5, 2e-5, -3e-9, math.nan)] == [
        "+0.00%", "+0.00%", "+1.20%", "-50.00%", "+0.002%", "-3e-07%", "–",
    ]  # fmt: skip


@pytest.mark.parametrize(("options", "words"), [
    ({"margin": 0}, "margin must be a share of .* for example 0.02 for 2%, not 0"), ({"margin": 2}, "margin must be"),
    ({"confidence": 0.5}, "between 0.5 and 1"), ({"confidence": 95}, "between 0.5 and 1"),
])  # fmt: skip
def test_levels_that_say_nothing_are_refused(tmp_path, options, words):
    make_run(tmp_path / "fp32")
    with pytest.raises(UsageError, match=words):
        ps.compare([tmp_path / "fp32"], **options)


# --- pairs ------------------------------------------------------------------------------------------------------


def test_seeds_are_paired_by_number_and_curves_step_by_step(tmp_path):
    make_group(tmp_path / "fp32", [2.0, 2.2, 1.9, 2.1])
    make_group(tmp_path / "bf16", [2.002, 2.198, 1.901])
    found = against(tmp_path)
    assert found.seeds == (0, 1, 2) and found.kind == "equivalent" and found.why_unpaired == ""
    assert found.loss.mean == pytest.approx((0.002 - 0.002 + 0.001) / 3)
    assert found.measure == "held-out loss" and found.passed
    assert found.curve.mean == pytest.approx(found.loss.mean)  # the curves differ by a constant here
    assert found.curve.df == 2


def test_pairing_is_what_makes_the_interval_narrow(tmp_path):
    """Losses that differ by seed far more than by precision: paired they are equivalent, unpaired undecided."""
    base = [2.0, 2.6, 1.5, 2.3]
    make_group(tmp_path / "fp32", base)
    make_group(tmp_path / "bf16", [x + d for x, d in zip(base, (0.001, -0.002, 0.002, 0.0), strict=True)])
    assert against(tmp_path).kind == "equivalent"
    shifted = make_run(tmp_path / "apart" / "bf16", loss=2.001, seed=10)
    for seed, loss in ((11, 2.598), (12, 1.502)):
        make_run(shifted / "seeds" / f"{seed:04d}", loss=loss, seed=seed, precision="bf16")
    found = against(tmp_path, "apart/bf16")
    assert found.why_unpaired == "no seed in common (10, 11, 12 against 0, 1, 2, 3)"
    assert found.kind == "undecided" and found.loss.sizes == (3, 4) and found.curve is None


@pytest.mark.parametrize(("about", "words"), [
    ({"seed": 3}, "no seed in common (3 against 0)"),
    ({"steps": 60}, "another number of steps (60 against 40)"),
    ({"train": {"accumulate": 2}}, "another number of micro-batches per step (2 against 1)"),
    ({"task_ref": "task.py:other"}, "another task (task.py:other against task.py:make)"),
    ({"task_ref": None, "loss": 1.3}, "not the same start or data: the first losses are 2.3 and 2"),
])  # fmt: skip
def test_what_is_no_pair_is_told(tmp_path, about, words):
    make_run(tmp_path / "fp32")
    make_run(tmp_path / "bf16", **about)
    found = against(tmp_path)
    assert found.why_unpaired == words and found.kind == "one seed"
    assert f"not paired: {words}" in " ".join(str(ps.compare([tmp_path / "fp32", tmp_path / "bf16"])).split())


def test_the_same_task_from_another_folder_is_the_same(tmp_path):
    make_run(tmp_path / "fp32")
    make_run(tmp_path / "bf16", task_ref="./deep/task.py:make")
    assert against(tmp_path).why_unpaired == ""


def test_another_model_is_not_compared(tmp_path):
    make_run(tmp_path / "fp32")
    make_run(tmp_path / "bf16", parameters=11)
    found = against(tmp_path)
    assert found.kind == "incomparable" and not found.passed
    assert found.verdict == "not comparable: another number of parameters (11 against 10)"


def test_runs_made_by_hand_are_paired_on_trust_and_that_is_said(tmp_path):
    make_run(tmp_path / "fp32", task_ref=None)
    make_run(tmp_path / "bf16", task_ref=None)
    found = against(tmp_path)
    assert found.why_unpaired == "" and "made by hand" in found.notes[0]


def test_other_settings_that_differ_are_named(tmp_path):
    make_run(tmp_path / "fp32")
    make_run(tmp_path / "bf16", train={"lr": 0.01, "checkpoint_every": 5})
    assert against(tmp_path).notes == ("settings differ too: lr 0.01 against 0.001",)


def test_a_run_that_diverged_is_told_and_not_averaged(tmp_path):
    make_group(tmp_path / "fp32", [2.0, 2.1, 2.05, 1.95])
    make_group(tmp_path / "fp16", [2.0, 2.1])
    make_run(
        tmp_path / "fp16/seeds/0002", seed=2, precision="fp16", log_steps=7, status="failed", eval_loss=None,
        error="TrainingError: the loss was not finite for 3 steps",
    )  # fmt: skip
    make_run(tmp_path / "fp16/seeds/0003", seed=3, precision="fp16", loss=math.nan, losses=np.full(40, 2.0))
    found = against(tmp_path, "fp16")
    assert found.kind == "diverged" and not found.passed
    assert found.verdict == "diverged in 2 of 4 seeds (seed 2: stopped at step 6; seed 3: held-out loss nan)"
    assert found.loss.sizes == (2, 2) and found.loss.kind == "equivalent"  # of the others, and said to be of them
    assert "the 2 that did not diverge: equivalent within 2%" in pairs_text([found], **LEVELS, width=80)
    other = ps.compare([tmp_path / "fp32", tmp_path / "fp16"], baseline=tmp_path / "fp16").pairs[0]
    assert other.kind == "baseline diverged" and other.verdict.startswith("the baseline fp16 diverged in 2 of 4")


def test_an_unfinished_run_gets_no_verdict(tmp_path):
    make_run(tmp_path / "fp32")
    make_run(tmp_path / "bf16", status="running", log_steps=12, eval_loss=None)
    found = against(tmp_path)
    assert (found.kind, found.verdict) == ("unfinished", "no verdict: not finished")
    assert found.notes == ("bf16 not finished: 12 of 40 steps",)
    make_run(tmp_path / "fp16", status="failed", error="KeyboardInterrupt: ", log_steps=12, eval_loss=None)
    assert against(tmp_path, "fp16").notes == ("fp16 ended by KeyboardInterrupt",)


def test_without_held_out_losses_the_training_loss_is_judged(tmp_path):
    make_group(tmp_path / "fp32", [2.0, 2.1], eval_loss=None)
    make_group(tmp_path / "bf16", [2.0, 2.1001], eval_loss=None)
    found = against(tmp_path)
    assert found.measure == "training loss" and found.kind == "equivalent"


def test_speed_memory_skipped_steps_and_events(tmp_path):
    make_group(tmp_path / "fp32", [2.0, 2.1], ms=4.0)
    make_group(tmp_path / "fp16", [2.0, 2.1], ms=2.0, skipped=3, peak_memory_bytes=5 * 10**8)
    event = {"schema": 1, "step": 3, "kind": "overflow", "module": "fc", "action": "warn", "text": "fc overflowed"}
    quiet = {"schema": 1, "step": 9, "kind": "quiet", "module": "", "action": "none", "text": "quiet"}
    lines = [json.dumps(e) + "\n" for e in (event, event, quiet)]
    (tmp_path / "fp16/events.jsonl").write_text("".join(lines))
    (tmp_path / "fp16/seeds/0001/events.jsonl").write_text(lines[0] + '{"step": 4, "kind": "over')
    found = against(tmp_path, "fp16")
    assert found.speed.mean == pytest.approx(2.0) and found.speed.interval == pytest.approx((2.0, 2.0))
    assert found.memory == 0.5 and found.skipped == (6, 0) and found.steps == 80
    assert found.events == {"overflow (warn)": 3, "quiet": 1}
    said = pairs_text([found], **LEVELS, width=80)
    assert "speed 2.00x [2.00, 2.00]; memory 0.50x; skipped 6 of 80 steps (baseline 0)" in said
    assert "guard: 3 overflow (warn), 1 quiet" in " ".join(said.split())


def test_twins_that_no_longer_fit_are_left_out_and_named(tmp_path):
    make_group(tmp_path / "fp32", [2.0, 2.1, 2.2])
    make_run(tmp_path / "bf16", loss=2.0, started="later")
    twin = {"precision": "bf16", "loss": 2.1}
    make_run(tmp_path / "bf16/seeds/0001", seed=1, **twin, train={"lr": 0.5})
    make_run(tmp_path / "bf16/seeds/0002", seed=2, **twin, twin_of_start="earlier")
    make_run(tmp_path / "bf16/seeds/0003", seed=3, **twin, status="running", log_steps=4)
    (make_run(tmp_path / "bf16/seeds/0004", seed=4, **twin) / "run.json").write_text("{")
    (make_run(tmp_path / "bf16/seeds/0005", seed=5, **twin) / "train.parquet").unlink()
    found = against(tmp_path)
    *notes, damaged, killed = found.notes
    assert "seeds/0004 left out: " in damaged and "run.json is not JSON" in damaged
    assert killed == "bf16: seeds/0005 left out: killed before its first step"
    assert found.seeds == (0,) and tuple(notes) == (
        "bf16: seeds/0001 left out: its lr was 0.5, the run's is 0.001",
        "bf16: seeds/0002 left out: the run was made anew since",
        "bf16: seeds/0003 left out: not finished: 4 of 40 steps",
    )


def test_a_directory_without_a_run_is_named(tmp_path):
    with pytest.raises(RunDirectoryError, match="holds no training run"):
        ps.compare([tmp_path])
    run = make_run(tmp_path / "fp32")
    (run / "run.json").write_text("{")
    with pytest.raises(RunDirectoryError, match=r"run.json is not JSON"):
        ps.compare([run])
    make_run(tmp_path / "bf16")
    (tmp_path / "bf16/train.parquet").write_bytes(b"no")
    with pytest.raises(RunDirectoryError, match=r"train.parquet cannot be read"):
        ps.compare([tmp_path / "bf16"])
    pd.DataFrame({"step": [0], "loss": [1.0]}).to_parquet(tmp_path / "bf16/train.parquet")
    with pytest.raises(RunDirectoryError, match=r"not the log of a training run \(no column 'time_ms'\)"):
        ps.compare([tmp_path / "bf16"])


@pytest.mark.parametrize("text", ["[]", '{"result": null}'])
def test_a_run_json_of_another_kind_is_told(tmp_path, text):
    (make_run(tmp_path / "fp32") / "run.json").write_text(text)
    with pytest.raises(RunDirectoryError, match="run.json does not describe a run: train again"):
        ps.compare([tmp_path / "fp32"])


def test_a_run_is_compared_once(tmp_path):
    run = make_run(tmp_path / "fp32")
    with pytest.raises(UsageError, match="fp32 is given twice: name each run once"):
        ps.compare([run, make_run(tmp_path / "bf16"), tmp_path / "bf16" / ".." / "fp32"])


def test_the_baseline(tmp_path, monkeypatch):
    """The one that is named, by whatever path; else the first that computes and stores in fp32."""
    low = make_run(tmp_path / "fp32-low", train={"params": "bf16"})
    runs = [low, make_run(tmp_path / "bf16"), make_run(tmp_path / "fp32", train={"params": "fp32"})]
    assert ps.compare(runs).baseline == str(runs[2]) and ps.compare(runs[:2]).baseline == str(low)
    monkeypatch.chdir(tmp_path)
    assert ps.compare(runs, baseline="bf16").baseline == str(runs[1])
    with pytest.raises(UsageError, match="baseline fp16 is not among the runs"):
        ps.compare(runs, baseline="fp16")


def test_a_run_of_other_steps_has_no_paired_curve(tmp_path):
    """A log that begins where the other ends: the held-out losses are compared, and no mean is taken of nothing."""
    make_run(tmp_path / "fp32")
    later = make_run(tmp_path / "bf16", loss=1.001)
    log = pd.read_parquet(later / "train.parquet")
    log.assign(step=log.step + 1000).to_parquet(later / "train.parquet")
    found = against(tmp_path)
    assert found.curve is None and found.loss.share == pytest.approx(0.001)


def test_what_is_to_be_known_of_a_run_stands_below_the_table(tmp_path):
    """As the trainer writes it into run.json."""
    make_run(tmp_path / "fp32")
    make_run(tmp_path / "fp16", note="fp16 products computed through fp32")
    made = ps.compare([tmp_path / "fp32", tmp_path / "fp16"])
    assert "fp16: fp16 products computed through fp32" in str(made).splitlines()


def test_a_file_that_cannot_be_written_is_told(tmp_path):
    made = ps.compare([make_run(tmp_path / "fp32")])
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match=r"cannot write .*c.json .* choose another directory"):
        made.save(tmp_path / "file" / "c.json")


# --- curves -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 3, 6, 50])
def test_moving_average_is_the_mean_of_neighbours(width):
    values = np.random.default_rng(0).normal(size=20)
    expected = [values[max(i - (width - 1) // 2, 0) : i + width // 2 + 1].mean() for i in range(20)]
    np.testing.assert_allclose(moving_average(values, width), expected, rtol=1e-12)


def test_a_value_that_is_not_finite_is_a_gap_and_nothing_else_is_lost():
    values = np.array([1.0, 2.0, math.inf, 4.0, 5.0, math.nan, 7.0])
    np.testing.assert_array_equal(moving_average(values, 1), [1, 2, math.nan, 4, 5, math.nan, 7])
    assert np.isnan(moving_average(values, 3)).tolist() == [False, True, True, True, True, True, True]


def test_curves_over_seeds_are_numpys_and_scipys():
    losses = np.random.default_rng(0).normal(3, 0.1, (5, 8))
    points = spread(np.arange(8), losses)
    np.testing.assert_allclose([p.mean for p in points], losses.mean(0))
    np.testing.assert_allclose([p.hi - p.mean for p in points], losses.std(0, ddof=1))
    points = mean_interval(np.arange(8), losses, confidence=0.9)
    expected = stats.ttest_1samp(losses, 0, axis=0).confidence_interval(0.9)
    np.testing.assert_allclose([p.lo for p in points], expected.low)
    np.testing.assert_allclose([p.hi for p in points], expected.high)


def test_a_seed_that_ends_early_ends_the_mean():
    losses = np.array([[1.0, 2.0, 3.0], [1.0, math.inf, math.nan]])
    points = spread(np.array([0, 5, 9]), losses)
    assert points[0] == CurvePoint(0, 1.0, 1.0, 1.0, 2)
    assert [(p.step, p.finite) for p in points[1:]] == [(5, 1), (9, 1)] and math.isnan(points[1].mean)
    alone = spread(np.arange(3), losses[:1])
    assert alone[2].mean == 3.0 and math.isnan(alone[2].lo)
    assert len(spread(np.arange(1000), np.zeros((2, 1000)), points=50)) == 50


def test_the_end_of_a_curve_is_its_last_tenth():
    assert end_of(np.arange(200.0)[None])[0] == np.arange(180, 200).mean()
    assert end_of(np.arange(30.0)[None])[0] == np.arange(20, 30).mean()
    assert end_of(np.arange(4.0)[None])[0] == 1.5


def test_curves_of_a_comparison(tmp_path):
    make_group(tmp_path / "fp32", [2.0, 2.2, 1.9])
    make_group(tmp_path / "bf16", [2.1, 2.3, 2.0])
    made = ps.compare([tmp_path / "fp32", tmp_path / "bf16"])
    curve = made.curves(smooth=1)[str(tmp_path / "bf16")]
    assert len(curve) == 40 and curve[0].mean == pytest.approx(np.mean([2.1, 2.3, 2.0]) + 1)
    difference = made.difference_curves(smooth=4)[str(tmp_path / "bf16")]
    assert all(p.mean == pytest.approx(0.1) for p in difference)


# --- what is printed and written --------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 120])
def test_text_fits_and_keeps_its_words(tmp_path, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    make_group(tmp_path / "fp32", [2.0, 2.2, 1.9])
    make_group(tmp_path / "bf16", [2.001, 2.199, 1.9])
    make_run(tmp_path / ("fp16-" + "x" * 20), loss=math.nan, losses=np.full(40, math.nan))
    text = str(ps.compare([tmp_path / "fp32", tmp_path / "bf16", tmp_path / ("fp16-" + "x" * 20)]))
    lines = text.splitlines()
    assert max(map(len, lines[: lines.index("")])) <= max(width, 74)  # the table of runs keeps its figures
    assert max(map(len, lines[lines.index("") :])) <= width
    said = " ".join(text.split())
    assert "bf16: equivalent within 2% held-out loss 2.033 against 2.033, +0.00%, 90% interval [" in said
    assert "two one-sided tests at 5%: p 0.0" in said and "3 pairs of seeds" in said
    assert "xxx: diverged (seed 0: held-out loss nan)" in said
    assert "margin 2% of its loss, confidence 95%" in said


def test_json_holds_everything_and_is_strict(tmp_path):
    make_group(tmp_path / "fp32", [2.0, 2.1])
    make_group(tmp_path / "bf16", [2.0, 2.1001], eval_loss=math.inf)
    made = ps.compare([tmp_path / "fp32", tmp_path / "bf16"], margin=0.01)
    content = json.loads(made.save(tmp_path / "deep" / "c.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert content == made.to_dict() and content["schema"] == 1 and content["margin"] == 0.01
    assert content["runs"][1]["eval_loss"] == "inf" and content["runs"][1]["seeds"] == 2
    assert content["pairs"][0]["kind"] == "diverged" and content["passed"] is False
    assert list(made.table().run) == ["fp32", "bf16"]


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    made = ps.compare([make_run(tmp_path / "a/fp32"), make_run(tmp_path / "b/fp32")])
    assert made.pairs[0].run == str(tmp_path / "b/fp32") and made.pairs[0].baseline == str(tmp_path / "a/fp32")


def test_one_run_is_a_table_alone(tmp_path):
    make_run(tmp_path / "fp32")
    made = ps.compare(tmp_path / "fp32")
    assert made.pairs == () and made.passed and "against" not in str(made)


def test_passing(tmp_path):
    make_run(tmp_path / "fp32", loss=2.0)
    for name, loss, passed in (("bf16", 2.03, True), ("fp16", 2.05, False), ("plan", 1.8, True)):
        make_run(tmp_path / name, loss=loss)
        assert against(tmp_path, name).passed is passed
    assert not ps.compare([tmp_path / n for n in ("fp32", "bf16", "fp16")]).passed
    undecided = Difference(0.0, 2.0, 0.5, 2, (3, 3), True, 0.02, 0.95)
    assert undecided.kind == "undecided"
    assert not Against("a", "b", "", (0, 1, 2), "undecided", "held-out loss", undecided).passed


def test_comparing_needs_no_torch(tmp_path):
    make_group(tmp_path / "fp32", [2.0, 2.1])
    make_group(tmp_path / "bf16", [2.0, 2.1])
    code = (
        f"import sys, precscope as ps; print(ps.compare([{str(tmp_path / 'fp32')!r}, {str(tmp_path / 'bf16')!r}]))\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "False" and "equivalent within 2%" in done.stdout
