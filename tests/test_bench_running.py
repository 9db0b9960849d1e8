"""`precscope bench`: the list, one script with its arguments, all in turn; and the scripts themselves, as far as their
parsers and the arithmetic they share."""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from precscope.bench import BENCHMARKS, Benchmark, running
from precscope.errors import RunError, UsageError

ROOT = Path(__file__).parents[1]
SCRIPTS = {
    path.stem: path for path in sorted((ROOT / "benchmarks").glob("*.py")) if "__main__" in path.read_text("utf-8")
}


@pytest.fixture
def neighbours(monkeypatch):
    """Scripts import their neighbours, as when they are run; what they imported is forgotten again."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if Path(file).parent == ROOT / "benchmarks":
            del sys.modules[name]


def precscope(*arguments, cwd, home=ROOT, timeout=120):
    """The command, imported from the checkout at `home`."""
    return subprocess.run(
        [sys.executable, "-m", "precscope", *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(home)}, timeout=timeout,
    )  # fmt: skip


@pytest.fixture
def checkout(tmp_path):
    """A checkout of this very package with other benchmarks: source of each script by name."""

    def make(**sources):
        (tmp_path / "precscope").symlink_to(ROOT / "precscope", target_is_directory=True)
        if sources:
            (tmp_path / "benchmarks").mkdir()
        for name, source in sources.items():
            (tmp_path / "benchmarks" / f"{name}.py").write_text(source, encoding="utf-8")
        return tmp_path

    return make


WRITES = """
import json, sys
print("the table", *sys.argv[1:])
if "--json" in sys.argv:
    with open(sys.argv[sys.argv.index("--json") + 1], "w") as file:
        json.dump({"schema": 1, "targets": [{"held": True}, {"held": False}], "rows": []}, file)
