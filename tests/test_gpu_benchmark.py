"""benchmarks/gpu.py: what it makes of results, and a rehearsal on the CPU."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def modules(monkeypatch):
    """gpu.py and its parts, as the script imports them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name == "gpu" or name.startswith("gpu_parts"):
            del sys.modules[name]


def content(**parts: dict) -> dict:
    """As of a run on a GPU that nobody has."""
    return {
        "rehearsal": False, "command": "python benchmarks/gpu.py", "commit": None, "training_steps": 3,
        "machine": {"device": "Imagined GPU"}, "versions": {"torch": "0", "scipy": None},
        "gpt": {"layers": 1, "width": 1, "heads": 1, "context": 1, "batch": 1, "vocabulary": 1},
        "parts": {name: {"seconds": 1.0, "result": found} for name, found in parts.items()},
    }  # fmt: skip


def steps(**ms: float) -> dict:
    return {name: {"ms": t, "low_ms": t, "high_ms": t, "tokens_per_second": 1.0, "runs": []} for name, t in ms.items()}


def recorded(every: int, ratio: float) -> dict:
    return {"precision": "bf16", "every": every, "ratio": ratio, "plain_ms": 1.0, "ms": ratio, "floor_ratio": 1.0,
            "bytes_of_a_recorded_step": 1, "plain_spread": 0.0}  # fmt: skip


def kernel(name: str, megabytes: float, share: float) -> dict:
    return {"kernel": name, "dtype": "bf16", "megabytes": megabytes, "share": share, "ms": 1.0, "floor_ms": share,
            "timed": "graph"}  # fmt: skip


def statuses(modules, found: dict) -> dict[str, str]:
    return {t["what"]: t["status"] for t in modules("gpu_parts.targets").targets(found)}


def test_without_results_nothing_is_judged(modules):
    assert set(statuses(modules, content()).values()) == {"not measured"}


def test_targets_are_computed_from_the_results(modules):
    found = statuses(modules, content(
        correctness={"mismatches": {"a": 0, "b": 0}, "errors": {}},
        recorder={"rows": [recorded(1, 1.25), recorded(10, 1.03)]},
        kernels={"rows": [kernel("accumulate", 1, 0.1), kernel("accumulate", 16, 0.81), kernel("accumulate", 64, 0.9),
                          kernel("accumulate_update", 16, 0.9), kernel("accumulate_update", 64, 0.79)]},
    ))  # fmt: skip
    judged = {what: status for what, status in found.items() if status != "not measured"}
    assert judged == {
        "mismatches and errors of kernels, formats and 8-bit products against the CPU": "met",
        "recorder, bf16, every=1, over unwatched steps": "met",
        "recorder, bf16, every=10, over unwatched steps": "missed",
        "accumulate: least share of copy bandwidth from 16 MB on": "met",
        "accumulate_update: least share of copy bandwidth from 16 MB on": "missed",
    }


@pytest.mark.parametrize(("mismatches", "errors", "status"), [
    ({"a": 0}, {"b": "it raised"}, "missed"), ({"a": 3}, {}, "missed"), ({"a": 0}, {}, "met"),
])  # fmt: skip
def test_a_check_that_raised_is_no_check_that_passed(modules, mismatches, errors, status):
    found = statuses(modules, content(correctness={"mismatches": mismatches, "errors": errors}))
    assert next(iter(found.values())) == status


@pytest.mark.parametrize("wrong", [0, 2])
def test_a_part_that_ended_early_has_met_nothing(modules, wrong):
    found = content(
        correctness={"mismatches": {"a": wrong}, "errors": {}},
        kernels={"rows": [kernel("accumulate", 16, 0.9), kernel("accumulate_update", 16, 0.7)]},
    )
    for part in found["parts"].values():
        part["error"] = "a fault of the device"
    judged = {what: status for what, status in statuses(modules, found).items() if status != "not measured"}
    first = "mismatches and errors of kernels, formats and 8-bit products against the CPU"
    late = {"accumulate_update: least share of copy bandwidth from 16 MB on": "missed"}
    assert judged == ({first: "missed"} if wrong else {}) | late


