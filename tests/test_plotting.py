"""Figures: what is drawn is what the profile, the plan and the runs say; PNG and SVG; nothing left open."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest
from test_comparison import make_group
from test_comparison import make_run as make_seed
from test_reporting import HOSTILE, make_plan, make_run, make_training, model

import precscope as ps
from precscope.errors import RunDirectoryError, UsageError
from precscope.plans import LayerPrecision, PrecisionPlan, Reason
from precscope.profiles import Profile
from precscope.reporting.numbers import shorten
from precscope.reporting.rows import site_rows

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed: figures are not tried")
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FC2 = "blocks.1.mlp.fc2.output"


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(profile, plan, training runs)"""
    base = tmp_path_factory.mktemp("runs")
    runs = [
        make_training(base / "fp32", loss=2.0, ms=400.0),
        make_training(base / "plan", loss=2.002, ms=250.0, skipped=3),
    ]
    return Profile.load(make_run(base / "a")), make_plan(model(2)), runs


def texts(ax) -> str:
    legend = ax.get_legend()
    said = [t.get_text() for t in [*ax.texts, *ax.get_xticklabels(), *ax.get_yticklabels()]]
    said += [ax.get_title(loc="left"), ax.get_xlabel(), ax.get_ylabel()]
    return "\n".join(said + [t.get_text() for t in (legend.get_texts() if legend else ())])


def names_of(ax) -> list[str]:
    return [t.get_text() for t in ax.get_yticklabels()]


# ranges


def test_the_public_name_is_the_module(made):
    assert ps.plot.__name__ == "precscope.plotting" and "plot" in ps.__all__
    for name in ps.plot.__all__:
        assert callable(getattr(ps.plot, name))


def test_range_map_shows_every_site_and_what_overflows(made):
    ax = ps.plot.range_map(made[0])
    assert names_of(ax)[:2] == ["(root)", "tok"] and len(names_of(ax)) == len(model(2))
    image = ax.get_images()[0].get_array()
    lo = int(ax.get_xlim()[0])
    i = names_of(ax).index("blocks.1.mlp.fc2")
    overflow, kept = image[i, 16 - lo], image[i, -1 - lo]
    assert overflow[0] > overflow[2] and overflow[3] >= 0.6  # vermilion, and not faint though it is one value
    assert kept[2] > kept[0]
    assert "overflow" in texts(ax) and "output of 13 sites" in texts(ax) and "binade" in texts(ax)
    gradients = ps.plot.range_map(made[0], role="grad_output", format="fp16", scale_exponent=16)
    assert "flushed to zero" not in texts(gradients) and "scale of 2¹⁶" in texts(gradients)
    assert "flushed to zero" in texts(ps.plot.range_map(made[0], role="grad_output"))


def test_a_second_call_has_a_row_of_its_own_name(made):
    sites = [s._replace(call=int(s.module == "head")) for s in made[0].sites]
    assert "head#1" in names_of(
        ps.plot.range_map(dataclasses.replace(made[0], sites=sites, _history=made[0].history()))
    )


def test_a_map_of_many_sites_merges_siblings(tmp_path):
    profile = Profile.load(make_run(tmp_path / "a", layers=30, steps=1, n=50))
    ax = ps.plot.range_map(profile, most=40)
    assert "blocks.*.mlp.fc2" in names_of(ax) and "output of 153 sites, in 8 rows" in texts(ax)
    assert len(names_of(ps.plot.range_map(profile, most=5))) == 5
    i = names_of(ax).index("blocks.*.mlp.fc2")
    assert ax.get_images()[0].get_array()[i, 16 - int(ax.get_xlim()[0]), 3] >= 0.6  # the one that overflows is in it


def test_histogram_bars_are_the_counts(made):
    ax = ps.plot.histogram(made[0], FC2)
    site = next(s for s in site_rows(made[0])[1] if s.name == FC2)
    bars = {int(np.floor(p.get_x() + p.get_width() / 2)): p.get_height() for p in ax.patches}
    shares = np.array(site.histogram) / sum(site.histogram)
    assert {e: s for e, s in bars.items() if s} == pytest.approx(
        {site.lo + i: share for i, share in enumerate(shares) if share}
    )
    assert "overflow: 0.25%" in texts(ax) and "fp16 largest" in texts(ax)
    with pytest.raises(UsageError, match=r"no recorded site 'heat.output' \(did you mean .*head.output"):
        ps.plot.histogram(made[0], "heat.output")


