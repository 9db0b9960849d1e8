"""View, text, Markdown and HTML, on run directories made by the real writer from known numbers."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from precscope.errors import RunDirectoryError
from precscope.formats import get_format
from precscope.histogram import BINS, EXP_LO
from precscope.opstore import OpRecords, OpSite
from precscope.plans import LayerPrecision, PrecisionPlan, Reason
from precscope.profiles import Profile
from precscope.reporting import numbers, report, tables, text
from precscope.reporting.html import embed, payload, render
from precscope.reporting.markdown import _md, markdown, save_markdown
from precscope.reporting.rows import group_rows, plan_rows, site_rows
from precscope.reporting.view import build_view
from precscope.sites import Role, Site
from precscope.stats import StatsTable
from precscope.store import StatsWriter, prepare_directory, write_json

HOSTILE = "</script><img src=x onerror=window.hacked=1>\u2028\u2029é & 漢"
ROUNDED = {"fp32": np.float32, "fp16": np.float16, "fp64": np.float64}


def row_of(values, source="fp32") -> dict:
    """The columns of a StatsTable for one tensor."""
    x = np.asarray(values, np.float64).ravel()
    finite = np.isfinite(x)
    a = np.abs(x[finite & (x != 0)])
    counts = np.bincount(np.clip(np.frexp(a)[1] - 1 - EXP_LO, 0, BINS - 1), minlength=BINS)
    with np.errstate(over="ignore", under="ignore"):
        sumsq = float((x[finite] ** 2).sum())
    return {
        "counts": counts.astype(np.int64), "zeros": int((x == 0).sum()), "pos_inf": int((x == np.inf).sum()),
        "neg_inf": int((x == -np.inf).sum()), "nan": int(np.isnan(x).sum()), "amax": float(a.max()) if len(a) else 0.0,
        "amin_nonzero": float(a.min()) if len(a) else np.inf, "sum": float(x[finite].sum()), "sumsq": sumsq,
        "source": source,
    }  # fmt: skip


def table_of(rows: list[dict]) -> StatsTable:
    return StatsTable(**{name: np.array([r[name] for r in rows]) for name in rows[0]})


def model(layers: int) -> list[tuple[str, str, int, int]]:
    """(name, type, parameters, FLOPs) of a GPT's modules."""
    found = [("", "GPT", 0, 0), ("tok", "Embedding", 65536, 0)]
    for i in range(layers):
        found += [
            (f"blocks.{i}.ln", "LayerNorm", 512, 1000), (f"blocks.{i}.attn", "Attention", 0, 130_000),
            (f"blocks.{i}.attn.qkv", "Linear", 196608, 400_000), (f"blocks.{i}.mlp.fc1", "Linear", 262144, 530_000),
            (f"blocks.{i}.mlp.fc2", "Linear", 262144, 530_000),
        ]  # fmt: skip
    return [*found, ("head", "Linear", 65536, 130_000)]


def make_run(
    path: Path,
    *,
    layers: int = 2,
    steps: int = 4,
    n: int = 400,
    modules=None,
    seed: int = 0,
    peak: float = 1e5,
    **about,
) -> Path:
    """A run directory: unit-normal activations, except that blocks.1.mlp.fc2 outputs `peak`; gradients near 2^-20."""
    rng = np.random.default_rng(seed)
    prepare_directory(path, exist="overwrite")
    modules = modules or model(layers)
    writer = StatsWriter(path)
    for step in range(0, 10 * steps, 10):
        sites, rows, scales = [], [], []
        for name, _, parameters, _ in modules:
            output = rng.normal(0, 1, n)
            if name == "blocks.1.mlp.fc2":
                output[0] = peak + step
            gradient = rng.normal(0, 1, n) * 2.0**-20
            items = [("input", rng.normal(0, 1, n)), ("output", output), ("grad_output", gradient)]
            if parameters:
                items += [("weight", rng.normal(0, 0.02, n)), ("grad_weight", gradient * 8)]
            for role, values in items:
                sites.append(Site(name, Role(role)))
                rows.append(row_of(values.astype(np.float32)))
                scales.append(65536.0 if role.startswith("grad") else 1.0)
        writer.write(np.full(len(sites), step), sites, table_of(rows), np.array(scales), {})
    write_json(path / "run.json", {
        "schema": 1, "status": "done", "task": "gpt", "model": "GPT", "parameters": 3_290_000, "precision": "bf16",
        "seed": 7, "torch": "2.13.0", "device": "cpu", "command": "precscope demo", "every": 10, "pid": 1,
        "train": {"steps": 40, "lr": 1e-3}, **about,
    })  # fmt: skip
    listed = [
        {"name": a, "type": b, "params": c, "own_params": c, "flops": d, "calls": 1} for a, b, c, d in modules
    ]  # fmt: skip
    write_json(path / "graph.json", {"schema": 1, "modules": listed, "parameters": [], "edges": []})
    return path


