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

def ranked():
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)).eval()
    def batch(step):
        return (torch.randn(32, 16, generator=torch.Generator().manual_seed(step)),)
    return ps.Task(model=model, loss=lambda m, b: m(*b).square().mean(), batches=batch, forward=lambda m, b: m(*b))

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

    def run(*arguments, columns=80):
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


@pytest.mark.parametrize("command", [
    "demo", "doctor", "profile", "ask", "recommend", "forecast", "train", "compare", "trace", "report", "bench",
    "bench zoo",
])  # fmt: skip
def test_every_command_has_help_with_an_example(cli, command):
    out = ok(cli(*command.split(), "--help"))
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
        (["profile", "task.py:make", "--shadow-every", "often"], 2, "--shadow-every takes a number of steps"),
        (["profile", "task.py:make", "--shadow-every", "0"], 2, "shadow_every must be a number of steps of at least 1"),
        (["train", "task.py:make", "--shadow-every", "0"], 2, "shadow_every must be an integer of at least 1"),
        (["profile", "task.py:make", "--infer", "--lr", "0.1"], 2, "--lr is for training: leave it out"),
        (["profile", "task.py:make", "--infer", "--accumulate", "2"], 2, "--accumulate is for training"),
        (["ask", "nowhere", "fp16", "--ops"], 1, "no run directory at nowhere"),
        (["forecast", "nowhere", "fp16"], 1, "no run directory at nowhere"),
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


def rows_of(out: str) -> list[list[str]]:
    """Rows of the first table printed."""
    lines = out.splitlines()
    rule = next(i for i, line in enumerate(lines) if line.startswith("---"))
    return [line.split() for line in lines[rule + 1 :]]


@pytest.mark.parametrize(("said", "steps"), [("auto", {0, 4, 8}), ("6", {0, 6}), ("none", set())])
def test_shadow_steps_are_as_asked(cli, folder, said, steps):
    from precscope.profiles import Profile

    ok(cli("profile", "task.py:make", "--steps", 10, "--every", 2, "--shadow-every", said, "--out", "a", "--no-costs"))
    run = Profile.load(folder / "a")
    assert set(run.shadow.steps if run.shadow is not None else ()) == steps
    assert ("noise" in ok(cli("ask", "a", "bf16"))) == bool(steps)


def test_train_with_shadow_steps_records_what_precision_did(cli, folder):
    from precscope.profiles import Profile

    ok(cli("train", "task.py:make", "--precision", "bf16", "--steps", 6, "--shadow-every", 3, "--out", "t"))
    run = Profile.load(folder / "t")
    assert run.shadow.steps == [0, 3] and set(run.truth.step) == {0, 3}
    assert (run.truth.cosine > 0.99).all()


def test_ask_about_ops(cli, folder):
    from precscope.opstore import load_ops

    ok(cli("profile", "task.py:make", "--steps", 3, "--every", 1, "--out", "a", "--no-costs", "--ops"))
    out = ok(cli("ask", "a", "e4m3", "--ops", "-k", 4, "--sort", "flushed", "--rows", 5, "--csv", "ops.csv"))
    table = load_ops(folder / "a").ask("e4m3", scale_exponent=4)
    rows = rows_of(out)[:5]
    assert f"the first 5 of {len(table)} ops" in out and all(row[1] in ("fwd", "bwd") for row in rows)
    shares = [float(row[5]) for row in rows]
    worst = 100 * table.flushed.sort_values(ascending=False).head(5)
    assert shares == pytest.approx(worst.tolist(), rel=1e-3) and shares[0] > 0
    gelu = next(
        row for row in rows_of(ok(cli("ask", "a", "fp16", "--ops", "--rows", 0))) if row[:3] == ["1", "fwd", "gelu"]
    )
    assert float(gelu[3]) == pytest.approx(table[table.op == "gelu"].amax.item(), rel=1e-3)
    text = (folder / "ops.csv").read_text()
    assert text.startswith("module,phase,op,index,dtype,count") and len(text.splitlines()) == len(table) + 1
    assert "--role does not go with --ops" in fails(cli("ask", "a", "fp16", "--ops", "--role", "output"), 2)
    assert "--by does not go with --ops" in fails(cli("ask", "a", "fp16", "--ops", "--by", "module"), 2)
    assert "no column 'loss_noise'" in fails(cli("ask", "a", "fp16", "--ops", "--sort", "loss_noise"), 2)