def test_unknown_roles_are_refused(made):
    with pytest.raises(UsageError, match="unknown role 'outputs'; roles are input, output"):
        ps.plot.range_map(made[0], "outputs")
    with pytest.raises(UsageError, match="holds no statistics of role 'state'"):
        ps.plot.range_map(made[0], "state")
    with pytest.raises(UsageError, match="unknown role 'outputs'"):
        ps.plot.what_if(made[0], role="outputs")


# over steps


def test_history_of_a_site_and_of_a_module(made):
    frame = made[0].history()
    ax = ps.plot.history(made[0], FC2)
    rows = frame[(frame.module == "blocks.1.mlp.fc2") & (frame.role == "output")]
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), rows.step)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), rows.amax)
    assert "fp16 ends" in texts(ax)
    module = ps.plot.history(made[0], "blocks.1.mlp.fc2", "rms")
    roles = [t.get_text() for t in module.get_legend().get_texts()]
    assert roles == ["input", "output", "weight", "grad_output", "grad_weight"]
    output = rows.sumsq / (rows["count"] - rows.pos_inf - rows.neg_inf - rows.nan)
    np.testing.assert_allclose(module.lines[1].get_ydata(), np.sqrt(output))
    assert (ps.plot.history(made[0], FC2, "zeros").lines[0].get_ydata() == 0).all()
    scales = ps.plot.history(made[0], "head.grad_output", "loss_scale").lines[0].get_ydata()
    assert set(scales) == {65536.0}
    for column in ("mean", "amin_nonzero", "nonfinite"):
        assert len(ps.plot.history(made[0], FC2, column).lines[0].get_ydata()) == 4
    with pytest.raises(UsageError, match="no column 'amx' to draw; columns are amax"):
        ps.plot.history(made[0], FC2, "amx")
    with pytest.raises(UsageError, match=r"no recorded site or module 'blocks.1.mlp.fc3' \(did you mean"):
        ps.plot.history(made[0], "blocks.1.mlp.fc3")


def test_no_figure_reads_a_whole_history(made, monkeypatch):
    whole = Profile.history

    def history(self, columns=None, *, roles=None):
        assert columns and roles and len(roles) == 1
        return whole(self, columns, roles=roles)

    monkeypatch.setattr(Profile, "history", history)
    profile = Profile.load(made[0].path)
    for column in ps.plot.over_steps.COLUMNS:
        ps.plot.history(profile, "head", column)
    ps.plot.range_map(profile)
    ps.plot.what_if(profile)
    assert ps.plot.pages._scale(profile, None) == 16


# what a format would do


def test_what_if_draws_what_ask_answers(made):
    frame = made[0].ask("fp16", scale_exponent=4).set_index(["module", "role"])
    shares, sqnr = ps.plot.what_if(made[0], "fp16", scale_exponent=4, rows=200)
    assert len(names_of(shares)) == len(frame)
    drawn = {line.get_label(): line for line in shares.lines}
    for column, line in drawn.items():
        answers = frame["overflow_hi" if column == "overflow" else column]
        found = {}
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True):
            name, _, role = names_of(shares)[int(y)].rpartition(".")
            found["" if name == "(root)" else name, role] = x
        expected = {key: max(v, 1e-6) for key, v in answers.items() if v > 0}
        assert found == pytest.approx(expected)
    assert set(drawn) == {"overflow", "flushed", "subnormal"}
    assert "fp16, values times 2⁴" in texts(shares) and "SQNR (dB)" in texts(sqnr)
    assert names_of(shares)[0] == FC2  # overflow first
    (alone,) = ps.plot.what_if(made[0], "bf16", role="weight", ax=plt.subplots()[1])
    assert "nothing overflows" in texts(alone)


