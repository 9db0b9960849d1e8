"""Forty architectures and more: watching each changes nothing and misses nothing, plans apply, train and come off.

By default a varied dozen is checked; the rest is marked slow and runs in benchmarks/compatibility.py, too, which writes
docs/compatibility.md. Below are the kinds of faults that the first run of it found, each without the model that had it.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import architectures
import pytest
import torch
from architecture_checks import check
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import precscope as ps

ARCHITECTURES = architectures.ARCHITECTURES
TABLE = Path(__file__).parents[1] / "docs" / "compatibility.md"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the libraries themselves
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Switch's routers
@pytest.mark.parametrize("name", [
    pytest.param(a.name, marks=[] if a.fast else pytest.mark.slow) for a in ARCHITECTURES.values()
])  # fmt: skip
def test_recorded_planned_and_restored(tmp_path, name):
    architecture = ARCHITECTURES[name]
    if importlib.util.find_spec(architecture.package) is None:
        pytest.skip(f"{architecture.package} is not installed")
    result = check(architecture, tmp_path)
    assert not result.faults, "\n".join(result.faults)
    assert result.recorded["fp32"].leaves > 4 and len(result.plans) == 4


def test_forty_architectures_and_the_table_knows_them():
    rows = [line.split("|")[1].strip() for line in TABLE.read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
    assert set(ARCHITECTURES) <= set(rows), "run python benchmarks/compatibility.py --out docs/compatibility.md"
    assert sum(a.package == "transformers" for a in ARCHITECTURES.values()) >= 40


def plan(default, *, policy="autocast", params="fp32", **modules):
    layer = ps.LayerPrecision
    return ps.PrecisionPlan(
        default=layer(default, policy=policy, params=params),
        modules={
            name: layer(f, **({} if f == "fp32" else {"policy": policy, "params": params}))
            for name, f in modules.items()
        },
    )


class Joining(nn.Module):
    """Its own code joins what its parts return, as rotary embeddings and caches do."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x)
        half = torch.cat([k[..., :4], v[..., 4:]], -1)
        return (q @ torch.stack([half, q]).sum(0).mT).softmax(-1) @ v


class TestFormatsBesideEachOther:
    """Found in Llama and 14 more: autocast of one 16-bit dtype refuses to join tensors of the other one."""

    @pytest.mark.parametrize("around, inside", [("bf16", "fp16"), ("fp16", "bf16")])
    def test_the_code_around_gets_them_in_fp32(self, around, inside):
        torch.manual_seed(0)
        model, x = Joining(), torch.randn(2, 4, 8)
        plain = model(x)
        got = []
        with ps.apply(plan(around, key=inside, value="fp32"), model):
            handle = model.key.register_forward_hook(lambda m, a, y: got.append(y.dtype))
            out = model(x)
            out.sum().backward()
            handle.remove()
        assert got == [torch.float32]
        torch.testing.assert_close(out.float(), plain, rtol=0.02, atol=0.02)
        assert all(p.grad.isfinite().all() for p in model.parameters())
        assert torch.equal(model(x), plain)

    def test_equal_formats_still_exchange_tensors_without_a_cast(self):
        model = Joining()
        with ps.apply(plan("bf16", key="fp32", value="bf16"), model):
            assert model.value(torch.randn(2, 8)).dtype is torch.bfloat16


class TestParametrizedWeights:
    """Found in Wav2Vec2 and HuBERT: where the norm of a weight is computed in fp32 and its product in bf16 without
    autocast, the product met an fp32 weight."""

    @pytest.mark.parametrize("norm, product", [("fp32", "bf16"), ("bf16", "fp32"), ("bf16", "bf16")])
    def test_the_weight_arrives_in_the_dtype_of_the_product(self, norm, product):
        torch.manual_seed(0)
        model = nn.Sequential(weight_norm(nn.Conv1d(4, 4, 3)))
        x = torch.randn(2, 4, 9)
        plain, keys = model(x), list(model.state_dict())
        mixed = plan("bf16", policy="cast", **{"0": product, "0.parametrizations.weight": norm})
        with ps.apply(mixed, model):
            out = model(x)
            out.sum().backward()
        assert out.dtype is {"bf16": torch.bfloat16, "fp32": torch.float32}[product]
        torch.testing.assert_close(out.float(), plain, rtol=0.03, atol=0.03)
        assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in model.parameters())
        assert list(model.state_dict()) == keys and torch.equal(model(x), plain)

    def test_a_recommended_plan_runs(self, tmp_path):
        torch.manual_seed(0)
        model = nn.Sequential(weight_norm(nn.Conv1d(4, 4, 3)), nn.ReLU(), nn.Conv1d(4, 4, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        with ps.record(model, tmp_path / "run", optimizer=optimizer, every=1) as rec:
            for _ in range(2):
                model(torch.randn(2, 4, 9)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                rec.step()
        recommended = ps.recommend(tmp_path / "run", formats=("bf16", "fp32"), policy="cast")
        with ps.apply(recommended, model):
            assert model(torch.randn(2, 4, 9)).isfinite().all()


class Router(nn.Module):
    """Converts a module of its own in the forward, whatever it was stored in, as mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(8, 4)

    def forward(self, x):
        self.classifier = self.classifier.to(torch.float32)
        return self.classifier(x.float()).softmax(-1)


class TestModelsThatConvertTheirModules:
    """Found in Switch Transformers: parameters that the plan stores in bf16 were fp32 again after the model's own code
    had run; the module then met bf16 inputs with fp32 weights, and removing the plan left rounded values behind."""

    def test_they_run_as_planned_and_are_restored(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), Router())
        x = torch.randn(3, 8)
        plain, before = model(x), {name: p.clone() for name, p in model.state_dict().items()}
        with ps.apply(plan("bf16", policy="cast", params="bf16"), model):
            assert model[1].classifier.weight.dtype is torch.bfloat16
            out = model(x)
            assert model[1].classifier.weight.dtype is torch.float32  # the model's doing
            model(x).sum().backward()
        torch.testing.assert_close(out.float(), plain, rtol=0.05, atol=0.05)
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
        assert torch.equal(model(x), plain)

    def test_what_was_trained_meanwhile_stays(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), Router())
        first = model[1].classifier.bias[0].item()
        with ps.apply(plan("bf16", policy="cast", params="bf16"), model):
            model(torch.randn(3, 8))
            with torch.no_grad():
                model[1].classifier.bias[1] = 0.123456789
        bias = model[1].classifier.bias
        assert bias[1].item() == pytest.approx(0.123456789, rel=1e-7) and bias[0].item() == first