def make_training(path: Path, *, loss: float, ms: float, **keys) -> Path:
    """A training run of 60 steps that ends at `loss`."""
    prepare_directory(path, exist="overwrite")
    step = np.arange(60)
    skipped = step < keys.pop("skipped", 0)
    pd.DataFrame({
        "step": step, "loss": loss + np.exp(-step / 5.0), "lr": 1e-3, "scale": 1.0, "skipped": skipped,
        "nonfinite": False, "grad_norm": 1.0, "time_ms": ms, "memory_bytes": 10**9, "eval_loss": np.nan,
    }).to_parquet(path / "train.parquet")  # fmt: skip
    content = {"schema": 1, "status": "done", "precision": path.name, "eval_loss": loss, "peak_memory_bytes": 2 * 10**9}
    write_json(path / "run.json", {**content, **keys})
    return path


def make_plan(modules) -> PrecisionPlan:
    chosen = {}
    for name, kind, *_ in modules:
        if kind == "LayerNorm":
            chosen[name] = LayerPrecision("fp32", reasons=[Reason(code="cost", text="no cast to its neighbours")])
        elif name == "blocks.1.mlp.fc2":
            why = Reason(code="overflow", text="not fp16: its output reaches 1.0003e5, fp16 ends at 65504")
            chosen[name] = LayerPrecision("fp32", reasons=[why])
        elif name:
            chosen[name] = LayerPrecision("fp16", reasons=["fp16: fastest allowed"])
    scale = {"initial": 2.0**14, "interval": [8.0, 19.0], "lo_site": "tok.grad_output", "hi_site": "head.grad_weight"}
    made = {"costs": "measured", "predicted_ms": {"plan": 200.0, "fp32": 400.0}}
    return PrecisionPlan(default="fp16", modules=chosen, loss_scale=scale, made_from=made)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(profile, plan, training runs)"""
    base = tmp_path_factory.mktemp("runs")
    profile = Profile.load(make_run(base / "a"))
    runs = [
        make_training(base / "fp32", loss=2.0, ms=400.0),
        make_training(base / "fp16", loss=2.004, ms=300.0, skipped=2),
        make_training(base / "plan", loss=2.002, ms=250.0, low_precision_flops_share=0.8),
    ]
    return profile, make_plan(model(2)), runs


@pytest.fixture(scope="module")
def view(made):
    profile, plan, runs = made
    return build_view(profile, plan=plan, runs=runs)


# numbers


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (0, "0"), (1, "1"), (65504.0, "65504"), (0.125, "0.125"), (12.3456, "12.35"), (1 / 64, "0.01563"), (1e5, "1e5"),
        (123456, "1.235e5"), (99999.7, "1e5"), (9999.97, "10000"), (0.001, "0.001"), (0.00099999, "1e-3"),
        (1.2345e-7, "1.235e-7"), (-3.5, "-3.5"), (float("inf"), "inf"), (float("nan"), "–"), (None, "–"),
        (2e300, "2e300"),
    ],
)  # fmt: skip
def test_numbers_have_four_significant_digits(x, said):
    assert numbers.number(x) == said


def test_shares_and_intervals():
    assert numbers.percent(0.1234567) == "12.35"
    assert numbers.percent(3e-9) == "<0.0001"
    assert numbers.interval(0.0, 0.0) == "0"
    assert numbers.interval(0.001, 0.0125) == "0.1..1.25"
    assert numbers.fixed(float("inf")) == "exact"
    assert numbers.fixed(-0.04) == "0.0"
    assert numbers.figure(1.92) == "1.920"
    assert numbers.power_of_two(2.0**-14) == "2^-14"
    assert numbers.raised("from 2^-14 to 2^19, not 12^3") == "from 2⁻¹⁴ to 2¹⁹, not 12^3"


def test_long_names_lose_their_middle():
    assert numbers.shorten("blocks.11.attention.query", 12) == "block….query"
    assert numbers.shorten("short", 12) == "short"


# view


def test_view_says_what_runs_low_what_not_and_why(view):
    assert view.lead == "9 of 12 modules run in fp16, 83.94% of the FLOPs; 3 stay in fp32."
    kept = next(s for s in view.statements if "compute in fp32" in s.text)
    assert kept.text.startswith("3 modules compute in fp32, 1 of them because low precision is not safe there")
    assert kept.items[0] == "blocks.1.mlp.fc2: not fp16: its output reaches 1.0003e5, fp16 ends at 65504"
    assert "blocks.{0-1}.ln: no cast to its neighbours" in kept.items


def test_view_states_what_was_measured(view):
    said = " ".join(s.text for s in view.statements)
    assert "Trained with the plan: 1.60 times the speed of fp32 (250 against 400 ms per step)" in said
    assert "held-out loss 2.002 against 2.000 (+0.10%)" in said
    assert "no non-finite step, no skipped step" in said
    assert "Loss scales from 2^8 to 2^19 are safe" in said
    assert "not yet confirmed" in said
    facts = {f.label: f.value for f in view.facts}
    assert facts["Speed against fp32, measured"] == "1.60×"
    assert facts["Loss scale"] == "2^14"
    assert view.next_command.startswith("with ps.apply(")


def test_gradient_statement_matches_the_profile(made, view):
    profile, plan, _ = made
    low = {r.module for r in plan_rows(profile, plan) if r.compute == "fp16"}
    frame = profile.ask("fp16", roles=["grad_output", "grad_weight"])
    frame = frame[frame.module.isin(low)]
    share = (frame.flushed * frame["count"]).sum() / frame["count"].sum()
    assert any(f"fp16 flushes {numbers.percent(share)}% of the gradient values" in s.text for s in view.statements)


def test_view_without_a_plan_asks_for_one(made):
    profile, _, runs = made
    alone = build_view(profile)
    assert alone.lead.startswith("fp16 would overflow at 1 of 36 forward tensors; bf16 holds all 36")
    assert alone.next_command == f"precscope recommend {profile.path} --out plan.json"
    assert alone.plan == () and alone.confirmed is None
    worst = next(i for s in alone.statements for i in s.items if i.startswith("fp16:"))
    assert "blocks.1.mlp.fc2.output reaches 1e5, 0.6 binades too far" in worst
    planned = build_view(profile, plan=make_plan(model(2)), runs=runs[:1])
    assert planned.next_command == "precscope train gpt --plan plan.json --out runs/plan"


FC2 = "blocks.1.mlp.fc2 output reaches 2.403e+04, 1.4 binades below the end of fp16 (65504)"


def ranges_of(view):
    return next(s for s in view.statements if "against the largest finite value" in s.text)


def test_sites_near_the_end_of_fp16_are_named_without_a_plan_too(tmp_path):
    """With their head-room, in every rendering; what the large value passes through afterwards is not."""
    path = make_run(tmp_path / "a", peak=24000.0)
    handed = Site("head", Role.INPUT)
    StatsWriter(path).write(np.array([40]), [handed], table_of([row_of([1.0, 24000.0])]), np.ones(1), {})
    view = build_view(path)
    said = ranges_of(view)
    assert said.kind == "care"
    assert said.items[0].startswith("fp16: every tensor fits; the lowest SQNR is")
    assert said.items[1] == FC2 and said.items[2].startswith("bf16 has the range of fp32")
    assert f"    {FC2[:60]}" in text.verdict_text(view, width=80)
    assert f"  - {_md(FC2)}" in markdown(view)
    assert FC2 in render(view)
    fact = next(f for f in view.facts if f.label == "Least head-room in fp16")
    assert (fact.value, fact.note) == ("1.4 binades", "blocks.1.mlp.fc2.output")


def test_sites_two_binades_away_are_not_worth_a_word(tmp_path):
    said = ranges_of(build_view(make_run(tmp_path / "a", peak=65504 / 4 - 31)))
    assert said.kind == "good" and len(said.items) == 2
    assert "the largest is blocks.1.mlp.fc2.output with 16375, 2.0 binades below 65504" in said.items[0]


def test_beyond_the_end_each_site_is_named_once(tmp_path):
    path = make_run(tmp_path / "a")
    second = Site("tok", Role.OUTPUT)
    StatsWriter(path).write(np.array([40]), [second], table_of([row_of([1.0, 3e4])]), np.ones(1), {})
    said = ranges_of(build_view(path))
    assert "2 tensors" not in said.items[0] and "blocks.1.mlp.fc2.output reaches 1e5, 0.6 binades" in said.items[0]
    assert said.items[1] == "tok output reaches 3e+04, 1.1 binades below the end of fp16 (65504)"


def test_a_plan_that_keeps_the_site_out_of_fp16_hears_nothing_of_it(tmp_path):
    path = make_run(tmp_path / "a", peak=24000.0)
    kept = ranges_of(build_view(path, plan=make_plan(model(2))))
    assert kept.kind == "good" and not any("binades below the end" in i for i in kept.items)
    lowered = make_plan(model(2)).replace(modules={}, default=LayerPrecision("fp16"))
    assert FC2 in ranges_of(build_view(path, plan=lowered)).items


def noise_of(profile, **noise):
    plan = make_plan(model(2))
    plan = plan.replace(made_from={**plan.made_from, "loss_noise": noise})
    return next((s for s in build_view(profile, plan=plan).statements if s.text.startswith("Rounding moves")), None)


def test_the_plan_says_what_it_spends_of_the_noise_it_may_make(made):
    largest = {"head": 2e-3, "": 1e-3, "tok": 0.0}
    said = noise_of(made[0], plan=2.5e-3, budget=0.01, spread_over_batches=0.1, largest=largest)
    assert said.kind == "good"
    assert said.text == (
        "Rounding moves the loss of a step by 0.0025 (standard deviation, priced in shadow steps), within the 0.01 "
        "that is allowed; from batch to batch it differs by 0.1; the largest parts are those of head (0.002) and "
        "(root) (0.001)."
    )
    over = noise_of(made[0], plan=0.02, budget=0.01, spread_over_batches=float("nan"), largest={})
    assert over.kind == "care" and over.text.endswith("more than the 0.01 that is allowed.")
    assert noise_of(made[0], plan=None, budget=None) is None


def test_warnings_about_the_optimizer_are_listed(made):
    warnings = [f"AdamW: warning {i}" for i in range(8)]
    view = build_view(made[0], plan=make_plan(model(2)).replace(optimizer={"groups": [], "warnings": warnings}))
    said = next(s for s in view.statements if s.text.startswith("The optimizer needs care"))
    assert said.kind == "care" and said.items == (*warnings[:6], "and 2 more warnings")
    assert "AdamW: warning 3" in render(view)
    reason = "blocks.1.mlp.fc2: not fp16: its output reaches 1.0003e5, fp16 ends at 65504"  # told with the modules
    view = build_view(made[0], plan=make_plan(model(2)).replace(optimizer={"warnings": [reason, warnings[0]]}))
    assert next(s for s in view.statements if s.text.startswith("The optimizer needs care")).items == (warnings[0],)
    assert not [s for s in build_view(made[0], plan=make_plan(model(2))).statements if "optimizer" in s.text]


def test_an_inference_run_is_not_told_to_train(tmp_path):
    path = make_run(tmp_path / "a", mode="inference")
    assert build_view(path, plan=make_plan(model(2))).next_command.startswith("with ps.apply(")
    assert build_view(path).next_command.startswith("precscope recommend")


def test_a_plan_that_lowers_nothing_says_so(made):
    profile, _, _ = made
    view = build_view(profile, plan=PrecisionPlan.uniform("fp32"))
    assert view.lead == "The plan keeps all 12 modules in fp32: nothing is gained or allowed in low precision."


def test_a_worse_loss_is_a_problem(made, tmp_path):
    profile, plan, runs = made
    bad = make_training(tmp_path / "plan", loss=2.5, ms=250.0)
    view = build_view(profile, plan=plan, runs=[runs[0], bad])
    assert next(s for s in view.statements if s.text.startswith("Trained")).kind == "bad"
    assert view.next_command.startswith("precscope profile")


def test_recorded_nonfinite_values_come_first(tmp_path):
    path = make_run(tmp_path / "a", steps=1)
    writer = StatsWriter(path)
    writer.write(np.array([10]), [Site("head", Role.OUTPUT)], table_of([row_of([1.0, np.nan, np.inf])]), np.ones(1), {})
    view = build_view(path)
    assert view.statements[0].kind == "bad"
    assert view.statements[0].text == "inf or NaN was recorded at 1 site."
    head = next(s for s in view.sites if s.name == "head.output")
    assert head.nonfinite == 2 and head.broken == (1,)


def test_a_failed_run_says_so_before_all_else(tmp_path):
    run = make_run(tmp_path / "a", steps=2, status="failed", error="TrainingError: the loss\x1b[2J was not finite")
    view = build_view(run)
    assert view.lead.startswith("The run failed. ") and view.statements[0].kind == "bad"
    assert view.statements[0].text == "The run failed; what is said here is what it recorded up to step 10."
    assert view.next_command == "precscope trace gpt"
    for said in (text.verdict_text(view), markdown(view)):
        assert "The run failed" in said and "was not finite" in said and "\x1b" not in said
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "run.json").write_text('{"schema": 1, "status": "failed"}')
    assert build_view(tmp_path / "b").statements[0].text == "The run failed; it recorded nothing."


def test_values_that_were_not_finite_are_not_said_to_fit(tmp_path):
    profile = Profile.load(make_run(tmp_path / "a", steps=1, peak=float("nan")))
    view = build_view(profile)
    assert view.lead.startswith("Of the values that were finite: fp16 holds all ")
    items = next(s for s in view.statements if s.text.startswith("Inputs, outputs")).items
    assert sum("every finite value fits" in item for item in items) == 2 and "every tensor" not in str(items)


def test_history_holds_the_largest_magnitude_of_each_step(made):
    profile, _, _ = made
    steps, sites = site_rows(profile)
    assert steps == (0, 10, 20, 30)
    site = next(s for s in sites if s.name == "blocks.1.mlp.fc2.output")
    assert site.history == tuple(float(np.float32(1e5 + step)) for step in steps)
    assert sum(site.histogram) + site.zeros + site.nonfinite == site.count == 1600
    gradient = next(s for s in sites if s.name == "head.grad_output")
    assert gradient.source_exponent == -16


def test_long_histories_are_merged(tmp_path):
    path = prepare_directory(tmp_path / "long")
    n = 1000
    table = table_of([row_of([1.0 + step]) for step in range(n)])
    StatsWriter(path).write(np.arange(n), [Site("m", Role.OUTPUT)] * n, table, np.ones(n), {})
    steps, (site,) = site_rows(Profile.load(path))
    assert 12 <= len(steps) <= 160 and steps[0] == 0
    assert max(site.history) == float(n)


def test_sites_follow_the_model_not_the_recording(made):
    profile, _, _ = made
    names = list(dict.fromkeys(s.module for s in site_rows(profile)[1]))
    assert names == [m["name"] for m in profile.graph["modules"]]


def test_rows_alike_share_a_line(made):
    profile, plan, _ = made
    rows = plan_rows(profile, plan)
    groups = {g.label: g for g in group_rows(rows)}
    assert groups["blocks.{0-1}.ln"].count == 2
    assert groups["blocks.{0-1}.ln"].flops_share == pytest.approx(2 * rows[1].flops_share)
    assert groups["blocks.0.mlp.fc2"].compute == "fp16" and groups["blocks.1.mlp.fc2"].compute == "fp32"
    assert sum(g.count for g in groups.values()) == len(rows)


def test_an_empty_run_reports(tmp_path):
    path = prepare_directory(tmp_path / "empty")
    write_json(path / "run.json", {"schema": 1, "status": "failed", "model": "GPT"})
    view = build_view(path)
    assert "holds no statistics" in view.lead
    assert 'id="sites"' not in render(view)


# text


def test_tables_fit_eighty_columns(made, view):
    profile, plan, _ = made
    long = [(f"encoder.layers.{i}.attention.self.query_projection.inner", "Linear", 10, 10) for i in range(3)]
    rows = profile.ask("fp16").assign(module=[long[i % 3][0] for i in range(len(profile.ask("fp16")))])
    tables = [
        text.verdict_text(view, width=80), text.compare_table(view.runs, width=80), text.ask_table(rows, width=80),
        text.plan_table(plan, width=80), text.plan_table(view.plan, width=80),
    ]  # fmt: skip
    for shown in tables:
        assert max(map(len, shown.splitlines())) <= 80, shown
        assert "\x1b" not in shown
    assert "encoder…ner.grad_output" in tables[2] or "…" in tables[2]


def test_tables_never_cut_figures(made):
    profile, _, _ = made
    frame = profile.ask("fp16", roles=["output"])
    shown = text.ask_table(frame, width=60)
    for row in frame.itertuples():
        assert numbers.interval(row.overflow_lo, row.overflow_hi) in shown
        assert numbers.fixed(row.sqnr_db) in shown


def test_ask_table_tells_of_more_rows(made):
    frame = made[0].ask("fp16")
    assert f"the first 5 of {len(frame)} tensors" in text.ask_table(frame.head(5), total=len(frame))
    assert text.ask_table(frame.head(0)) == "no recorded tensor matches"


def op_frame() -> pd.DataFrame:
    """What OpRecords.ask gives, of three ops of one long-named module."""
    name = "encoder.layers.11.attention.self.query_projection"
    sites = [
        OpSite(name, "forward", "exp", 1, "fp32"), OpSite("", "backward", "native_layer_norm_backward[2]", 0, "fp32"),
        OpSite(name, "forward", "bmm", 0, "fp32"),
    ]  # fmt: skip
    table = table_of([row_of([1e5, 2.0]), row_of([1e-8, 1.0]), row_of([1.0, 3.0])])
    return OpRecords(sites, table, np.full(3, np.nan), np.ones(3), np.zeros(3, np.int64)).ask("fp16")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_op_table_fits_and_tells_ops_apart(width):
    shown = tables.ops_table(op_frame(), total=9, width=width)
    lines = shown.splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0].split() == ["module", "phase", "op", "amax", "overflow", "flushed", *["SQNR"] * (width >= 72)]
    assert lines[2].split()[1:5] == ["fwd", "exp#1", "1e5", "50"]
    assert lines[3].split()[:2] == ["(root)", "bwd"] and lines[3].split()[3:6] == ["1", "0", "50"]
    assert lines[4].split()[1:4] == ["fwd", "bmm", "3"]
    assert "the first 3 of 9 ops; --rows 0 prints all" in shown
    assert tables.ops_table(op_frame().head(0)) == "no recorded op matches"


def forecast_frame() -> pd.DataFrame:
    columns = ["module", "role", "call", "amax_now", "limit", "headroom", "p_overflow", "p_lo", "p_hi",
               "headroom_ahead", "headroom_least"]  # fmt: skip
    nan, name = float("nan"), "encoder.layers.11.attention.self.query_projection"
    return pd.DataFrame([
        ["calm", "output", 0, 1.0, 65520.0, 16.0, 0.0, 0.0, 0.0, 16.0, 15.5],
        ["short", "weight", 0, 2.0, 65520.0, 15.0, nan, nan, nan, nan, nan],
        [name, "output", 1, 3e4, 65520.0, 1.1, 0.3456, 0.012, 0.998, 0.25, -1.0],
        ["over", "input", 0, 7e4, 65520.0, -0.1, 1.0, 1.0, 1.0, nan, nan],
        ["rare", "output", 0, 2e4, 65520.0, 1.7, 2e-5, 1e-6, 3e-4, 1.5, 1.2],
    ], columns=columns)  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 120])
def test_forecast_table_has_the_likeliest_first(width):
    ordered = tables.likeliest_first(forecast_frame())
    assert [m[-5:] for m in ordered.module] == ["over", "ction", "rare", "calm", "short"]
    shown = tables.forecast_table(ordered.head(4), of=ordered, format="fp16", horizon=1000, width=width)
    lines = shown.splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0] == "fp16 (largest finite value 65504), the next 1,000 steps"
    bounds = width >= 72
    assert lines[3].split() == ["over.input", "70000", "-0.1", "–", "–", "100", *["100..100"] * bounds]
    assert lines[4].split()[1:] == ["30000", "1.1", "0.3", "-1.0", "35", *["1.2..>99"] * bounds]
    assert lines[5].split()[5:] == ["<0.1", *["<0.1..<0.1"] * bounds]
    assert lines[6].split()[5:] == ["0", *["0..0"] * bounds]
    said = " ".join(shown.split())
    assert "no forecast for 1 of 5 tensors" in said and "the first 4 of 5 tensors" in said
    empty = ordered.head(0)
    assert tables.forecast_table(empty, of=empty, format="fp16", horizon=1) == "no recorded tensor matches"


def test_compare_table_has_every_figure(view):
    lines = text.compare_table(view.runs, width=80).splitlines()
    assert lines[0].split() == [
        "run",
        "train",
        "held-out",
        "change",
        "ms/step",
        "speed",
        "memory",
        "skip",
        "inf",
        "low",
    ]
    assert " ".join(lines[3].split()) == "fp16 2.004 2.004 +0.20% 300.0 1.33x 2 GB 2 0 100%"
    assert lines[4].split()[-1] == "80%"


def test_a_name_cannot_forge_rows_or_move_the_cursor(made):
    frame = made[0].ask("fp16").head(1).assign(module="a\n\x1b[2Jb")
    shown = text.ask_table(frame, width=80)
    assert "\x1b" not in shown and len(shown.splitlines()) == 4


def test_markdown_says_first_what_to_know_and_folds_the_rest(made, view):
    said = markdown(view)
    assert said.startswith("## GPT\n\n**9 of 12 modules run in fp16, 83.94% of the FLOPs; 3 stay in fp32.** Predicted,")
    assert "| **83.94%**<br>9 of 12 modules | **1.60×**<br>250 ms per step, fp32 400 |" in said
    assert "### Kept in high precision: 3 modules, 1 of them must be" in said
    first, second = (line for line in said.splitlines() if line.startswith("| blocks") and line.count("|") == 5)
    assert first == "| blocks.1.mlp.fc2 | fp32 | 16 | not fp16: its output reaches 1.0003e5, fp16 ends at 65504 |"
    assert second.startswith("| blocks.{0-1}.ln | fp32 | ") and second.endswith("| no cast to its neighbours |")
    assert "| plan | plan | 2.002 | 2.002 (+0.10%) | 250.0 | 1.60x | 2 GB | 0 | 0 |" in said
    assert "<details><summary>Plan (predicted, not confirmed): fp16 83.94%, fp32 16.06%</summary>" in said
    shown, _, folded = said.partition("<details>")
    assert "✅ Trained with the plan: 1.60 times" in shown and "Loss scales from 2^8 to 2^19" in folded
    assert "compute in fp32, 1 of them" not in said  # the table says it
    assert said.count("<details>") == said.count("</details>") == 3 and "\n\n\n" not in said
    alone = markdown(build_view(made[0]))
    assert "### Kept" not in alone and "### Training" not in alone and "Next: make a plan" in alone


def test_markdown_leaves_no_markup_in_names():
    assert _md("a_b|<c>") == "a\\_b\\|&lt;c&gt;"
    assert _md("@me #12 https://x.y ~~z~~ & \x1b[2J") == ("&#64;me &#35;12 https&#58;//x.y \\~\\~z\\~\\~ &amp; ?\\[2J")


def test_markdown_of_a_large_model_fits_a_comment(tmp_path):
    modules = [(f"encoder_{chr(97 + i % 26)}{i}_projection", "Linear", 100, 1000) for i in range(600)]
    why = Reason(code="overflow", text="not fp16: " + "its output reaches 1e5 and more " * 30)
    plan = PrecisionPlan(default="fp16", modules={m[0]: LayerPrecision("fp32", reasons=[why]) for m in modules[:200]})
    said = markdown(build_view(make_run(tmp_path / "a", modules=modules, steps=1, n=20), plan=plan))
    assert len(said) < 65_000
    assert "and 175 more modules: see the plan" in said and "more rows: see plan.json" in said
    assert "Where this comes from" in said and said.count("<details>") == said.count("</details>")


def test_markdown_is_written_whole_or_refused(view, tmp_path):
    assert save_markdown(view, tmp_path / "deep" / "a.md").read_text(encoding="utf-8") == markdown(view)
    with pytest.raises(RunDirectoryError, match="is a directory: name a file"):
        save_markdown(view, tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunDirectoryError, match="cannot write .*choose another place"):
        save_markdown(view, tmp_path / "file" / "a.md")


@pytest.mark.parametrize("width", [60, 72, 80, 120])
def test_everything_printed_fits_the_width(made, view, width):
    profile, plan, _ = made
    shown = [
        text.verdict_text(view, width=width).rpartition("\nnext")[0], text.compare_table(view.runs, width=width),
        text.ask_table(profile.ask("fp16"), width=width), text.plan_table(plan, width=width),
        text.plan_table(view.plan, width=width),
    ]  # fmt: skip
    for table in shown:
        assert max(map(len, table.splitlines())) <= width, table


def test_a_narrow_comparison_has_every_figure_in_two_tables(view):
    lines = text.compare_table(view.runs, width=60).splitlines()
    assert lines[0].split() == ["run", "train", "held-out", "change", "ms/step", "speed"]
    assert lines[5].split() == ["run", "memory", "skip", "inf", "low"]
    assert lines[3].split() == ["fp16", "2.004", "2.004", "+0.20%", "300.0", "1.33x"]
    assert lines[8].split() == ["fp16", "2", "GB", "2", "0", "100%"]


# html


def test_html_has_every_section_and_no_outside_address(made, tmp_path):
    profile, plan, runs = made
    path = report(profile, plan=plan, runs=runs, out=tmp_path / "deep" / "a.html", title="A title")
    page = path.read_text(encoding="utf-8")
    for section in ("verdict", "ranges", "explorer", "plan", "training", "provenance"):
        assert f'<section id="{section}" aria-labelledby=' in page
    assert "<title>A title · precscope</title>" in page
    assert "default-src 'none'" in page
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", page)
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", page)
    assert path.stat().st_size < 400_000


def test_html_without_plan_and_runs_leaves_them_out(made, tmp_path):
    page = report(made[0], out=tmp_path / "a.html").read_text(encoding="utf-8")
    assert 'id="plan"' not in page and 'id="training"' not in page and 'id="explorer"' in page


def test_html_shows_hostile_names_as_text(tmp_path):
    modules = [*model(1), (HOSTILE, "Linear", 10, 5000)]
    profile = Profile.load(make_run(tmp_path / "a", modules=modules))
    plan = make_plan(modules).replace(default=LayerPrecision("fp16", reasons=["<b>why</b>"]))
    page = report(profile, plan=plan, out=tmp_path / "a.html", title="<i>t</i>").read_text(encoding="utf-8")
    assert "<img" not in page and "<i>" not in page and "<b>" not in page
    assert page.count("</script>") == 2 and page.count("<script") == 2
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])
    assert HOSTILE in data["modules"]
    assert not set("<>&\u2028\u2029") & set(embed({"x": HOSTILE}))


def test_page_scripts_cannot_end_their_element():
    templates = Path(text.__file__).parent / "templates"
    for script in templates.glob("*.js"):
        source = script.read_text(encoding="utf-8")
        assert "</" not in source and "<!--" not in source, script.name
        assert "innerHTML" not in source and "eval(" not in source, script.name


def test_payload_holds_the_histograms_exactly(made):
    profile, _, _ = made
    data = payload(build_view(profile))
    sites, table = profile.merged()
    for row in data["sites"]:
        site = Site(data["modules"][row[0]], Role(data["roles"][row[1]]), row[2])
        i = sites.index(site)
        counts = np.zeros(BINS, np.int64)
        counts[row[11] - EXP_LO :][: len(row[12])] = row[12]
        assert (counts == table.counts[i]).all()
        assert (row[3], row[6], row[8]) == (table.count[i], table.amax[i], table.sumsq[i])
    fp16 = next(f for f in data["formats"] if f["name"] == "fp16")
    assert fp16["overflowFrom"] == get_format("fp16").overflow_from


def test_payload_prices_only_what_shadow_steps_priced(made):
    """Weights come trimmed, per tensor where rounding is answered apart; a run without shadow steps has none."""
    assert all(s.prices is None for s in build_view(made[0]).sites)
    assert all(len(row) == 15 for row in payload(build_view(made[0]))["sites"])
    head = [Site("head", Role.WEIGHT, 0, t) for t in ("weight", "bias")]
    many = [Site("head", Role.OUTPUT, 0, t) for t in ("0", "1", "2")]
    rows = [row_of(np.float32(x)) for x in ([0.5, 3.0], [1.0, 1.0], [0.5, 3.0], [8.0, 9.0], [0.5])]
    shadow = Profile(
        made[0].path, {}, [*head, *many], table_of(rows), {}, rounded={"fp16": np.array([4e-6, 1e-6, *[np.nan] * 3])},
        _history=pd.DataFrame({"step": [0, 10]}),
    )  # fmt: skip
    shadow.table.weights = 2.0 * (shadow.table.counts > 0)
    view = build_view(dataclasses.replace(made[0], shadow=shadow))
    data = payload(view)
    found = {s.name: row[15] for s, row in zip(view.sites, data["sites"], strict=True) if len(row) > 15}
    fp32 = data["sources"].index("fp32")
    assert fp32 == 0 and data["shadowSteps"] == 2
    assert found["head.weight"] == [[-1, [2, 0, 2], 0, 0, 0, {"fp16": 4e-6}], [0, [2], 0, 0, 1, {"fp16": 1e-6}]]
    assert found["head.output"] == [[-1, [2, 0, 2, 0, 2]], [-1, [2], 0, 0, 0.5]]
    assert set(found) == {"head.weight", "head.output"}


def test_five_hundred_modules_stay_small(tmp_path):
    modules = [(f"layers.{i}.linear", "Linear", 100, 1000) for i in range(500)]
    path = make_run(tmp_path / "a", modules=modules, steps=2, n=300)
    out = report(path, plan=make_plan(modules), out=tmp_path / "a.html")
    assert len(Profile.load(path).merged()[0]) == 2500
    assert out.stat().st_size < 8_000_000


def test_reports_are_written_whole_or_refused(made, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunDirectoryError, match=r"cannot write .*choose another file"):
        report(made[0], out=tmp_path / "file" / "a.html")
    assert report(made[0], out=tmp_path).name == "index.html"
    with pytest.raises(RunDirectoryError, match="no run directory"):
        report(tmp_path / "nothing", out=tmp_path / "b.html")


def test_reporting_needs_no_torch(made, tmp_path):
    profile, _, runs = made
    code = (
        "import sys\n"
        "from precscope.reporting import report\n"
        "assert 'pandas' not in sys.modules and 'jinja2' not in sys.modules\n"
        f"report({str(profile.path)!r}, runs=[{str(runs[0])!r}], out={str(tmp_path / 'a.html')!r})\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "assert 'plotly' not in sys.modules and 'matplotlib' not in sys.modules\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=120)
    assert done.returncode == 0, done.stderr
