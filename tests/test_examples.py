"""Each script of examples/ runs and prints the figures that it is there to show."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def output_of(name: str, folder: Path) -> str:
    """What the script prints, run as a script in this process, which has torch imported; warnings are errors here."""
    said = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(said), mock.patch.object(sys, "argv", [name]):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert not list(folder.iterdir()), "an example leaves nothing behind"
    return said.getvalue()


def test_an_example_runs_by_itself(tmp_path):
    """As its docstring says, in a process that has nothing imported."""
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    script = str(EXAMPLES / "fp64_reference.py")
    done = subprocess.run([sys.executable, "-W", "error", script], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, timeout=250)  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    assert "units of 2^-24" in done.stdout and not done.stderr


def number(pattern: str, text: str) -> float:
    """The number that `pattern` captures."""
    found = re.search(pattern, text, re.MULTILINE)
    assert found, f"{pattern!r} is not in:\n{text}"
    return float(found[1])


def losses(text: str) -> dict[str, float]:
    """First words of a line -> the loss on it."""
    found = re.findall(r"^(.*?)\s+(?:held-out )?loss ([\d.]+|nan)\b", text, re.MULTILINE)
    return {words.strip(): float(loss) for words, loss in found}


def test_fp16_master_weights(tmp_path):
    text = output_of("fp16_master_weights", tmp_path)
    loss = losses(text)
    assert loss["fp16, master weights, dynamic scale"] == pytest.approx(loss["fp32"], rel=0.05)
    assert loss["the trainer's precision='fp16'"] < 2 * loss["fp32"]
    assert loss["fp16, master weights, no scale"] > 5 * loss["fp32"]
    assert number(r"(\d+)% of gradients are 0", text) > 90
    assert 20 < number(r"scale 2\^(\d+)", text) < 40 and number(r"skipped (\d+)", text) > 0


def test_gradient_accumulation(tmp_path):
    text = output_of("gradient_accumulation", tmp_path)
    rows = {int(n): (float(a), float(b)) for n, a, b in re.findall(r"^\s*(\d+)\s+(-[\d.]+)\s+(-[\d.]+)$", text, re.M)}
    assert set(rows) == {32, 256, 1024}
    assert rows[32][1] == pytest.approx(rows[32][0], rel=0.02)
    assert rows[1024][0] == pytest.approx(rows[32][0], rel=0.1)  # the mean stays what it was
    assert 0.2 < rows[1024][1] / rows[1024][0] < 0.6  # a sum of 256 to 512 contributions over 1024
    assert number(r"bf16: needs an fp32 accumulator, off by ([\d.]+)%", text) > 40
    assert number(r"fp16: survives, off by ([\d.]+)%", text) < 2
    assert "params fp32: 1024 backward passes a step add up in the gradient of" in text


def test_half_training(tmp_path):
    text = output_of("half_training", tmp_path)
    loss = losses(text)
    assert loss["model.half()"] != loss["model.half()"]  # NaN
    assert loss["fp32"] < 0.5 and loss["with the plan"] == pytest.approx(loss["fp32"], rel=0.02)
    assert "module 'norm', op aten.pow" in text
    assert "norm: compute fp32, params fp32: not fp16: measured" in text
    told = " ".join(text.split())
    assert "inner: compute fp32, params fp32" in told and "eps=1e-08 is itself 0 in fp16" in told


def test_fp64_reference(tmp_path):
    text = output_of("fp64_reference", tmp_path)
    healthy, cancelling = text.split("a variance by subtraction")
    assert number(r"output   worst \S+: ([\d.]+)", healthy) < 100
    assert number(r"gradient worst \S+: ([\d.]+)", healthy) < 300
    assert number(r"output   worst variance: ([\d.]+)", cancelling) > 10_000
    assert number(r"output .* best inner: ([\d.]+)", cancelling) < 20
    assert number(r"off by (\d+) times its value", cancelling) > 1


def test_three_phases(tmp_path):
    text = output_of("three_phases", tmp_path)
    assert "computed in: 60 steps of fp16, then 20 steps of fp32, then 40 steps of fp16" in text
    assert number(r"into fp32 at step 60: .* within ([\d.]+)", text) < 0.02
    assert number(r"back to fp16 at step 80: .* within ([\d.]+)", text) < 0.02
    loss = losses(text)
    assert loss["three phases"] == pytest.approx(loss["fp32"], rel=0.02)
    scale = {int(s): float(x) for x, s in re.findall(r"([\d.]+) from step (\d+)", text)}
    assert scale[0] == 2**14 and scale[80] == scale[50] == 2**16  # it goes on from where it was


def test_alternating_inference(tmp_path):
    text = output_of("alternating_inference", tmp_path)
    assert "alternating: float16, float32, float16, float32, float16, float32" in text
    row = r"^{} +relative error (\S+) +same class at ([\d.]+)% of 512 +weights (\d+) bytes"
    found = {n: re.search(row.format(n), text, re.M) for n in ("fp32", "alternating", "fp16")}
    error = {n: float(m[1]) for n, m in found.items()}
    assert error["fp32"] == 0 < error["alternating"] < 2e-3 and 0 < error["fp16"] < 2e-3
    assert float(found["alternating"][2]) > 98 and float(found["fp32"][2]) == 100
    stored = {n: int(m[3]) for n, m in found.items()}
    assert stored["fp16"] * 2 == stored["fp32"] and stored["fp16"] < stored["alternating"] < stored["fp32"]


def test_stalled_updates(tmp_path):
    text = output_of("stalled_updates", tmp_path)
    assert number(r"told beforehand: .* (\d+)% of their energy", " ".join(text.split())) > 80
    loss = {k.replace("bf16, ", ""): v for k, v in losses(text).items()}
    assert loss["fp32"] < 0.7 * loss["untrained"]  # it learns
    assert loss["nearest"] == pytest.approx(loss["untrained"], rel=0.05)  # it does not
    for updates in ("stochastic", "kahan", "master"):
        assert loss[updates] == pytest.approx(loss["fp32"], rel=0.01)


@pytest.mark.slow
def test_automatic_choice(tmp_path):
    text = output_of("automatic_choice", tmp_path)
    choice = re.search(r"^choice: (\w+), 4 micro-batches per step", text, re.M)[1]
    rows = re.findall(r"^(\w+) +([\d.]+) +\(.*?\).* (yes|no)$", text, re.M)
    safe = {name: float(ms) for name, ms, may in rows if may == "yes"}
    fastest = min(safe, key=safe.__getitem__)
    assert choice == (fastest if safe[fastest] * 1.02 < safe["fp32"] else "fp32")
    assert "--accumulate 4 --steps 60" in text and "4 x 4 sequences" in text
    assert number(r"held-out loss ([\d.]+)", text) < 5.2  # of ln(256) = 5.55 at the start


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.stem)
def test_every_example_is_a_lesson(path):
    """Short, with a docstring that says how it is run, in the table, and with a test of its own here."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    assert f"python examples/{path.name}" in ast.get_docstring(ast.parse(text))
    assert f"`{path.name}`" in (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert f"test_{path.stem}" in globals()


def test_three_lines(tmp_path):
    text = output_of("three_lines", tmp_path)
    loss = losses(text)
    assert loss["fp16 autocast"] != loss["fp16 autocast"]  # NaN
    assert loss["with the plan"] == pytest.approx(loss["fp32"], rel=0.05)
    assert "module '0' reaches" in text and "0: fp32, 1: fp16, 2: fp16, 3: fp16, 4: fp16" in text


def test_lbfgs_closure(tmp_path):
    text = output_of("lbfgs_closure", tmp_path)
    loss = {k: float(v) for k, v in re.findall(r"^(.*?) +loss (\S+) in \d+ steps", text, re.M)}
    assert loss["bf16"] > 5 * loss["bf16, then fp32"] and loss["bf16, then fp32"] < 10 * loss["fp32"]
    assert "the same: True" in text and number(r"step 5: (\d+) passes", text) > 2


def test_gan_two_models(tmp_path):
    text = output_of("gan_two_models", tmp_path)
    assert "unwatched the same: True" in text and "g.0: bf16" in text and "d.4: bf16" in text
    assert number(r"^fp32 +off the ring by ([\d.]+)", text) < 0.3
    assert number(r"^with it +off the ring by ([\d.]+)", text) < 0.4


def test_lightning_trainer(tmp_path):
    pytest.importorskip("lightning")
    text = output_of("lightning_trainer", tmp_path)
    assert "areas: fp32, head.0: fp16, head.1: fp16, head.2: fp16" in text
    assert number(r"recorded +([\d.]+)% right", text) > 90
    assert number(r"with PlanPrecision +([\d.]+)% right", text) > 90
    assert number(r"all of it in fp16 +([\d.]+)% right", text) < 70


def test_fabric_loop(tmp_path):
    pytest.importorskip("lightning")
    text = output_of("fabric_loop", tmp_path)
    loss = {k: float(v) for k, v in re.findall(r"^(.*?) +relative loss (\S+)", text, re.M)}
    assert loss["fp32"] < 0.3 and loss["fp16, no loss scale"] > 0.9
    assert loss["fp16, scale 2^16"] == pytest.approx(loss["fp32"], rel=0.05)


def test_huggingface_trainer(tmp_path):
    pytest.importorskip("transformers"), pytest.importorskip("accelerate")
    text = output_of("huggingface_trainer", tmp_path)
    assert "recorded 6 of 60 optimizer steps, in bf16" in text
    assert number(r"^bf16=True +accuracy ([\d.]+)", text) > 0.95
    assert number(r"^with the plan +accuracy ([\d.]+)", text) > 0.95


def test_accelerate_loop(tmp_path):
    pytest.importorskip("accelerate")
    text = output_of("accelerate_loop", tmp_path)
    loss = {k: float(v) for k, v in re.findall(r"^(.*?) +relative loss (\S+)", text, re.M)}
    assert "100% of a layer's gradients" in text and loss["plan, no loss scale"] > 0.8
    assert loss["plan, scale 2^16"] == pytest.approx(loss["fp32"], rel=0.05)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # keras with numpy 2
def test_keras_mixed_precision(tmp_path):
    os.environ.setdefault("KERAS_BACKEND", "torch")
    pytest.importorskip("keras"), pytest.importorskip("sklearn")
    right = dict(
        re.findall(r"^(\S.*?) +held-out accuracy ([\d.]+)%", output_of("keras_mixed_precision", tmp_path), re.M)
    )
    assert float(right["the plan's map"]) > 85
    assert float(right["the plan's map"]) == pytest.approx(float(right["mixed_bfloat16"]), abs=2)


def test_plan_elsewhere(tmp_path):
    pytest.importorskip("torchao")
    text = output_of("plan_elsewhere", tmp_path)
    assert "weights equal bit for bit after 6 steps: True" in text and "0 imports of precscope" in text


def test_loggers(tmp_path):
    text = output_of("loggers", tmp_path)
    assert number(r"told (\d) loggers", text) >= 1 and "losses equal those of an unwatched run: True" in text


def test_bundled_tasks(tmp_path):
    pytest.importorskip("sklearn")
    text = output_of("bundled_tasks", tmp_path)
    assert all(re.search(rf"^{name} +[\d.]+ to [\d.]+ ", text, re.M) for name in ("gpt", "moe", "towers"))
