"""What a report gathers beside the ranges: the plan beside autocast, courses of runs, tables, sites alike."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from reported import SEEDS, made_plan, recorded_run, row_of, table_of, training_run, training_runs

from precscope.comparison import compare
from precscope.events import read_events
from precscope.plans import LayerPrecision, Phase, PrecisionPlan
from precscope.profiles import Profile
from precscope.reporting import report
from precscope.reporting.alike import merging, pattern
from precscope.reporting.courses import courses, run_names
from precscope.reporting.downloads import downloads
from precscope.reporting.html import render
from precscope.reporting.page import MANY, payload
from precscope.reporting.rows import site_rows
from precscope.reporting.view import build_view
from precscope.sites import Role, Site
from precscope.store import StatsWriter, prepare_directory, write_json


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("reported")


@pytest.fixture(scope="module")
def run(base):
    return recorded_run(base / "rec")


@pytest.fixture(scope="module")
def plan(run):
    return made_plan(run)


@pytest.fixture(scope="module")
def runs(base):
    return training_runs(base)


@pytest.fixture(scope="module")
def view(run, plan, runs):
    return build_view(run, plan=plan, runs=runs)


def figure_of(view, what: str, how: str = "") -> dict[str, float | None]:
    line = next(f for f in view.beside.figures if f.what == what and how in f.how)
    return dict(zip(view.beside.columns, line.values, strict=True))


# the plan beside autocast


def test_the_plan_stands_beside_autocast_in_both_formats(view, plan):
    assert view.beside.columns == ("plan", "fp16 autocast", "bf16 autocast", "fp32")
    assert plan["blocks.1.mlp.fc2"].compute == "fp32" and plan["blocks.0.mlp.fc2"].compute == "fp16"
    modules = len(view.plan)
    assert figure_of(view, "Modules in low precision") == {
        "plan": modules - 1, "fp16 autocast": modules, "bf16 autocast": modules, "fp32": 0,
    }  # fmt: skip
    predicted = figure_of(view, "Time of forward and backward, ms", "model")
    assert predicted["plan"] == plan.made_from["predicted_ms"]["plan"] > predicted["fp16 autocast"]
    assert predicted["bf16 autocast"] is None, "the plan did not ask for bf16"
    measured = figure_of(view, "Time per training step, ms")
    assert measured == pytest.approx({"plan": 250, "fp16 autocast": 300, "bf16 autocast": 265, "fp32": 400}, rel=0.05)


def test_casts_are_those_of_the_plan_on_the_recorded_graph(view, plan):
    """One island among its neighbours: what goes in and what comes out."""
    assert [(c.producer, c.consumer, c.before, c.after) for c in view.beside.casts] == [
        ("blocks.1.mlp.fc2", "blocks.2.ln", "fp32", "fp16"), ("blocks.1.mlp.fc1", "blocks.1.mlp.fc2", "fp16", "fp32"),
    ]  # fmt: skip
    assert figure_of(view, "Casts between modules")["plan"] == plan.made_from["casts"] == 2
    assert figure_of(view, "Elements cast")["plan"] == sum(c.elements for c in view.beside.casts)
    assert figure_of(view, "Elements cast")["fp16 autocast"] == 0


def test_noise_and_its_spenders_agree_with_the_plan_and_with_the_profile(run, view, plan):
    told = plan.made_from["loss_noise"]
    assert view.beside.noise == pytest.approx(told["plan"])
    assert view.beside.budget == pytest.approx(told["budget"])
    assert {s.module: s.std for s in view.beside.spenders[:5]} == pytest.approx(told["largest"])
    assert sum(s.share for s in view.beside.spenders) == pytest.approx(1)
    assert sum(s.of_budget for s in view.beside.spenders) == pytest.approx((told["plan"] / told["budget"]) ** 2)
    assert "blocks.1.mlp.fc2" not in {s.module for s in view.beside.spenders}, "fp32 spends nothing"
    asked = Profile.load(run).ask("fp16", roles=["output", "weight"])
    units = asked[asked.module.isin([m["name"] for m in Profile.load(run).graph["modules"] if m["name"]])]
    matrix = ~((units.role == "weight") & units.module.str.endswith("tok"))  # a look-up table multiplies nothing
    total = float(np.sqrt((units[matrix].loss_noise ** 2).sum()))
    assert figure_of(view, "Loss noise, standard deviation")["fp16 autocast"] == pytest.approx(total)


def test_memory_is_predicted_from_what_is_stored_and_put_out(run, plan):
    stored = plan.replace(modules={**plan.modules, "head": LayerPrecision("fp16", policy="cast")})
    view = build_view(run, plan=stored)
    graph = json.loads((run / "graph.json").read_text())
    params = sum(m["own_params"] for m in graph["modules"])
    leaves = sum(m["elements"] for m in graph["modules"] if m["leaf"])
    parameters = figure_of(view, "Memory of parameters")
    assert parameters["fp32"] == parameters["fp16 autocast"] == 4 * params
    assert parameters["plan"] == 4 * params - 2 * 65536
    outputs = figure_of(view, "Memory of activations")
    assert (outputs["fp32"], outputs["fp16 autocast"]) == (4 * leaves, 2 * leaves)
    assert outputs["plan"] == 2 * leaves + 2 * 32_768


def test_overflowing_tensors_are_counted_where_they_would_run_low(base, plan):
    """With a larger output than fp16 holds: fp16 autocast meets it, the plan keeps it out."""
    run = recorded_run(base / "beyond", steps=4)
    later = [Site("blocks.1.mlp.fc2", Role.OUTPUT)]
    StatsWriter(run).write(np.array([40]), later, table_of([row_of([1.0, 3e5])]), np.ones(1), {})
    view = build_view(run, plan=plan)
    found = figure_of(view, "Forward tensors beyond the format's end")
    assert (found["plan"], found["fp16 autocast"], found["fp32"]) == (0, 1, 0)


def test_a_plan_without_autocast_is_told_by_its_own_times(run, plan):
    beyond = {"taken": True, "variant": "cast", "kept": [], "ms_autocast": 20.0, "ms_cast": 15.0,
              "cast_elements": {"autocast": 900, "cast": 400}}  # fmt: skip
    step_ms = {"plan": 21.0, "main": 22.0, "fp32": 40.0}
    made_from = {**plan.made_from, "main": "fp16", "step_ms": step_ms, "beyond_autocast": beyond}
    view = build_view(run, plan=plan.replace(made_from=made_from))
    side = figure_of(view, "Time of forward and backward, ms", "side by side")
    assert (side["plan"], side["fp16 autocast"], side["fp32"]) == (None, 22.0, 40.0)
    turn = figure_of(view, "Time of forward and backward, ms", "in turn")
    assert (turn["plan"], turn["fp16 autocast"]) == (15.0, None), "the plan keeps modules high: not plain autocast"
    assert figure_of(view, "Elements cast", "inside modules too")["plan"] == 400
    refused = {**made_from, "beyond_autocast": {**beyond, "taken": False}}
    side = figure_of(
        build_view(run, plan=plan.replace(made_from=refused)), "Time of forward and backward, ms", "side by"
    )
    assert side["plan"] == 21.0


def test_measured_steps_of_the_confirmation_stand_beside_each_other(run, plan):
    made = {**plan.made_from, "main": "fp16", "step_ms": {"plan": 20.0, "main": 19.0, "fp32": 30.0}}
    found = figure_of(build_view(run, plan=plan.replace(made_from=made)), "Time of forward and backward, ms", "side")
    assert found == {"plan": 20.0, "fp16 autocast": 19.0, "fp32": 30.0}


def test_a_run_without_its_graph_knows_less_and_says_no_more(base):
    path = prepare_directory(base / "bare", exist="overwrite")
    StatsWriter(path).write(np.array([0]), [Site("m", Role.OUTPUT)], table_of([row_of([1.0])]), np.ones(1), {})
    write_json(path / "run.json", {"schema": 1})
    view = build_view(path, plan=PrecisionPlan(default="fp16", modules={"m": LayerPrecision("fp16")}))
    assert {f.what for f in view.beside.figures} == {
        "Modules in low precision", "Forward tensors beyond the format's end",
    }  # fmt: skip
    assert view.beside.casts == () and view.beside.spenders == ()
    assert build_view(path).beside is None


# training


def test_courses_hold_what_the_logs_hold(runs, view):
    by_run = {c.run: c for c in view.courses}
    assert list(by_run) == ["fp32", "bf16", "fp16", "plan"] and all(c.seeds == len(SEEDS) for c in view.courses)
    fp16 = by_run["fp16"]
    assert fp16.skipped == (0, 1, 40, 55) and fp16.nonfinite == (40, 41)
    assert fp16.scale == ((0, 65536.0), (1, 32768.0), (2, 16384.0), (41, 8192.0), (56, 4096.0), (79, 4096.0))
    assert by_run["fp32"].scale == (), "no loss scale, no stairs"
    assert [s for s, _ in fp16.held_out] == [19, 39, 59, 79]
    rate = dict(fp16.rate)
    assert min(rate.values()) > 2.5 and np.median(list(rate.values())) == pytest.approx(1000 / 300, rel=0.05)


def test_differences_are_paired_and_have_intervals(view, runs):
    by_run = {c.run: c for c in view.courses}
    assert by_run["fp32"].difference == () and by_run["fp32"].against == ""
    worse = np.array(by_run["fp16"].difference, float)
    assert (worse[:, 2] <= worse[:, 1]).all() and (worse[:, 1] <= worse[:, 3]).all()
    assert worse[:, 1].mean() == pytest.approx(0.2, abs=0.02)
    assert by_run["fp16"].kind == "worse" and by_run["fp16"].against.startswith("different: worse by")
    losses = np.array(by_run["plan"].losses, float)
    assert np.isfinite(losses).all(), "three seeds have a spread"
    alone = training_run(runs[0].parent / "alone", seeds=(0,))
    (course,) = courses(compare([alone]))
    assert course.losses[0][2:] == (None, None) and course.seeds == 1


def test_a_guards_events_are_those_of_its_file(runs, view):
    plan = next(c for c in view.courses if c.run == "plan")
    assert list(plan.events) == read_events(runs[3])
    said = next(s for s in view.statements if "guard noted" in s.text)
    assert said.kind == "care" and "1 overflow (promote)" in said.text and said.text.startswith("Over 3 seeds, plan")
    page = render(view)
    assert "it goes on in fp32" in page and '<span class="tag">rollback</span>' in page


def test_runs_of_one_name_are_told_apart(base):
    same = [training_run(base / f / "plan", seeds=(0,), end=end) for f, end in (("a", 2.0), ("b", 2.5))]
    comparison = compare(same)
    assert run_names(comparison) == tuple(map(str, same))
    view = build_view(recorded_run(base / "small", layers=1, steps=2), runs=same)
    assert [r.run for r in view.runs] == list(map(str, same)) and view.baseline == str(same[0])
    assert f"to {same[0]}" in render(view)


def test_a_run_that_ended_early_has_gaps(base, runs):
    short = training_run(base / "short", seeds=(0,))
    log = pd.read_parquet(short / "train.parquet").head(30)
    log.loc[10:, "loss"] = np.nan
    log.to_parquet(short / "train.parquet")
    course = courses(compare([runs[0], short]))[1]
    assert course.losses[-1][1] is None and json.dumps(course.losses, allow_nan=False)


def test_margin_and_phases_are_told(run, plan, runs, view):
    base = view.runs[0].eval_loss
    share, bound = view.margin
    assert share == 0.02 and bound == pytest.approx(0.02 * base, rel=0.05)
    phased = plan.replace(phases=[Phase(from_step=0, precision="plan"), Phase(from_step=900, precision="fp32")])
    told = build_view(run, plan=phased)
    assert told.phases == ("from step 0 this plan", "from step 900 fp32") and told.margin is None
    assert "Phases: from step 0 this plan; from step 900 fp32." in render(told)


# provenance


def test_provenance_names_every_run_and_its_command(view, runs):
    found = dict(view.provenance)
    for run in runs:
        pairs = dict(found[f"Run compared: {run.name}"])
        assert pairs["directory"] == str(run) and pairs["command"] == "precscope train gpt --seed 0"
        assert pairs["seeds"] == "0, 1, 2" and pairs["torch"] == "2.13.0"
    assert set(dict(found["This report"])) == {"precscope", "command"}
    assert {"run.json", "stats parts", "graph.json", "plan.json", "tables of this page"} <= set(
        dict(found["Schema numbers"])
    )
    recording = dict(found["Recording and result"])
    assert recording["optimizers.class"] == "AdamW" and recording["optimizers.groups.betas"] == "0.9, 0.95"
    assert recording["optimizers.groups.parameters"].endswith(" and 8 more")


# tables


def read_back(download) -> pd.DataFrame:
    data = base64.b64decode(download.parquet)
    assert len(data) == download.size
    file = pq.ParquetFile(io.BytesIO(data))
    assert file.schema_arrow.metadata[b"precscope.schema"] == b"1"
    assert file.schema_arrow.metadata[b"precscope.kind"] == f"report-{download.name}".encode()
    return file.read().to_pandas()


def test_parquet_files_hold_everything_shown(run, view):
    found = {d.name: d for d in downloads(view)}
    assert list(found) == [
        "sites", "history", "plan", "beside", "noise", "casts", "runs", "curves", "steps", "events", "provenance",
    ]  # fmt: skip
    frames = {name: read_back(d) for name, d in found.items()}
    assert {name: len(f) for name, f in frames.items()} == {name: d.count for name, d in found.items()}
    sites, table = Profile.load(run).merged()
    assert len(frames["sites"]) == len(sites)
    for row in frames["sites"].itertuples():
        i = sites.index(Site(row.module, Role(row.role), row.call))
        assert row.amax == table.amax[i] and row.histogram.sum() == table.counts[i].sum()
        assert row.sumsq == table.sumsq[i] and row.source_exponent == table.source_exponent[i]
    growing = frames["history"].query("module == 'blocks.1.mlp.fc2' and role == 'output'")
    assert growing.step.tolist() == list(range(0, 80, 10)) and (np.diff(growing.amax) > 0).all()
    assert frames["curves"].query("run == 'fp16'").difference.mean() == pytest.approx(0.2, abs=0.02)
    assert frames["events"].action.tolist() == ["none", "promote", "rollback"]
    assert frames["casts"].elements.tolist() == [c.elements for c in view.beside.casts]


def test_parquet_that_would_weigh_too_much_is_left_out_and_said(view):
    whole = {d.name: d for d in downloads(view)}
    largest = max(whole.values(), key=lambda d: d.size).name
    cut = {d.name: d for d in downloads(view, limit=sum(d.size for d in whole.values()) - 1)}
    assert cut[largest].parquet == "" and cut[largest].size == whole[largest].size
    assert all(d.parquet for name, d in cut.items() if name != largest)
    assert all(d.parquet == "" for d in downloads(view, limit=0))


def test_tables_for_the_page_are_plain(view):
    found = {d.name: d for d in downloads(view)}
    assert found["sites"].rows is None and found["history"].rows is None, "the page makes these itself"
    text = json.dumps([d.rows for d in found.values()], allow_nan=False)
    assert "NaN" not in text
    assert found["beside"].columns == ("figure", "how", "plan", "fp16_autocast", "bf16_autocast", "fp32")
    assert len(found["plan"].rows) == len(view.plan)


def test_the_page_holds_reasons_once_and_evidence_by_format(view, plan):
    data = payload(view)
    assert len(set(data["reasons"])) == len(data["reasons"])
    compute, params, reasons, evidence = data["plan"][data["modules"].index("blocks.1.mlp.fc2")]
    assert (compute, params) == ("fp32", "fp32")
    assert [data["reasons"][i] for i in reasons] == [str(r) for r in plan["blocks.1.mlp.fc2"].reasons]
    how, times, noise, forbidden = evidence
    assert how == "model" and set(times) == set(noise) == {"fp16", "fp32"} and forbidden == ["fp16"]


def test_texts_of_events_and_runs_cannot_be_markup(base, run):
    from precscope.events import Event

    hostile = "</script><img src=x onerror=alert(1)>\u2028漢"
    events = [Event(1, "overflow", "promote", hostile, module=hostile)]
    runs = [training_run(base / "x" / name, seeds=(0,), events=events) for name in ("fp32", "plan")]
    page = report(run, runs=runs, out=base / "hostile.html", title=hostile).read_text(encoding="utf-8")
    assert "<img" not in page and page.count("</script>") == 2
    assert "onerror=alert(1)" in page
    assert not re.search(r"[\u2028\u2029]", page.split('id="data">')[1])


# very many sites


def test_names_that_differ_in_numbers_only_are_alike():
    assert pattern("layers.3.experts.17.w1") == "layers.*.experts.*.w1"
    assert pattern("layers.3.experts.17.w1", 1) == "layers.3.experts.*.w1"
    assert pattern("layer3.conv2d") == "layer3.conv2d" and pattern("0") == "*" and pattern("") == ""


def test_as_few_numbers_as_will_do_are_merged():
    sites = [Site(f"l.{i}.e.{j}", role) for i in range(4) for j in range(5) for role in (Role.INPUT, Role.OUTPUT)]
    assert merging(sites, most=40) is None
    by_expert = merging(sites, most=39)
    assert len({by_expert(s) for s in sites}) == 8 and by_expert(sites[0]) == Site("l.0.e.*", Role.INPUT)
    assert len({merging(sites, most=7)(s) for s in sites}) == 2
    assert len({merging(sites, most=1)(s) for s in sites}) == 2, "roles are never merged"


def test_merged_sites_add_up(run):
    profile = Profile.load(run)
    sites, table = profile.merged()
    steps, rows = site_rows(profile, merge=merging(sites, most=len(sites) - 1))
    plain_steps, plain = site_rows(profile)
    assert steps == plain_steps and len(rows) < len(plain)
    assert sum(r.count for r in rows) == sum(r.count for r in plain) == table.count.sum()
    merged = next(r for r in rows if r.name == "blocks.*.mlp.fc2.output")
    parts = [r for r in plain if re.fullmatch(r"blocks\.\d\.mlp\.fc2\.output", r.name)]
    assert len(parts) == 3
    assert merged.amax == max(p.amax for p in parts) and sum(merged.histogram) == sum(sum(p.histogram) for p in parts)
    assert merged.history == tuple(max(p.history[i] for p in parts) for i in range(len(steps)))
    assert sum(map(sum, (p.weights for p in merged.prices))) == pytest.approx(
        sum(sum(p.weights) for part in parts for p in part.prices)
    )


def test_a_page_of_very_many_sites_says_that_they_are_merged(run, plan, monkeypatch):
    monkeypatch.setattr("precscope.reporting.view.merging", lambda sites: merging(sites, most=50))
    view = build_view(run, plan=plan)
    data = payload(view)
    compute, params, reasons = data["plan"][data["modules"].index("blocks.*.mlp.fc2")]
    assert (compute, params) == ("fp16 (2), fp32 (1)", "fp32")
    assert any(data["reasons"][i].startswith("not fp16: output reaches") for i in reasons)
    recorded = len(Profile.load(run).merged()[0])
    assert view.merged_from == recorded > len(view.sites)
    page = render(view)
    assert f"{recorded} sites were recorded, more than a page can hold" in page
    assert f"merged into one each, {len(view.sites)} in all" in page


def test_a_page_of_many_sites_opens_with_those_alike_in_one_row(base):
    path = prepare_directory(base / "many", exist="overwrite")
    sites = [Site(f"layers.{i}.linear", Role.OUTPUT) for i in range(MANY + 1)]
    StatsWriter(path).write(np.zeros(len(sites), int), sites, table_of([row_of([1.0])] * len(sites)),
                            np.ones(len(sites)), {})  # fmt: skip
    write_json(path / "run.json", {"schema": 1})
    view = build_view(path)
    assert len(view.sites) == MANY + 1 and view.merged_from == 0
    assert payload(view)["choice"]["alike"] is True
    assert f"{MANY + 1:,} sites were recorded: those whose names differ only in" in render(view)
