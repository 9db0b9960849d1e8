"""The command line as a user meets it: real processes, exit codes, one-line errors, 80 columns."""

from __future__ import annotations

import json

import pytest

TASK = """
import torch, precscope as ps
from torch import nn

def make():
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))
    def batch(step):
        g = torch.Generator().manual_seed(step)
        return torch.randn(32, 16, generator=g), torch.randint(0, 4, (32,), generator=g)
    loss = lambda model, b: nn.functional.cross_entropy(model(b[0]), b[1])
    return ps.Task(model=model, loss=loss, batches=batch, eval_batches=[batch(9999)])

def wrong():
    return 42

def raises():
    raise RuntimeError("no data\\nhere")

def nan():
    model = nn.Linear(4, 1)
    return ps.Task(model=model, loss=lambda m, b: m(b).mean(), batches=[torch.full((2, 4), float("nan"))])

def no_parameters():
    return ps.Task(model=nn.ReLU(), loss=lambda m, b: m(b).mean(), batches=[torch.ones(2, 4)])

def bad_loss():
    model = nn.Linear(4, 3)
    return ps.Task(model=model, loss=lambda m, b: m(b), batches=[torch.ones(2, 4)])
"""


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """The console entry in this process: quick, for what does not depend on being a process."""
    from types import SimpleNamespace

    from precscope.cli import main

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["precscope", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.chdir(tmp_path)
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = stop.code or 0
        said = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=said.out, stderr=said.err)

    return run


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "task.py").write_text(TASK)
    return tmp_path


def ok(done):
    assert done.returncode == 0, done.stderr
    tables = [line for line in done.stdout.splitlines() if not line.startswith("next: ")]  # a command is one line
    assert max(map(len, tables), default=0) <= 80, done.stdout
    return done.stdout


def fails(done, status):
    assert done.returncode == status, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stderr


def test_the_whole_loop(precscope_cli, folder):
    out = ok(precscope_cli("profile", "task.py:make", "--steps", 12, "--every", 5, "--out", "a"))
    assert "wrote a" in out and "next: precscope ask a fp16" in out
    out = ok(precscope_cli("ask", "a", "e4m3", "-k", 4, "--role", "output", "--csv", "e4m3.csv"))
    assert "wrote e4m3.csv" in out and (folder / "e4m3.csv").read_text().startswith("module,role,call,count")
    out = ok(precscope_cli("recommend", "a", "--formats", "bf16,fp32", "--out", "plan.json"))
    assert "(predicted)" in out and "next: precscope recommend a --task task.py:make" in out
    assert json.loads((folder / "plan.json").read_text())["schema"] == 1
    out = ok(precscope_cli("recommend", "a", "--task", "task.py:make", "--formats", "bf16,fp32", "--costs", "model"))
    assert "(confirmed)" in out and "next: precscope train task.py:make --plan plan.json" in out
    assert json.loads((folder / "plan.json").read_text())["confirmed"]["passed"] is True
    ok(precscope_cli("train", "task.py:make", "--steps", 12, "--precision", "fp32", "--out", "fp32"))
    out = ok(precscope_cli("train", "task.py:make", "--steps", 12, "--plan", "plan.json", "--out", "plan"))
    assert "next: precscope train task.py:make --precision fp32" in out  # there is no runs/fp32 yet
    out = ok(precscope_cli("compare", "fp32", "plan", "--csv", "t.csv"))
    assert "fp32" in out and "1.00x" in out and (folder / "t.csv").exists()
    ok(precscope_cli("report", "a", "--plan", "plan.json", "--run", "fp32", "--run", "plan", "--out", "r/a.html"))
    assert (folder / "r" / "a.html").read_text().lstrip().lower().startswith("<!doctype html>")
    assert ok(precscope_cli("report", "a", "--plan", "plan.json", "--text"))
    assert "confirmed on 2 batches" in " ".join(
        ok(precscope_cli("report", "a", "--plan", "plan.json", "--text")).split()
    )
    assert precscope_cli("report", "a", "--plan", "plan.json", "--markdown").stdout.startswith("#")