@pytest.mark.parametrize(("plan_ms", "plan_loss", "status"), [
    (9.0, 2.0, "met"), (9.5, 2.0, "missed"), (9.0, 2.1, "missed"), (8.0, 1.9, "met"), (8.0, None, "not measured"),
])  # fmt: skip
def test_a_plan_must_match_the_faster_autocast_at_equal_loss(modules, plan_ms, plan_loss, status):
    runs = {"fp16": {"eval_loss": 2.0}, "bf16": {"eval_loss": 3.0}, "plan": {"eval_loss": plan_loss}}
    part = {"in_turn": {"steps": steps(fp16=9.0, bf16=10.0, plan=plan_ms)}, "runs": runs}
    assert statuses(modules, content(training=part))["plan: time per step over the faster autocast's"] == status


def test_a_rehearsal_is_never_judged(modules):
    found = content(recorder={"rows": [recorded(1, 1.0)]}) | {"rehearsal": True}
    assert set(statuses(modules, found).values()) == {"not measured"}


class Page(HTMLParser):
    """Texts and tags of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags = "", []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_the_report_holds_what_was_found_and_what_failed(modules, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    found = content(recorder={"rows": [recorded(1, 1.5)]})
    found["parts"]["kernels"] = {"seconds": 2.0, "error": "a <fault> of the device"}
    found["targets"] = modules("gpu_parts.targets").targets(found)
    modules("gpu_parts.page").write_report(found, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "# precscope on Imagined GPU" in text and "ehearsal" not in text
    assert "| recorder, bf16, every=1, over unwatched steps | at most 1.25 | 1.5 | missed |" in text
    assert "a <fault> of the device" in text and "![What a recorder adds" in text
    page = Page((tmp_path / "index.html").read_text())
    assert "a <fault> of the device" in page.text
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 1 and images[0].startswith("data:image/png;base64,")
    assert [p.name for p in tmp_path.glob("*.png")] == ["overhead.png"]
    assert not any("src" in a and not a["src"].startswith("data:") for _, a in page.tags)


def test_a_part_that_takes_too_long_is_cut_off_and_keeps_what_it_had(modules, tmp_path):
    options = argparse.Namespace(out=tmp_path, device="cpu", size="tiny", steps=2, quick=True)
    part = modules("gpu").run_part("kernels", 0.3, options)
    assert part["error"] == "cut off after 0 s; what it had found is kept"
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_it_says_how_to_rehearse(modules, monkeypatch, capsys):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert modules("gpu").main() == 2
    assert "--device cpu --size tiny --out DIR rehearses" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu"])
    assert modules("gpu").main() == 2
    assert "a rehearsal needs --out DIR" in capsys.readouterr().out


@pytest.mark.slow
def test_a_rehearsal_writes_results_and_report(tmp_path):
    settings = ["--device", "cpu", "--size", "tiny", "--steps", "2", "--quick", "--out", str(tmp_path)]
    parts = ["correctness", "kernels", "matmuls", "advice", "training"]
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *settings, "--parts", *parts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=570, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["schema"] == 1 and found["benchmark"] == "gpu" and found["rehearsal"]
    assert all("error" not in part for part in found["parts"].values())
    assert set(found["parts"]["correctness"]["result"]["mismatches"].values()) == {0}
    runs = found["parts"]["training"]["result"]["runs"]
    assert {"fp32", "bf16", "plan", "plan with fp8", "all e4m3"} <= set(runs)
    assert all(len(run["losses"]) == 2 for run in runs.values())
    assert set(found["parts"]["training"]["result"]["in_turn"]["steps"]) == set(runs)
    assert {t["status"] for t in found["targets"]} == {"not measured"}
    for name in ("README.md", "index.html"):
        assert "No figure on this page says anything about a GPU" in (tmp_path / name).read_text()
    assert (tmp_path / "plan.json").exists() and not list(tmp_path.glob(".*"))
