"""What a notebook shows of a Profile and a plan: figures of ask and of the plan, escaped, no script."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from test_reporting import HOSTILE, make_plan, make_run, model

from precscope.advice.loss_scale import largest_scale
from precscope.formats import get_format
from precscope.plans import LayerPrecision, PrecisionPlan
from precscope.profiles import Profile
from precscope.reporting.numbers import percent
from precscope.store import prepare_directory, write_json


class Cells(HTMLParser):
    """Rows of cells; every tag that is opened is closed, and only harmless ones are there."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows, self.open, self.text = [], [], ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert tag in ("div", "strong", "table", "thead", "tbody", "tr", "th", "td", "span"), tag
        assert {name for name, _ in attributes} <= {"style", "scope"}
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    return Profile.load(make_run(tmp_path_factory.mktemp("runs") / "a"))


def forward_of(profile):
    sites, table = profile.merged()
    return [table.row(i) for i, s in enumerate(sites) if s.role in ("input", "output", "weight")]


def test_a_profile_shows_what_the_formats_would_do(profile):
    html = profile._repr_html_()
    shown = Cells(html)
    rows = {row[0]: row for row in shown.rows}
    assert rows["fp16"][1] == "1 of 36 tensors overflow; blocks.1.mlp.fc2.output reaches 1e5"
    assert rows["bf16"][1] == "all 36 tensors fit"
    frame = profile.ask("fp16", roles=["grad_output", "grad_weight"])
    share = (frame.flushed * frame["count"]).sum() / frame["count"].sum()
    assert rows["fp16"][3] == f"{percent(share)}% without a loss scale" and rows["bf16"][3] == "none"
    assert rows["e4m3"][1] == "36 tensors, each scaled to its own largest value"
    scaled = [s.shift(largest_scale(s.amax, get_format("e4m3"))).ask("e4m3").sqnr_db for s in forward_of(profile)]
    assert rows["e4m3"][2] == f"{min(scaled):.1f} dB"
    assert rows["fp16"][2] == f"{profile.ask('fp16', roles=['input', 'output', 'weight']).sqnr_db.min():.1f} dB"
    assert "13 modules · 59 sites · 4 steps recorded, 0 to 30 · in bf16" in shown.text
    assert len(html) < 8000 and "color:#" not in html.replace("background:#", "")


def test_runs_without_statistics_and_with_head_room(tmp_path):
    path = prepare_directory(tmp_path / "empty")
    write_json(path / "run.json", {"schema": 1, "status": "failed", "model": "GPT"})
    assert "no step recorded" in Cells(Profile.load(path)._repr_html_()).text
    calm = Profile.load(make_run(tmp_path / "a", peak=24000.0))
    assert "all 36 tensors fit; 1.4 binades left at blocks.1.mlp.fc2.output" in Cells(calm._repr_html_()).text


def test_a_plan_shows_its_rows_and_their_reasons():
    shown = Cells(make_plan(model(2))._repr_html_())
    rows = {row[0]: row for row in shown.rows}
    assert rows["blocks.1.mlp.fc2"] == [
        "blocks.1.mlp.fc2", "fp32", "not fp16: its output reaches 1.0003e5, fp16 ends at 65504"
    ]  # fmt: skip
    assert rows["blocks.{0-1}.ln"][1:] == ["fp32", "no cast to its neighbours"] and rows["default"][1] == "fp16"
    assert "precision plan (predicted)" in shown.text and "loss scale 2¹⁴" in shown.text


def test_long_plans_are_cut_and_say_so():
    plan = PrecisionPlan(modules={f"layer{chr(97 + i % 26)}{i}x": "fp16" for i in range(90)})
    shown = Cells(plan._repr_html_())
    assert len(shown.rows) == 1 + 40 and "and 51 more rows: print(plan) shows all" in shown.text


def test_names_and_reasons_are_text(tmp_path):
    plan = PrecisionPlan(modules={HOSTILE: LayerPrecision("fp16", reasons=("<script>alert(1)</script>",))})
    html = plan._repr_html_()
    assert "<script" not in html and "<img" not in html
    assert "<script>alert(1)</script>" in Cells(html).text
    run = make_run(tmp_path / "a", modules=[(HOSTILE, "Linear", 10, 500)], steps=1, model="<b>x</b>", precision="<i>")
    html = Profile.load(run)._repr_html_()
    assert not re.search(r"<(b|i|img|script)\b", html) and "<b>x</b>" in Cells(html).text
