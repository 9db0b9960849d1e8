"""Predicted loss noise against really rounding one tensor at a time: the short form of benchmarks/noise.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import precscope as ps

PATH = Path(__file__).parents[1] / "benchmarks" / "noise.py"


@pytest.fixture(scope="module")
def noise():
    sys.path.insert(0, str(PATH.parent))  # as for a script: its neighbours can be imported
    spec = importlib.util.spec_from_file_location("benchmark_noise", PATH)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(PATH.parent))
    return module


@pytest.fixture(scope="module")
def figures(noise):
    from precscope.training.tasks.gpt import gpt

    torch.manual_seed(0)
    task = gpt("tiny")
    ps.train(task, steps=60, precision="fp32", eval_limit=1)
    task.model.eval()
    case = noise.Case("tiny", task.model, task.loss, [task.batch(10_000 + i) for i in range(8)])
    return noise.judge(noise.measure(case))


@pytest.mark.parametrize("fmt", ["bf16", "fp16", "e4m3"])
def test_predicted_noise_is_calibrated(figures, fmt):
    row = figures[fmt]
    assert row["sites"] > 50  # outputs, inputs made between modules, weights
    assert 0.7 < row["rms"] < 1.4
    assert row["spearman"] > 0.85
    assert row["exact_worst"] < 1e-12  # what is predicted to cost nothing costs nothing


def test_first_order_is_nearly_all_of_it(figures):
    assert figures["e4m3"]["curved"] < 0.3
