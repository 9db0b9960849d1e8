"""The demo on the tiny model, and what it concludes from a table."""

from __future__ import annotations

import pytest

from precscope.comparison import Comparison, RunRow
from precscope.demo import findings, in_words, run
from precscope.progress import Progress

NAN = float("nan")


def row(name: str, speed: float, *, change: float = 0.0, nonfinite: int = 0) -> RunRow:
    return RunRow(
        run=name, precision=name, steps=10, train_loss=1.0, eval_loss=1.0 + change, step_time_ms=1.0, speed=speed,
        eval_change=change, peak_memory_bytes=1.0, skipped_steps=0, nonfinite_steps=nonfinite, low_precision_flops=0.0,
        status="done", note="",
    )  # fmt: skip


def said(bf16: RunRow, *, fp16: float = 0.5, noise: float = 0.0, plan: float = 1.5, change: float = 0.0) -> str:
    rows = (row("fp32", 1.0), bf16, row("fp16", fp16), row("plan", plan, change=change))
    return " ".join(findings(Comparison(rows, "fp32"), noise=noise)[1:])


def test_as_safe_is_said_only_where_it_was_seen():
    assert said(row("bf16", 1.51)) == "Plain bf16 autocast is as fast (1.51 times fp32) and as safe here."
    assert said(row("bf16", 1.51, nonfinite=2)) == (
        "Plain bf16 autocast is as fast (1.51 times fp32), but 2 of its steps were not finite: keep to the plan."
    )
    assert "but its held-out loss is +2.00% from fp32's" in said(row("bf16", 1.51, change=0.02))
    assert "nothing says whether it is as safe" in said(row("bf16", 1.51, change=NAN))
    assert "nothing says whether it is as safe" in said(row("bf16", 1.51), change=NAN)


def test_faster_autocast_is_preferred_where_it_is_safe():
    assert said(row("bf16", 2.0)) == "Plain bf16 autocast was faster (2.00 times fp32) and as safe here: prefer it."
    assert "was faster (2.00 times fp32), but 1 of its steps" in said(row("bf16", 2.0, nonfinite=1))


def test_slower_autocast_is_not_mentioned():
    assert said(row("bf16", 1.4)) == ""


def test_both_are_named_where_the_faster_is_unsafe():
    both = said(row("bf16", 1.5), fp16=1.9)
    assert both.index("fp16 autocast was faster") < both.index("bf16 autocast is as fast")


def test_noise_widens_what_counts_as_alike():
    assert "was faster" in said(row("bf16", 1.6))
    noisy = said(row("bf16", 1.6), noise=0.12)
    assert "vary by 12% within a run here" in noisy and "is as fast (1.60" in noisy
    assert "vary by" not in said(row("bf16", 1.6), noise=0.02)


@pytest.mark.parametrize(("seconds", "words"), [(220.4, "3 min 40 s"), (39.6, "40 s"), (59.9, "1 min 0 s")])
def test_seconds_in_words(seconds, words):
    assert in_words(seconds) == words


def test_a_tiny_demo(tmp_path, capsys):
    with Progress() as progress:
        result = run(
            out=tmp_path / "runs", report=tmp_path / "report" / "index.html", steps=2, size="tiny", progress=progress
        )
    assert [r.run for r in result.comparison.rows] == ["fp32", "bf16", "fp16", "plan"]
    assert all(r.steps == 2 and r.status == "done" for r in result.comparison.rows)
    assert result.report.is_file() and result.plan_path.is_file() and (result.recorded / "cost.parquet").is_file()
    assert result.findings[-1] == f"The demo took {in_words(result.seconds)}."
    notes = capsys.readouterr().err.splitlines()
    assert notes[0] == "timing a few steps"
    assert notes[1] == "about 1 minute: 4 runs of 2 steps, costs of each module, and a report"
    assert sum("measuring what each module costs" in line for line in notes) == 1