@pytest.mark.parametrize("command", ["demo", "doctor", "profile", "ask", "recommend", "train", "compare", "report"])
def test_every_command_has_help_with_an_example(cli, command):
    out = ok(cli(command, "--help"))
    assert "Example: precscope " + command in " ".join(out.split())


def test_no_arguments_and_version(precscope_cli):
    assert "Commands:" in precscope_cli().stderr
    assert ok(precscope_cli("--version")).strip().count(".") == 2


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["ask", "nowhere", "fp16"], 1, "no run directory at nowhere"),
        (["recommend", "nowhere"], 1, "precscope profile TASK --out"),
        (["compare", "nowhere"], 1, "holds no training run"),
        (["train", "task.py:mak"], 2, "has no function 'mak'; it has make"),
        (["train", "tusk.py:make"], 2, "did you mean task.py"),
        (["train", "gtp"], 2, "did you mean gpt"),
        (["train", "task.py:wrong"], 2, "must return a precscope.Task"),
        (["train", "task.py:raises"], 2, "raised RuntimeError: no data"),
        (["train", "task.py:bad_loss", "--steps", 1], 2, "must return a scalar"),
        (["train", "task.py:no_parameters", "--steps", 1], 2, "no trainable parameter"),
        (["train", "task.py:make", "--precision", "fp12"], 2, "fp12"),
        (["train", "task.py:make", "--plan", "none.json"], 2, "none.json"),
        (["train", "task.py:make", "--steps", "0"], 2, "steps must be"),
        (["profile", "task.py:make", "--out", "/proc/x"], 1, "choose another directory"),
        (["train", "task.py:nan", "--steps", 9, "--out", "n"], 1, "NaN"),
        (["profile", "task.py:nan", "--steps", 9, "--out", "m"], 1, "NaN"),
        (["bogus"], 2, "No such command"),
    ],
)
def test_errors_are_one_line_with_an_exit_status(cli, folder, arguments, status, words):
    said = fails(cli(*arguments), status)
    assert words in " ".join(said.split())
    if "No such command" not in words:
        errors = [line for line in said.splitlines() if line.startswith("error:")]
        assert len(errors) == 1, said


def test_debug_shows_the_traceback(cli, folder):
    done = cli("train", "task.py:wrong", "--debug")
    assert done.returncode == 2 and "Traceback" in done.stderr and "error: " in done.stderr


def test_ask_errors_and_damage(cli, folder):
    ok(cli("profile", "task.py:make", "--steps", 4, "--every", 1, "--out", "a", "--no-costs"))
    assert "did you mean" in fails(cli("ask", "a", "fp61"), 2)
    assert "unknown role" in fails(cli("ask", "a", "fp16", "--role", "x"), 2)
    assert "no column 'x'" in fails(cli("ask", "a", "fp16", "--sort", "x"), 2)
    part = next((folder / "a").glob("stats-*.parquet"))
    (folder / "a" / "stats-000099.parquet").write_bytes(part.read_bytes()[:100])
    assert "--skip-damaged" in fails(cli("ask", "a", "fp16"), 1)
    done = cli("ask", "a", "fp16", "--skip-damaged")
    assert done.returncode == 0 and "left out the damaged part" in done.stderr
    assert "already holds a run" in fails(cli("profile", "task.py:make", "--out", "a"), 2)


def test_a_plan_for_another_model(cli, folder):
    plan = {"schema": 1, "default": {"compute": "fp32"}, "modules": {"encoder.layer": {"compute": "bf16"}}}
    (folder / "other.json").write_text(json.dumps(plan))
    said = fails(cli("train", "task.py:make", "--plan", "other.json", "--steps", 1), 2)
    assert "encoder.layer" in said


def test_doctor(cli):
    out = ok(cli("doctor", "--size", 256))
    for word in ("fp32", "bf16", "fp16", "e4m3", "GFLOP/s", "torch", "next: precscope demo"):
        assert word in out


def test_broken_pipe_is_quiet(cli, folder):
    import subprocess
    import sys
    from pathlib import Path

    root = Path(__file__).parents[1]
    line = f"{sys.executable} -m precscope doctor --size 64 | head -1"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, cwd=root, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr
