"""`precscope bench zoo`: the loader, the verdicts of the harness, the arithmetic of scores, the tables, the JSON."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from precscope.bench.cases import Accepted, load_case, load_cases
from precscope.bench.harness import Outcome, fails, islands, make_task, run_case
from precscope.bench.scoring import Score, is_named, kept_high, needless, summarise
from precscope.bench.zoo import ZooResult, called_modules, judge, own_zoo, score_case, score_zoo
from precscope.errors import FormatError, TaskError
from precscope.plans import LayerPrecision, PrecisionPlan

CASE = """
import torch
from torch import nn

GUILTY, GUILTY_BF16 = ["1"], []
STEPS = 4

class Square(nn.Module):
    def forward(self, x):
        return (1000 * x) ** 2 / 1e6

def build():
    model = nn.Sequential(nn.Linear(4, 8), Square(), nn.Linear(8, 2))
    x = torch.randn(16, 4)
    return model, lambda step: (x,), lambda model, batch: (model(batch[0]).float() - 1).square().mean()
"""


@pytest.fixture
def written(tmp_path):
    """Write case files; returns the folder."""

    def write(**files):
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(text)
        return tmp_path

    return write


def own(name):
    return load_cases(own_zoo(), [name])[0]


class TestLoading:
    def test_defaults(self, written):
        case = load_case(written(square=CASE) / "square.py")
        assert (case.mode, case.steps, case.lr, case.opt, case.tol, case.atol) == (
            "autocast",
            4,
            1e-2,
            "adam",
            0.25,
            0.02,
        )
        assert case.loss_scaling and case.cast_batch and case.rel_tol == 0.05 and case.make_optimizer is None
        assert case.guilty == {"fp16": ("1",), "bf16": ()}
        assert case.fails_in("fp16") and not case.fails_in("bf16")

    def test_controls_and_private_files(self, written):
        folder = written(ctl_square=CASE, _helper="raise RuntimeError")
        (case,) = load_cases(folder)
        assert case.is_control and not case.fails_in("fp16")

    def test_accepted_answers(self, written):
        folder = written(square=CASE)
        (folder / "accept.json").write_text(
            '{"square": {"fp16": {"also_cures_alone": ["0"], "guilty_not_strictly_needed": ["1"]}}}'
        )
        assert load_cases(folder)[0].accepts("fp16") == Accepted(("0",), ("1",))
        assert load_cases(folder)[0].accepts("bf16") == Accepted()

    @pytest.mark.parametrize(("change", "message"), [
        (("def build", "def make"), r"has no build\(\): a case needs build\(\) -> \(model, batch_fn, loss_fn\)"),
        (("STEPS = 4", "MODE = 'half'"), "MODE must be one of autocast, pure, not 'half'"),
        (("STEPS = 4", "OPT = 'lion'"), "OPT must be one of adam, sgd, not 'lion'"),
        (("STEPS = 4", "STEPS = -1"), r"STEPS must be 0 \(inference\) or more, not -1"),
        (("STEPS = 4", "STEPS = 2.5"), "STEPS must be int, not 2.5"),
        (("STEPS = 4", "LR = '1e-3'"), "LR must be a number, not '1e-3'"),
        (("STEPS = 4", "LOSS_SCALING = 1"), "LOSS_SCALING must be bool, not 1"),
        (("STEPS = 4", "evaluate = 3"), "evaluate must be a function, not int"),
        (('["1"], []', '"1", []'), r"GUILTY must be a list of module names \(empty: harmless\), not '1'"),
        (("GUILTY, GUILTY_BF16", "GUILTY, OTHER"), "GUILTY_BF16 must be a list of module names"),
        (("import torch\n", "import nope\n"), "raised ModuleNotFoundError on import: No module named 'nope'"),
    ])  # fmt: skip
    def test_errors_say_what_is_wrong(self, written, change, message):
        with pytest.raises(TaskError, match=message):
            load_case(written(square=CASE.replace(*change)) / "square.py")

    def test_folders(self, written, tmp_path):
        with pytest.raises(TaskError, match="no folder .*nowhere: give one that holds case files"):
            load_cases(tmp_path / "nowhere")
        with pytest.raises(TaskError, match="holds no case"):
            load_cases(tmp_path)
        folder = written(square=CASE)
        with pytest.raises(TaskError, match="has no case 'sqare'; it has square"):
            load_cases(folder, ["sqare"])
        (folder / "accept.json").write_text('{"square": ["0"]}')
        with pytest.raises(TaskError, match="cannot read .*accept.json"):
            load_cases(folder)


class TestHarness:
    def test_verdicts(self):
        case, fp32 = own("dice_overlap"), Outcome(1.0, steps=5)
        assert not fails(case, Outcome(1.26, steps=5), fp32)  # 0.25 * 1 + 0.02
        assert fails(case, Outcome(1.28, steps=5), fp32)
        assert fails(case, Outcome(math.nan, finite=False, steps=5), fp32)
        assert fails(case, Outcome(0.5, steps=5, error="RuntimeError: no"), fp32)
        assert fails(case, Outcome(0.5, steps=5, skipped=5), fp32)
        assert not fails(case, Outcome(0.5, steps=5, skipped=4), fp32)

    def test_inference_is_judged_by_relative_error(self):
        case = own("phase_sum")
        assert not fails(case, Outcome(0.05), Outcome(0.0)) and fails(case, Outcome(0.051), Outcome(0.0))

    def test_an_overflow_is_seen_and_an_island_cures_it(self):
        case = own("tiny_vectors")
        fp32 = run_case(case)
        low = run_case(case, fmt="fp16")
        assert not low.usable and str(low).endswith("!") and fails(case, low, fp32)
        fixed = run_case(case, fmt="fp16", plan=islands(case, "fp16", ["cosine"]))
        assert not fails(case, fixed, fp32) and fixed.value == pytest.approx(fp32.value, rel=0.05)

    def test_every_step_skipped_is_a_failure(self, written):
        endless = CASE.replace("1000 * x) ** 2 / 1e6", "x * 0 + 1) * 1e38 * 1e-38").replace("- 1)", "* 1e30 - 1)")
        case = load_case(written(square=endless) / "square.py")
        low = run_case(case, fmt="fp16")
        assert low.skipped == low.steps == 4 and not low.usable

    def test_what_a_case_raises_is_an_outcome(self, written):
        raising = CASE.replace("return (1000", "assert x.dtype == torch.float32, 'too narrow'\n        return (1000")
        case = load_case(written(square=raising) / "square.py")
        low = run_case(case, fmt="fp16")
        assert low.error == "AssertionError: too narrow" and str(low) == "error" and fails(case, low, run_case(case))

    def test_pure_runs_store_weights_and_inputs_in_the_format(self, written):
        spy = CASE.replace("STEPS = 4", "STEPS, MODE, OPT = 1, 'pure', 'sgd'\nseen = set()").replace(
            "return (1000", "seen.add(x.dtype)\n        return (1000"
        )
        case = load_case(written(square=spy) / "square.py")
        run_case(case, fmt="bf16")
        assert case.build.__globals__["seen"] == {torch.bfloat16}

    def test_products_through_fp32_change_no_verdict(self):
        for name in ("attention_logits", "contrast_exponential"):
            case = own(name)
            fp32 = run_case(case)
            for plan in (None, islands(case, "fp16", case.guilty["fp16"])):
                ends = [run_case(case, fmt="fp16", plan=plan, through_fp32=t) for t in (True, False)]
                assert fails(case, ends[0], fp32) == fails(case, ends[1], fp32) == (plan is None)

    def test_the_plan_decides_the_loss_scale(self):
        case = own("ctl_scaled_gradients")
        plan = PrecisionPlan.uniform("fp16").replace(loss_scale={"initial": 2.0**40})
        assert run_case(case, fmt="fp16", plan=plan).skipped > 5
        assert run_case(case, fmt="fp16", plan=PrecisionPlan.uniform("fp16")).skipped == 0

    def test_same_seed_same_run(self):
        case = own("ctl_mean_overlap")
        assert run_case(case, seed=1).value == run_case(case, seed=1).value != run_case(case, seed=2).value

    def test_tasks_start_equal(self):
        one, two = (make_task(own("small_updates"), seed=4) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))


def plan(*high, fmt="fp16", policy="autocast", **params):
    return PrecisionPlan(
        default=LayerPrecision(fmt, policy=policy),
        modules={**{n: LayerPrecision("fp32") for n in high},
                 **{n: LayerPrecision(fmt, policy=policy, params=p) for n, p in params.items()}},
    )  # fmt: skip


class TestScoring:
    names = ("", "a", "b", "b.x", "b.y", "c")
    leaves = ("a", "b.x", "b.y", "c")

    def test_kept_high(self):
        assert kept_high(plan("a"), self.names, "fp16", storage=False) == ["a"]
        assert kept_high(plan("b"), self.names, "fp16", storage=False) == ["b", "b.x", "b.y"]
        wide = plan(policy="cast", c="fp32")
        assert kept_high(wide, self.names, "fp16", storage=False) == []
        assert kept_high(wide, self.names, "fp16", storage=True) == ["c"]

    def test_named(self):
        accepted = Accepted(stand_ins=("c",), spared=("b",))
        assert is_named(["a"], ["a", "b"], accepted)
        assert not is_named(["b"], ["a", "b"], accepted)
        assert is_named(["c"], ["a", "b"], accepted)
        assert not is_named(["a"], ["a", "b"], Accepted())

    def test_needless(self):
        accepted = Accepted(stand_ins=("c",))
        assert needless(["a", "b", "b.x", "c"], self.leaves, ["a"], accepted) == ["b.x"]
        assert needless(["b", "b.x", "b.y"], self.leaves, ["b"], Accepted()) == []

    def test_a_failing_pair_is_cured_only_if_named_and_passing(self):
        pair = {"case": "x", "format": "fp16", "failing": True, "leaves": 4}
        assert Score(**pair, passed=True, named=True).verdict == "cured"
        assert Score(**pair, passed=True, named=False).verdict == "not named"
        assert Score(**pair, passed=False, named=True).verdict == "named, fails"
        assert Score(**pair, passed=False).verdict == "fails"
        assert Score(**pair, error="E: x").verdict == "error"
        assert Score(**pair, passed=True, named=True, needless=["a", "b", "c"]).good  # counted in the mean share

    def test_a_harmless_pair_is_quiet_up_to_a_tenth(self):
        pair = {"case": "x", "format": "fp16", "failing": False, "passed": True}
        assert Score(**pair, leaves=10, needless=["a"]).verdict == "quiet"
        assert Score(**pair, leaves=9, needless=["a"]).verdict == "loud"

    def test_summary(self):
        cured = Score("a", "fp16", True, passed=True, named=True, needless=["x"], leaves=4)
        missed = Score("b", "fp16", True, leaves=4)
        quiet = Score("c", "fp16", False, passed=True, leaves=4)
        total = summarise([cured, missed, quiet])
        assert (total.cured, total.failing, total.quiet, total.passing) == (1, 2, 1, 1)
        assert total.share == pytest.approx(0.125) and not total.good and total.missing == ["b fp16: fails"]
        assert not summarise([cured]).good  # a share of 0.25
        assert summarise([quiet]).good and math.isnan(summarise([quiet]).share)

    def test_judging_a_plan(self):
        case = own("diffusion_timestep")
        names, leaves = called_modules(case)
        assert "clock" in leaves and "block1" in names and "block1" not in leaves
        found = judge(case, "bf16", plan("clock", "enter", fmt="bf16", policy="cast"), names, leaves)
        assert found["named"] and found["needless"] == ["enter"] and found["high_leaves"] == 2
        assert found["leaves"] == len(leaves) == 14 and found["status"] == "predicted"

    def test_modules_of_the_loss_are_called_too(self):
        assert called_modules(own("dice_overlap"))[1] == ["classify", "features.0", "features.1", "overlap"]


def result(*scores):
    return ZooResult("folder", tuple(scores), 0, 3.0)


MIXED = (
    Score("a_case_with_a_name_that_is_long_enough_to_cut", "fp16", True, {"fp32": 0.1, "low": math.nan}, "0.1", "nan!",
          "0.1", True, True, True, {"body.layer": "not fp16: output reaches 1e6", "head": ""}, ["head"], 2, 12,
          "confirmed"),
    Score("ctl_b", "bf16", False, {}, "0.5", "0.5", "0.5", False, True, leaves=3),
    Score("c", "fp16", True, {}, "0.5", "0.5", "RuntimeError: no", False, False, leaves=3),
)  # fmt: skip


class TestShowing:
    @pytest.mark.parametrize("width", [60, 80, 120])
    def test_tables_fit(self, width):
        text = result(*MIXED).text(width=width)
        assert max(map(len, text.splitlines())) <= width
        for word in ("cured", "quiet", "fails ?", "2/12", "8.33", "not fp16: output reaches 1e6", "(needless)"):
            assert word in " ".join(text.split()), word
        assert "cured 1 of 2 failing pairs" in text.replace("\n", " ")
        assert "did not end here as the case says: c fp16" in text.replace("\n", " ")

    def test_json(self, tmp_path):
        path = result(*MIXED).save(tmp_path / "deep" / "zoo.json")
        content = json.loads(path.read_text())
        assert content["schema"] == 1 and content["benchmark"] == "zoo" and content["seed"] == 0
        assert content["summary"] == {
            "failing": 2, "cured": 1, "passing": 1, "quiet": 1, "share": pytest.approx(1 / 24),
            "missing": ["c fp16: fails"], "good": False,
        }  # fmt: skip
        first = content["scores"][0]
        assert first["values"] == {"fp32": 0.1, "low": None} and first["verdict"] == "cured" and first["good"] is True
        assert first["high"]["body.layer"].startswith("not fp16") and first["needless"] == ["head"]


class TestWhole:
    def test_a_case_through_the_public_api(self):
        score = score_case(own("dice_overlap"), "fp16")
        assert score.error is None and score.failing and score.low_fails
        assert score.leaves == 4 and score.status in ("confirmed", "predicted")
        assert score.verdict == "cured" and score.high["overlap"]

    def test_broken_advice_is_a_score(self, monkeypatch):
        import precscope

        def broken(*_args, **_kwargs):
            raise ValueError("no plan today")

        monkeypatch.setattr(precscope, "recommend", broken, raising=False)
        found = score_zoo(cases=["tiny_vectors"], formats="fp16")
        (score,) = found.scores
        assert score.verdict == "error" and score.error.startswith("ValueError: no plan today (test_bench.py:")
        assert not found.summary.good and "no plan today" in found.text(width=80)

    def test_formats(self):
        with pytest.raises(FormatError, match="scored in fp16 and bf16, not in e4m3"):
            score_zoo(formats="e4m3")


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    from precscope.cli import main

    def run(*arguments, columns=60):
        monkeypatch.setattr("sys.argv", ["precscope", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.chdir(tmp_path)
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = stop.code or 0
        said = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=said.out, stderr=said.err)

    return run


class TestCommand:
    def test_without_a_word_it_lists(self, cli):
        done = cli("bench")
        assert done.returncode == 0 and done.stdout.startswith("zoo: ") and "next: precscope bench zoo" in done.stdout

    def test_a_quiet_control(self, cli, tmp_path):
        done = cli("bench", "zoo", "--case", "ctl_dead_features", "--format", "bf16", "--json", "out.json")
        assert done.returncode == 0, done.stdout + done.stderr
        assert max(map(len, done.stdout.splitlines())) <= 60
        assert "quiet on 1 of 1 harmless pair" in done.stdout and "wrote out.json" in done.stdout
        assert "ctl_dead_features bf16: quiet" in done.stderr
        assert json.loads((tmp_path / "out.json").read_text())["summary"]["quiet"] == 1

    def test_a_folder_of_ones_own_that_is_not_cured(self, cli, written):
        folder = written(wrong=CASE.replace('["1"]', '["0"]').replace("1000 *", "1 *").replace("/ 1e6", "/ 1"))
        done = cli("bench", "zoo", folder, "--format", "fp16")
        assert done.returncode == 1 and "cured 0 of 1 failing pair" in done.stdout

    def test_wrong_use(self, cli):
        assert cli("bench", "zoo", "nowhere").returncode == 2
        done = cli("bench", "zoo", "--case", "dice")
        assert done.returncode == 2 and "has no case 'dice'; it has dice_overlap" in done.stderr
        assert cli("bench", "zoo", "--format", "e4m3").returncode == 2


class TestPage:
    def test_it_tells_of_each_case_and_escapes(self, tmp_path, written):
        """What a reader must find: counts, the case, who is at fault, why, what was missed; no markup from names."""
        from precscope.bench.page import save_page

        folder = written(broken=f'"""A case with <i>tags</i>."""\n{CASE}')
        bad = Score(
            "broken", "fp16", True, fp32="0.1", low="nan!", planned="0.1", low_fails=True, passed=True, named=False,
            high={"a": "why <b>"}, needless=["a"], high_leaves=1, leaves=2,
        )  # fmt: skip
        path = save_page(ZooResult(str(folder), (bad,), 3, 1.0), tmp_path / "deep" / "zoo.html")
        text = path.read_text(encoding="utf-8")
        assert (
            "cures 0" in text
            and "broken fp16: not named" in text
            and "why &lt;b&gt;" in text
            and "<b>" not in text
            and "<i>" not in text
        )
        assert "http" not in text.replace("http-equiv", "") and "<script" not in text
        assert text.count('class="case"') == 1 and "(needlessly)" in text