"""
FAILS = "print('half a table')\nraise ValueError('the disk is on fire')\n"


class TestScripts:
    def test_the_list_and_the_folder_agree(self):
        assert set(SCRIPTS) - {"zoo_answers"} == {name for name, b in BENCHMARKS.items() if b.script}

    @pytest.mark.parametrize("name", SCRIPTS)
    def test_help_and_the_short_setting_are_understood(self, name, neighbours, monkeypatch, capsys):
        if lacking := running.missing(BENCHMARKS.get(name, Benchmark(""))):
            pytest.skip(f"needs {', '.join(lacking)}")
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(SCRIPTS[name]), run_name="__main__")
        assert not stopped.value.code and "usage:" in capsys.readouterr().out
        if name not in BENCHMARKS:
            return

        class Parsed(Exception):
            """Its arguments were understood; the benchmark itself is not run here."""

        def parse(self, given=None, namespace=None):
            raise Parsed(vars(parse_args(self, given, namespace)))

        parse_args = argparse.ArgumentParser.parse_args
        output = [word.format(stem="there") for word in BENCHMARKS[name].output]
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
        monkeypatch.setattr(sys, "argv", [name, *BENCHMARKS[name].quick, *output])
        with pytest.raises(Parsed) as parsed:
            runpy.run_path(str(SCRIPTS[name]), run_name="__main__")
        assert str(parsed.value.args[0][output[0].removeprefix("--")]) == output[1]


class TestCommand:
    def test_what_is_run(self, monkeypatch):
        monkeypatch.setitem(BENCHMARKS, "startup", Benchmark("x", quick=("--runs", "2")))
        assert running.command("startup", ["--quick", "--json", "a"]) == [
            sys.executable, str(ROOT / "benchmarks" / "startup.py"), "--runs", "2", "--json", "a",
        ]  # fmt: skip
        assert running.command("zoo", [])[1:] == ["-m", "precscope", "bench", "zoo"]

    def test_errors(self, monkeypatch):
        with pytest.raises(
            UsageError, match=r"no benchmark 'quantise' \(did you mean quantize.*; there are zoo, recor"
        ):
            running.command("quantise", [])
        monkeypatch.setitem(BENCHMARKS, "startup", Benchmark("x", needs=("no_such_package", "json")))
        with pytest.raises(RunError, match="benchmark startup needs no_such_package: install it"):
            running.command("startup", [])

    def test_without_a_checkout(self, checkout):
        home = checkout()
        done = precscope("bench", "shadow", cwd=home, home=home)
        assert done.returncode == 1 and "installed without it: run the command in a checkout" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert precscope("bench", cwd=home, home=home).stdout.startswith("zoo: ")

    def test_arguments_and_status_pass_through(self, checkout):
        home = checkout(recorder=WRITES, shadow="import sys\nprint(sys.argv[1:])\nsys.exit(3)\n")
        done = precscope("bench", "shadow", "--help", "--steps", 3, "x", cwd=home, home=home)
        assert done.returncode == 3 and done.stdout == "['--help', '--steps', '3', 'x']\n" and not done.stderr

    def test_all_goes_on_after_a_failure(self, checkout):
        home = checkout(recorder=WRITES, shadow=FAILS, gpu=WRITES)
        names = ("recorder", "shadow", "gpu", "oplevel", "recorder")
        (home / "out").mkdir()
        (home / "out" / "shadow.json").write_text("of an earlier run")
        done = precscope(
            "bench", "all", "--out", "out", *(w for n in names for w in ("--only", n)), cwd=home, home=home
        )
        assert done.returncode == 1, done.stdout + done.stderr
        rows = {row["name"]: row for row in json.loads((home / "out" / "bench.json").read_text())["rows"]}
        assert list(rows) == ["recorder", "shadow", "gpu", "oplevel"]
        good, bad, gpu, absent = rows.values()
        assert (good["status"], good["held"], good["targets"], good["json"]) == ("done", 1, 2, "recorder.json")
        assert (home / "out" / "recorder.txt").read_text() == "the table --json out/recorder.json\n"
        assert (bad["status"], bad["exit_status"], bad["json"]) == ("failed", 1, None)
        assert bad["reason"] == "ValueError: the disk is on fire"
        text = (home / "out" / "shadow.txt").read_text()
        assert text.startswith("half a table\n\nexit status 1\nTraceback") and text.endswith("on fire\n")
        assert absent["status"] == "failed" and "oplevel.py does not exist" in absent["reason"]
        import torch

        if not torch.cuda.is_available():
            assert gpu["status"] == "skipped" and gpu["reason"] == "there is no CUDA device"
        assert "recorder  " in done.stdout and "done, 1 of 2 targets held" in done.stdout
        assert done.stdout.endswith("wrote out/bench.json\n") and "shadow: failed in 0 s: ValueError" in done.stderr

    def test_wrong_use(self, tmp_path):
        done = precscope("bench", "all", "--only", "speed", "--out", "x", cwd=tmp_path)
        assert done.returncode == 2 and "no benchmark 'speed'" in done.stderr and not (tmp_path / "x").exists()
        (tmp_path / "file").write_text("")
        done = precscope("bench", "all", "--only", "startup", "--out", "file/x", cwd=tmp_path)
        assert done.returncode == 1 and "choose another folder with --out" in done.stderr


@pytest.mark.slow
class TestForReal:
    def test_all_of_two(self, tmp_path):
        done = precscope(
            "bench", "all", "--quick", "--only", "oplevel", "--only", "startup", "--out", "b", cwd=tmp_path
        )
        assert done.returncode == 0, done.stdout + done.stderr
        figures = json.loads((tmp_path / "b" / "oplevel.json").read_text())
        assert figures["schema"] == 1 and figures["benchmark"] == "oplevel" and figures["versions"]["torch"]
        (row,) = figures["rows"]
        assert row["ops"] > 50 and row["quartiles"][0] <= row["ratio"] <= row["quartiles"][1]
        assert "recorded / plain" in (tmp_path / "b" / "oplevel.txt").read_text()
        assert len(json.loads((tmp_path / "b" / "startup.json").read_text())["rows"]) == 4

    def test_quantize_counts_no_mismatch_of_ours(self, tmp_path):
        pytest.importorskip("gfloat")
        pytest.importorskip("ml_dtypes")
        done = precscope("bench", "quantize", "--quick", "--json", "q.json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        rows = json.loads((tmp_path / "q.json").read_text())["rows"]
        ours = [row for row in rows if row["contender"].startswith("precscope")]
        assert len(ours) == 8 and not any(row["mismatches"] for row in ours)
        (cast,) = (row for row in rows if (row["contender"], row["format"]) == ("torch cast", "e4m3"))
        assert cast["mismatches"] > 0 == cast["wrong_values_in_range"]


@pytest.fixture
def common(neighbours):
    import common

    return common


class TestShared:
    def test_spread(self, common):
        found = common.spread([3.0, 1.0, 2.0, 5.0, 4.0])
        assert (found.low, found.median, found.high, found.count) == (2.0, 3.0, 4.0, 5)
        assert common.spread([7.0]).high == 7.0

    def test_turns(self, common):
        orders = list(common.turns("abc", 50))
        assert all(sorted(order) == ["a", "b", "c"] for order in orders)
        assert orders == list(common.turns("abc", 50)) and len({order[0] for order in orders}) == 3

    def test_targets_and_json(self, common, tmp_path, capsys):
        targets = [common.Target("a", 1.5, 1.4), common.Target("b", 12, 10, at_least=True)]
        common.check(targets)
        assert capsys.readouterr().out.splitlines() == [
            "target, a: 1.5, asked at most 1.4: MISSED", "target, b: 12, asked at least 10: held",
        ]  # fmt: skip
        common.write_json(tmp_path / "deep" / "x.json", "x", [{"a": 1}], targets=targets, steps=3)
        content = json.loads((tmp_path / "deep" / "x.json").read_text())
        assert [t["held"] for t in content["targets"]] == [False, True] and content["steps"] == 3
        assert content["rows"] == [{"a": 1}] and content["machine"]["threads"] >= 1
        common.write_json(None, "x", [])

    def test_held_targets_are_counted_and_a_torn_file_has_none(self, common, tmp_path):
        common.write_json(tmp_path / "x.json", "x", [], targets=[common.Target("a", 1.0, 1.4)])
        assert running._targets(tmp_path / "x.json") == (1, 1)
        judged = [{"status": "met"}, {"status": "missed"}, {"status": "not measured"}]  # of gpu.py
        (tmp_path / "x.json").write_text(json.dumps({"targets": judged}))
        assert running._targets(tmp_path / "x.json") == (1, 2)
        (tmp_path / "x.json").write_text('{"targets": [{"he')
        assert running._targets(tmp_path / "x.json") == running._targets(tmp_path / "none.json") == (0, 0)

    def test_recorded_steps_count_one_in_every(self, neighbours):
        import peers

        base = [peers.Step(2.0, 1.0)] * 4
        every_1 = [peers.Step(3.0, 1.0, bookkeeping=0.4, recorded=True)] * 4
        others = [peers.Step(2.2, 1.0, bookkeeping=0.02)] * 3 + [peers.Step(3.0, 1.0, bookkeeping=9.0, recorded=True)]
        row = peers.weighted(SimpleNamespace(times=every_1, every=1, recorder=object()), base, every_1)
        assert row["ratio"] == pytest.approx(1.5 + 0.2) and row["of_which_flushes"] == pytest.approx(0.2)
        row = peers.weighted(SimpleNamespace(times=others, every=10, recorder=object()), base, every_1)
        assert row["ratio"] == pytest.approx((1.5 + 9 * 1.1) / 10 + (0.4 + 9 * 0.02) / 10 / 2)
        assert peers.weighted(SimpleNamespace(times=base, every=1, recorder=None), base, base)["ratio"] == 1

    @pytest.mark.parametrize("every", [1, 10, 100])
    @pytest.mark.parametrize("steps", [2, 9, 20, 100])
    def test_a_recorded_step_is_timed(self, neighbours, every, steps):
        import peers

        timed = range(peers.first_step(every, steps) + peers.WARM_UP, peers.first_step(every, steps) + 2 + steps)
        assert timed.start >= 0 and any(step % every == 0 for step in timed)