def test_ask_about_ops_that_were_not_recorded(cli, folder):
    ok(cli("profile", "task.py:make", "--steps", 2, "--every", 1, "--out", "a", "--no-costs", "--no-ops"))
    said = fails(cli("ask", "a", "fp16", "--ops"), 1)
    assert "a holds no op-level records: record them with precscope profile TASK --ops --out DIR" in said
    assert "did you mean" in fails(cli("ask", "a", "fp61", "--ops"), 2)


def test_forecast(cli, folder):
    from precscope.advice.forecast import forecast
    from precscope.profiles import Profile

    ok(
        cli(
            "profile", "task.py:make", "--steps", 12, "--every", 1, "--out", "a", "--no-costs", "--shadow-every", "none"
        )
    )
    out = ok(cli("forecast", "a", "fp16", "--csv", "f.csv"))
    table = forecast(Profile.load(folder / "a"), "fp16")
    assert out.startswith("fp16 (largest finite value 65504), the next 11 steps\n")
    assert "next: precscope recommend a --horizon 11" in out
    shown = {row[0]: float(row[1]) for row in rows_of(out)[: len(table)]}
    assert shown["0.output"] == pytest.approx(
        table[(table.module == "0") & (table.role == "output")].amax_now.item(), rel=1e-3
    )
    assert len((folder / "f.csv").read_text().splitlines()) == len(table) + 1
    far = ok(cli("forecast", "a", "e2m1", "--horizon", 100, "--role", "grad_weight", "--rows", 2))
    assert "the next 100 steps" in far and all(".grad_weight" in row[0] for row in rows_of(far)[:2])
    assert "horizon must be 1 step or more" in fails(cli("forecast", "a", "fp16", "--horizon", 0), 2)
    assert "unknown role" in fails(cli("forecast", "a", "fp16", "--role", "x"), 2)


def test_forecast_from_too_few_steps_says_so(cli, folder):
    ok(cli("profile", "task.py:make", "--steps", 3, "--every", 1, "--out", "a", "--no-costs", "--shadow-every", "none"))
    out = " ".join(ok(cli("forecast", "a", "fp16")).split())
    assert "one needs 8 recorded steps or more" in out


def test_an_inference_run_can_be_confirmed(cli, folder):
    """From the recording of a model that is only run to its confirmed plan and report; nobody is told to train it."""
    out = ok(
        cli("profile", "task.py:ranked", "--infer", "--steps", 4, "--every", 1, "--out", "a", "--precision", "fp32")
    )
    assert "next: precscope ask a fp16, or precscope recommend a --task task.py:ranked" in out
    run = json.loads((folder / "a" / "run.json").read_text())
    assert run["mode"] == "inference"
    out = ok(cli("recommend", "a", "--task", "task.py:ranked", "--formats", "bf16,fp32", "--costs", "model"))
    assert "(confirmed)" in out and "next: precscope report a --plan plan.json" in out
    out = ok(cli("report", "a", "--plan", "plan.json", "--text"))
    assert "confirmed on" in " ".join(out.split()) and "ps.apply" in out and "precscope train" not in out


@pytest.mark.parametrize("columns", [60, 80])
def test_tables_keep_within_the_terminal(cli, folder, columns):
    ok(cli("profile", "task.py:make", "--steps", 9, "--every", 1, "--out", "a", "--no-costs"))
    ok(cli("recommend", "a", "--formats", "bf16,fp32", "--costs", "model"))
    commands = [
        ["ask", "a", "e4m3"], ["ask", "a", "e4m3", "--ops"], ["forecast", "a", "fp16"],
        ["report", "a", "--plan", "plan.json", "--text"], ["profile", "--help"],
    ]  # fmt: skip
    for command in commands:
        out = cli(*command, columns=columns).stdout
        lines = [line for line in out.splitlines() if not line.startswith(("next: ", "  precscope "))]
        assert lines and max(map(len, lines)) <= columns, (command, out)


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