@pytest.fixture(scope="module")
def priced(tmp_path_factory):
    """A run of a real model with shadow steps, and its plan."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 3))
    data = [(torch.randn(16, 8), torch.randint(0, 3, (16,))) for _ in range(4)]
    task = ps.Task(model=net, batches=data, loss=lambda m, b: torch.nn.functional.cross_entropy(m(b[0]), b[1]))
    out = tmp_path_factory.mktemp("priced") / "a"
    profile = ps.profile(task, out=out, steps=8, every=2, precision="fp32", costs=False, ops=False)
    return profile, ps.recommend(profile, formats=("bf16", "fp32"))


def test_what_if_has_the_loss_noise_where_it_was_priced(priced):
    shares, _, noise = ps.plot.what_if(priced[0], "bf16", rows=100)
    frame = priced[0].ask("bf16")
    assert sorted(noise.lines[0].get_xdata()) == pytest.approx(sorted(frame.loss_noise[frame.loss_noise > 0]))
    assert "bf16: " in texts(shares) and "loss noise" in texts(noise)


def test_noise_budget_of_a_profile_adds_up(priced):
    ax = ps.plot.noise_budget(priced[0], format="e4m3", most=2)
    bars = {name: p.get_x() + p.get_width() for name, p in zip(names_of(ax), ax.patches, strict=True)}
    total = float(next(t for t in texts(ax).splitlines() if t.startswith("all together: ")).split(": ")[1])
    assert sum(b * b for b in bars.values()) ** 0.5 == pytest.approx(total, rel=1e-3)
    assert "allowed: " in texts(ax) and "every module in e4m3" in texts(ax)


def test_noise_budget_of_a_plan_is_what_the_plan_says(priced):
    _, plan = priced
    noise = plan.made_from["loss_noise"]
    ax = ps.plot.noise_budget(plan)
    assert f"Loss noise of the plan: {ps.plot.budgets.number(noise['plan'])}" in texts(ax)
    assert "nothing is rounded" in texts(ps.plot.noise_budget(fp32_of(plan)))
    with pytest.raises(UsageError, match="the plan does not say what its rounding does to the loss"):
        ps.plot.noise_budget(PrecisionPlan.uniform("bf16"))


def fp32_of(plan: PrecisionPlan) -> PrecisionPlan:
    noise = {**plan.made_from["loss_noise"], "plan": 0.0, "largest": {}}
    return PrecisionPlan(modules={"0": "fp32"}, made_from={**plan.made_from, "loss_noise": noise})


def test_a_run_without_prices_says_how_to_get_them(priced):
    with pytest.raises(UsageError, match="prices no rounding to bf16: record shadow steps"):
        ps.plot.noise_budget(dataclasses.replace(priced[0], shadow=None))


# plans


def test_a_plan_says_who_runs_in_what_and_why(made):
    modules, times = ps.plot.plan(made[1], made[0])
    assert "blocks.1.mlp.fc2" in names_of(modules) and "blocks.{0-1}.mlp.fc1" in names_of(modules)
    assert "fp32: not fp16: its output reaches 1.0003e5" in texts(modules)
    assert "fp16: fastest allowed" in texts(modules) and "fp16: fp16:" not in texts(modules)
    assert "Plan (predicted), 12 modules; FLOPs: fp16 83.94%, fp32 16.06%" in texts(modules)
    assert "the plan (predicted)" in texts(times) and "200 ms" in texts(times)
    (alone,) = ps.plot.plan(PrecisionPlan(default="bf16", modules={"head": "fp32"}))
    assert names_of(alone) == ["(all others)", "head"] and "modules: bf16 50%, fp32 50%" in texts(alone)


def test_measured_times_stand_beside_predicted_ones(made):
    more = {**made[1].made_from, "main": "fp16", "step_ms": {"plan": 210.0, "main": 220.0, "fp32": 390.0}}
    more["predicted_ms"] = {**more["predicted_ms"], "fp16": 9000.0}
    _, times = ps.plot.plan(made[1].replace(made_from=more), made[0])
    assert "fp16 autocast (measured)" in texts(times) and "9000 ms (bar cut)" in texts(times)
    assert max(p.get_width() for p in times.patches) == 1200
    more["beyond_autocast"] = {"taken": True, "ms_autocast": 205.0, "ms_cast": 150.0}
    _, times = ps.plot.plan(made[1].replace(made_from=more), made[0])
    assert "150 ms" in texts(times) and "210 ms" not in texts(times), "the plan that was timed first is another one"


def test_names_and_reasons_are_not_markup(tmp_path):
    name = HOSTILE.replace(".", "_") + r"$\frac$"
    profile = Profile.load(make_run(tmp_path / "a", modules=[*model(1), (name, "Linear", 10, 500)], steps=1))
    reason = Reason(code="user", text=r"because of $\x$ and \n" + HOSTILE)
    plan = PrecisionPlan(default=LayerPrecision("fp16", reasons=[reason]))
    for i, drawn in enumerate((ps.plot.plan(plan, profile), ps.plot.range_map(profile), ps.plot.what_if(profile))):
        with pytest.warns(UserWarning, match="Glyph") if sys.platform == "linux" else pytest.MonkeyPatch().context():
            path = ps.plot.save(drawn, tmp_path / f"{i}.svg")
        assert "<img" not in path.read_text(encoding="utf-8")


# runs


def test_loss_has_a_band_over_seeds_and_points_for_held_out_losses(tmp_path):
    make_group(tmp_path / "fp32", [2.0, 2.2, 1.9])
    make_seed(tmp_path / "bf16", loss=2.1)
    ax = ps.plot.loss([tmp_path / "fp32", tmp_path / "bf16"], smooth=1)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["fp32 (3 seeds)", "bf16"]
    np.testing.assert_allclose(ax.lines[0].get_ydata()[0], np.mean([2.0, 2.2, 1.9]) + 1)
    low, high = (f(ax.collections[0].get_paths()[0].vertices[:, 1]) for f in (np.min, np.max))
    sd = np.std([2.0, 2.2, 1.9], ddof=1)
    assert high == pytest.approx(np.mean([2.0, 2.2, 1.9]) + 1 + sd) and low < high
    with pytest.raises(UsageError, match="loss needs at least one run"):
        ps.plot.loss([])
    with pytest.raises(RunDirectoryError, match="holds no training run"):
        ps.plot.loss(tmp_path / "none")


def test_names_that_matplotlib_would_hide_or_typeset_are_shown(tmp_path):
    names = ["_fp32", "$x$/a", "b/a"]
    runs = [tmp_path / n for n in names]
    for run, loss in zip(runs, (2.0, 2.1, 2.2), strict=True):
        run.parent.mkdir(exist_ok=True)
        make_seed(run, loss=loss)
    shown = [t.get_text() for t in ps.plot.loss(runs).get_legend().get_texts()]
    assert len(shown) == 3 and all(str(run) in text for run, text in zip(runs, shown, strict=True))
    panel = ps.plot.comparison(runs)[0]
    assert [t.get_text() for t in panel.get_legend().get_texts()] == [str(r) for r in runs]
    assert names_of(ps.plot.speed(runs)[0]) == [shorten(str(r), 34) for r in runs]
    only = ps.plot.loss([runs[0], runs[2]])
    assert [t.get_text()[:6] for t in only.get_legend().get_texts()] == [" _fp32", "a"]
    ps.plot.save(ps.plot.loss([runs[0], tmp_path / "$x$" / "a"]), tmp_path / "a.svg")


def test_loss_scale_shows_its_steps_and_what_was_skipped(made):
    ax = ps.plot.loss_scale(made[2][1])
    assert "skipped: 3 of 60 steps" in texts(ax)
    assert ax.lines[1].get_xdata().tolist() == [0, 1, 2]
    assert (ax.lines[0].get_ydata() == 0).all()  # log2 of a scale of 1


def test_comparison_shows_curves_differences_and_scales(tmp_path):
    make_group(tmp_path / "fp32", [2.0, 2.2, 1.9])
    make_group(tmp_path / "bf16", [2.1, 2.3, 2.0])
    made = ps.compare([tmp_path / "fp32", tmp_path / "bf16"])
    above, below = ps.plot.comparison(made)
    assert [t.get_text() for t in above.get_legend().get_texts()] == ["fp32, 3 seeds", "bf16, 3 seeds"]
    np.testing.assert_allclose(below.lines[1].get_ydata(), 0.1)
    assert below.get_ylim()[1] <= 3 * 0.02 * 2.04
    path = ps.plot.save(above, tmp_path / "deep" / "a.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match=r"name it .png, .svg or .pdf"):
        ps.plot.save(above, tmp_path / "a.xyz")
    assert len(ps.plot.comparison([tmp_path / "fp32"])) == len(ps.plot.comparison(str(tmp_path / "fp32"))) == 1
    figure, ax = plt.subplots()
    (only,) = ps.plot.comparison(made, ax=ax)
    assert only is ax and len(figure.axes) == 1


def test_speed_and_memory_are_bars(made):
    times, memory = ps.plot.speed(made[2])
    assert [p.get_width() for p in times.patches] == [400.0, 250.0]
    assert "250 ms, 1.60×" in texts(times) and [p.get_width() for p in memory.patches] == [2.0, 2.0]


# files


def test_all_figures_are_written_in_both_forms_and_closed(made, priced, tmp_path):
    said: list[str] = []
    written = ps.plot.save_all(made[0], tmp_path / "figures", plan=made[1], runs=made[2], note=said.append)
    stems = {p.stem for p in written}
    assert stems >= {"ranges-output", "ranges-grad_weight", "what-if-forward", "what-if-gradients", "history",
                     "histogram", "plan", "loss", "comparison", "speed"}  # fmt: skip
    assert len(written) == 2 * len(stems) and said == []
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in written if p.suffix == ".png")
    assert all("<svg" in p.read_text(encoding="utf-8") for p in written if p.suffix == ".svg")
    assert plt.get_fignums() == []


def test_what_cannot_be_drawn_is_said(priced, tmp_path, monkeypatch):
    profile, plan = priced
    pages = ps.plot.pages
    every = pages._figures  # three of them do: each takes half a second
    wanted = ("noise-budget", "plan-noise-budget", "loss")
    monkeypatch.setattr(pages, "_figures", lambda *about: (one for one in every(*about) if one[0] in wanted))
    said: list[str] = []
    made_from = {**plan.made_from, "loss_noise": {"plan": None}}
    written = ps.plot.save_all(profile, tmp_path, plan=plan.replace(made_from=made_from), note=said.append)
    assert {p.stem for p in written} == {"noise-budget", "loss"}
    assert len(said) == 1 and said[0].startswith("no figure plan-noise-budget: the plan does not say")


def test_figures_name_the_extra_that_is_missing(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    for draw in (lambda: ps.plot.loss(made[2]), lambda: ps.plot.range_map(made[0]), lambda: ps.plot.what_if(made[0]),
                 lambda: ps.plot.plan(made[1]), lambda: ps.plot.comparison(made[2]),
                 lambda: ps.plot.save_all(made[0], "nowhere")):  # fmt: skip
        with pytest.raises(UsageError, match=r"figures need matplotlib: pip install 'precscope\[figures\]'"):
            draw()


@pytest.mark.slow
def test_the_report_command_writes_figures_and_markdown(precscope_cli, made, tmp_path):
    runs = [part for run in made[2] for part in ("--run", run)]
    done = precscope_cli("report", made[0].path, *runs, "--figures", "figs", "--markdown", "--out", "pr/a.md")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "wrote pr/a.md\n" and "figures into figs" in done.stderr
    assert (tmp_path / "pr" / "a.md").read_text(encoding="utf-8").startswith("## GPT\n")
    names = {p.name for p in (tmp_path / "figs").iterdir()}
    assert {"ranges-output.png", "ranges-output.svg", "comparison.png", "loss.svg"} <= names
    assert not (tmp_path / "reports").exists()
    done = precscope_cli("report", made[0].path, "--text", "--out", "a.txt")
    assert (done.returncode, done.stderr) == (2, "error: --text prints: leave out --out\n")
