"""Plans for other engines: read by the engines' own code, and the snippet runs as ps.apply does, bit for bit."""

from __future__ import annotations

import ast
import copy
import json
import sys
import tempfile
import types
from pathlib import Path

import models
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import precscope as ps
from precscope.converting import convert, converted, from_keras, from_regexes
from precscope.errors import PlanError, RunDirectoryError, UsageError
from precscope.training.tasks.gpt import GPT, SIZES, next_byte_loss

Layer = ps.LayerPrecision
FP8 = ps.PrecisionPlan(
    default="e4m3",
    modules={
        "head": Layer("fp32", reasons=["logits reach 1.1e5"]), "blocks.0.attn": "bf16", "blocks.1.attn": "bf16",
        "blocks.1.attn.proj": "e4m3", "blocks.1.mlp.fc2": "e5m2",
    },
)  # fmt: skip
HIGH = {"head", "blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.1.attn.qkv", "blocks.1.mlp.fc2"}


def gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(SIZES["tiny"])


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


# torchao


def test_torchao_converts_exactly_the_modules_of_the_plan():
    pytest.importorskip("torchao", reason="torchao is not installed")
    float8 = pytest.importorskip("torchao.float8")
    from torchao.float8.float8_linear import Float8Linear

    model = gpt()
    made = converted(FP8, "torchao", model=model)
    written: dict = {}
    exec(made.text, written)
    for keep in (made.value, written["module_filter_fn"]):
        low = copy.deepcopy(model)
        float8.convert_to_float8_training(low, module_filter_fn=keep, config=float8.Float8LinearConfig(emulate=True))
        became = {name for name, m in low.named_modules() if isinstance(m, Float8Linear)}
        assert became == set(linears(model)) - HIGH and len(became) == 4
    tokens = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = next_byte_loss(low, (tokens, tokens))
    loss.backward()
    with ps.apply(FP8, model), torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss.item() == pytest.approx(next_byte_loss(model, (tokens, tokens)).item(), rel=0.01)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in low.parameters())


def test_torchao_leaves_what_does_not_fit_and_says_so():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 17), nn.Conv1d(16, 16, 1), nn.Linear(32, 32))
    plan = ps.PrecisionPlan(default="e4m3", modules={"3": "fp32"})
    with pytest.warns(UserWarning, match="torchao cannot express all of the plan: 1: e4m3 in the plan, but not a mul"):
        made = convert(plan, "torchao", model=model)
    assert [made.value(m, name) for name, m in model.named_children()] == [True, False, False, False]
    assert "2 (e4m3, Conv1d)" in made.lost[1] and made.lost[2].startswith("3: fp32 in the plan")
    assert all(" ".join(text.split()) in " ".join(made.text.split()) for text in made.lost)
    with pytest.raises(PlanError, match=r"nothing for torchao to convert; precscope recommend"):
        convert(ps.PrecisionPlan.uniform("bf16"), "torchao", model=model)
    with pytest.raises(PlanError, match=r"torchao takes the names of modules: give the model .* --task TASK"):
        convert(plan, "torchao")


# TransformerEngine


def kept_out(config, names) -> set[str]:
    """Names that nvdlfw-inspect finds DisableFP8Layer for; TransformerEngine's namespace is what registers it."""
    pytest.importorskip("nvdlfw_inspect", reason="nvdlfw-inspect is not installed")
    from nvdlfw_inspect import logging
    from nvdlfw_inspect.config_manager import ConfigManager
    from nvdlfw_inspect.registry import NamespaceData

    registry = {
        "base": NamespaceData("base", None),
        "transformer_engine": NamespaceData("transformer_engine", None, features={"DisableFP8Layer": object()}),
    }
    ConfigManager.reset()
    with tempfile.TemporaryDirectory() as folder:
        logging.initialize_logger(folder)
    try:
        ConfigManager._load_config(config, registry)
        found = {name: ConfigManager.get_config_for_layer(name) for name in names}
    finally:
        ConfigManager.reset()
    enabled = {"transformer_engine": {"DisableFP8Layer": {"enabled": True}}}
    assert all(config in ({}, enabled) for config in found.values())
    return {name for name, config in found.items() if config}


@pytest.mark.parametrize("with_model", [True, False])
def test_nvdlfw_inspect_keeps_the_layers_of_the_plan_out_of_fp8(with_model, tmp_path):
    yaml = pytest.importorskip("yaml")
    model = gpt()
    made = converted(FP8, "transformer-engine", model=model if with_model else None, out=tmp_path / "fp8.yaml")
    assert yaml.safe_load(made.text) == made.value == yaml.safe_load(made.path.read_text())
    assert "# head: fp32: logits reach 1.1e5" in made.text
    assert [text.split(":")[0] for text in made.lost] == ["head", "blocks.1.mlp.fc2"]
    names = list(linears(model))
    assert kept_out(made.value, names) == HIGH
    assert kept_out(str(made.path), [f"model.{name}" for name in names]) == {f"model.{name}" for name in HIGH}
    inside = ["model.blocks.0.attn.qkv.layernorm_linear", "blocks.1.attn.proj.linear", "xhead", "header"]
    assert kept_out(made.value, inside) == {inside[0]}  # what TransformerEngine has below a layer


def test_a_default_out_of_fp8_with_islands_of_fp8():
    plan = ps.PrecisionPlan(default="bf16", modules={"blocks.0": "e4m3", "blocks.0.attn.qkv": "fp32"})
    model = gpt()
    names = [*linears(model), *(f"model.{n}" for n in linears(model))]
    expected = {n for n in names if "blocks.0." not in n or "blocks.0.attn.qkv" in n}
    for given in (model, None):
        assert kept_out(converted(plan, "transformer-engine", model=given).value, names) == expected


def test_layers_that_differ_in_a_number_are_one_alternative():
    plan = ps.PrecisionPlan(default="e4m3", modules={f"blocks.{i}.attn.proj": "bf16" for i in (0, 1)})
    for given in (gpt(), None):
        made = converted(plan, "transformer-engine", model=given)
        pattern = made.value["kept_out_of_fp8"]["layers"]["layer_name_regex_pattern"]
        assert pattern == r"^(?:model\.)?(?:blocks\.(?:0|1)\.attn\.proj(?:\.|$))"


def test_transformer_engine_refuses_what_needs_no_file():
    with pytest.raises(PlanError, match="computes no layer in e4m3"):
        convert(ps.PrecisionPlan.uniform("bf16"), "transformer-engine")
    with pytest.raises(PlanError, match="computes every layer in e4m3: TransformerEngine's fp8 autocast alone"):
        convert(ps.PrecisionPlan.uniform("e4m3"), "transformer-engine", model=gpt())
    plan = ps.PrecisionPlan(default="e4m3", modules={"blocks.*.attn": "bf16"})
    with pytest.raises(PlanError, match=r"the plan has patterns \(blocks\.\*\.attn\).*--task TASK"):
        convert(plan, "transformer-engine")
    assert "blocks.0.attn.proj" in kept_out(converted(plan, "transformer-engine", model=gpt()).value, linears(gpt()))


# DeepSpeed

SCALED = {"initial": 2.0**12, "floor": 16.0, "growth_interval": 500}


def deepspeed_config(settings: dict):
    """DeepSpeed's own reading of a configuration."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    from deepspeed.runtime.config import get_torch_autocast_dtype, get_torch_autocast_enabled
    from deepspeed.runtime.precision_config import get_bfloat16_config, get_float16_config

    autocast = get_torch_autocast_enabled(settings), get_torch_autocast_dtype(settings)
    return get_float16_config(settings), get_bfloat16_config(settings), autocast


def test_deepspeed_reads_the_loss_scale_of_a_cast_plan(monkeypatch):
    monkeypatch.setenv("DS_BUILD_OPS", "0")
    made = converted(
        ps.PrecisionPlan(default=Layer("fp16", policy="cast", params="fp32"), loss_scale=SCALED), "deepspeed"
    )
    assert made.lost == () and json.loads(made.text)["fp16"] == made.value["fp16"]
    half, bf16, autocast = deepspeed_config(json.loads(made.text))
    assert half.enabled and not bf16.enabled and autocast == (False, None)
    assert half.loss_scale == 0 and half.initial_dynamic_scale() == 2**12
    assert half.dynamic_loss_scale_args() == {
        "init_scale": 2**12, "scale_window": 500, "delayed_shift": 1, "consecutive_hysteresis": False, "min_scale": 16,
    }  # fmt: skip


def test_deepspeed_autocasts_under_an_autocast_plan(monkeypatch):
    monkeypatch.setenv("DS_BUILD_OPS", "0")
    half, bf16, autocast = deepspeed_config(converted(ps.PrecisionPlan.uniform("bf16"), "deepspeed").value)
    assert not half.enabled and not bf16.enabled and autocast == (True, torch.bfloat16)
    made = converted(ps.PrecisionPlan(default="fp16", loss_scale=SCALED), "deepspeed")
    half, _, autocast = deepspeed_config(made.value)
    assert autocast == (True, torch.float16) and not half.enabled and half.initial_scale_power == 12
    assert made.lost == ("the loss scale's settings reach DeepSpeed's torch_autocast with ZeRO only",)


def test_deepspeed_says_what_one_format_cannot():
    plan = ps.PrecisionPlan(
        default="bf16",
        modules={"head": "fp32", "blocks.0": "fp16", "blocks.1.attn": "e4m3", "wte": Layer("bf16", policy="cast")},
    )  # fmt: skip
    made = converted(plan, "deepspeed", model=gpt())
    lost = " | ".join(made.lost)
    assert made.value == {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    assert "head: fp32 in the plan; under torch_autocast PyTorch's lists decide, unless the plan is applied" in lost
    assert "blocks.0.ln1, blocks.0.attn.qkv" in lost and "fp16 in the plan; DeepSpeed has one low format, bf16" in lost
    assert "blocks.1.attn.qkv, blocks.1.attn.proj: e4m3 in the plan; fp8 is not DeepSpeed's: bf16" in lost
    assert "wte: policy 'cast' in the plan; here all is 'autocast'" in lost and "wte: stored in bf16" in lost
    assert json.loads(made.text)["_precscope"]["not_expressed"] == list(made.lost)
    odd = ps.PrecisionPlan(default=Layer("fp16", policy="cast"), loss_scale={"initial": 3000.0, "floor": 0.25})
    made = converted(odd, "deepspeed")
    assert made.value["fp16"] | {"initial_scale_power": 11, "min_loss_scale": 1} == made.value["fp16"]
    assert "an initial loss scale of 3000" in made.lost[0] and "a floor of 0.25" in made.lost[1]
    assert converted(ps.PrecisionPlan(), "deepspeed").value == {}


def test_an_applied_plan_keeps_its_islands_under_deepspeeds_autocast():
    """What `lost` proposes: DeepSpeed puts torch.autocast around the forward; the plan's fp32 modules leave it."""
    model, plan = gpt(), ps.PrecisionPlan(default="bf16", modules={"head": "fp32"})
    with ps.apply(plan, model), torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(torch.zeros(1, 4, dtype=torch.long)).dtype is torch.float32


# snippet


class Residual(nn.Module):
    def __init__(self, wide: int, out: int) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(wide, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.c2, self.b2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.skip = nn.Conv2d(wide, out, 1)

    def forward(self, x):
        return F.relu(self.b2(self.c2(F.relu(self.b1(self.c1(x))))) + self.skip(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer1, self.layer2 = nn.Conv2d(1, 8, 3, padding=1), Residual(8, 8), Residual(8, 16)
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        return self.fc(self.layer2(self.layer1(self.stem(x.reshape(-1, 1, 2, 4)))).mean((2, 3)))


def plans_for(names: list[str]) -> dict[str, ps.PrecisionPlan]:
    low = names[1:]
    island, last = {low[1]: "fp32"}, {low[-1]: "fp32"}
    wide = Layer("fp32", params="bf16")
    mixed = ["fp32", "fp16", Layer("bf16", policy="cast", params="fp32")]
    return {
        "bf16": ps.PrecisionPlan(default="bf16", modules=island),
        "fp16": ps.PrecisionPlan(default="fp16", modules=island),
        "fp32": ps.PrecisionPlan(modules={low[1]: "bf16"}),
        "cast": ps.PrecisionPlan(default=Layer("bf16", policy="cast"), modules=island),
        "cast, masters": ps.PrecisionPlan(default=Layer("bf16", policy="cast", params="fp32"), modules=last),
        "stored": ps.PrecisionPlan(default=Layer("bf16", params="bf16"), modules={low[1]: wide}),
        "mixed": ps.PrecisionPlan(default="bf16", modules={n: mixed[i % 3] for i, n in enumerate(low[::2])}),
    }  # fmt: skip


def module_of(text: str) -> types.ModuleType:
    """The written file, imported; it may import nothing but torch and the standard library."""
    module = types.ModuleType("planned")
    imported = {n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in ast.walk(ast.parse(text))
                if isinstance(n, ast.Import | ast.ImportFrom)}  # fmt: skip
    assert {name.split(".")[0] for name in imported} <= {"torch", *sys.stdlib_module_names}
    sys.modules["planned"] = module
    exec(compile(text, "planned.py", "exec"), module.__dict__)
    return module


def steps(model: nn.Module, around, loss_of, batches) -> list[torch.Tensor | None]:
    """Losses, gradients and the state after some passes: all that a step of training is made of."""
    found: list[torch.Tensor | None] = []
    for batch in batches:
        model.zero_grad()
        with around("cpu"):
            loss = loss_of(model, batch)
        loss.backward()
        found += [loss.detach(), *(None if p.grad is None else p.grad.to_dense().clone() for p in model.parameters())]
    return [*found, *(t.detach().clone() for t in model.state_dict().values())]


MODELS = {name: models.ALL[name] for name in ("shared", "structured", "checkpoint", "tied", "lstm", "in_place")}


@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32", "cast", "cast, masters", "stored", "mixed"])
@pytest.mark.parametrize("name", ["gpt", "resnet", *MODELS])
def test_the_snippet_runs_as_the_plan_does_bit_for_bit(name, kind):
    if name == "lstm" and kind == "fp16":
        pytest.skip("PyTorch has no fp16 LSTM on CPUs without AMX")
    torch.manual_seed(0)
    model = {"gpt": gpt, "resnet": ResNet, **MODELS}[name]()
    tokens = [torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(s)) for s in range(2)]
    batches = [(t[:, :-1], t[:, 1:]) for t in tokens] if name == "gpt" else [models.batch(s) for s in range(2)]
    loss_of = next_byte_loss if name == "gpt" else models.loss_of
    plan = plans_for([n for n, _ in model.named_modules()])[kind]
    made = converted(plan, "snippet", model=model)
    planned = module_of(made.text)
    one, two = copy.deepcopy(model), copy.deepcopy(model)
    assert planned.apply_plan(two) is two and list(two.state_dict()) == list(model.state_dict())
    with ps.apply(plan, one) as handle:
        expected = steps(one, handle.autocast, loss_of, batches)
        found = steps(two, planned.loss_context, loss_of, batches)
    assert len(expected) == len(found)
    for a, b in zip(expected, found, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.dtype is b.dtype and torch.equal(a, b) and a.isfinite().all())


def test_the_snippet_leaves_out_what_the_plan_needs_not():
    small = converted(ps.PrecisionPlan(default="bf16", modules={"head": "fp32"}), "snippet", model=gpt()).text
    assert "_store" not in small and "Scaler" not in small and "attend" not in small and "# [" not in small
    half = ps.PrecisionPlan(default=Layer("fp16", policy="cast"), modules={"head": "fp32"})
    large = converted(half, "snippet", model=gpt()).text
    assert "_store" in large and "class Scaler" in large and "allow_fp16" in large and "# [" not in large
    assert len(small.splitlines()) < 200 < len(large.splitlines())
    assert 'PLAN: dict[str, tuple[str, str, str]] = {\n    "head": ("fp32", "autocast", "fp32"),\n}' in small


def test_the_written_file_has_the_scaler_of_the_plan(tmp_path):
    scale = {"initial": 8.0, "floor": 4.0, "growth_interval": 7}
    plan = ps.PrecisionPlan(default="fp16", modules={"1": "fp32"}, loss_scale=scale)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    convert(plan, "snippet", model=model, out=tmp_path / "planned.py")
    planned = module_of((tmp_path / "planned.py").read_text())
    optimizer, scaler = torch.optim.SGD(planned.apply_plan(model).parameters()), planned.Scaler("cpu")
    assert (scaler.get_scale(), scaler.get_growth_interval()) == (8.0, 7)
    for factor in (1.0, float("inf"), float("inf"), float("inf")):
        with planned.loss_context("cpu"):
            loss = model(torch.ones(2, 4)).sum() * factor
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == 4.0
    with pytest.raises(ValueError, match="the plan was made for another model: this one has no 1"):
        planned.apply_plan(nn.Linear(2, 2))


def test_the_snippet_refuses_fp8_and_shouts_about_the_optimizer():
    with pytest.raises(PlanError, match=r"blocks\.0\.mlp\.fc1.*e4m3 in the plan, and plain PyTorch has no modules"):
        convert(FP8, "snippet", model=gpt())
    plan = ps.PrecisionPlan(default=Layer("bf16", params="bf16"), modules={"head": "tf32"},
                            optimizer={"updates": "stochastic", "state": "bf16"})  # fmt: skip
    with pytest.warns(UserWarning, match="'stochastic' updates, which this file does not do"):
        made = convert(plan, "snippet", model=gpt())
    assert len(made.lost) == 3 and made.text.count("# NOT IN THIS FILE: ") == 3
    with pytest.raises(PlanError, match="snippet takes the names of modules"):
        convert(plan, "snippet")


def test_a_copy_of_a_planned_model_runs_by_itself():
    planned = module_of(converted(ps.PrecisionPlan(default="bf16"), "snippet", model=gpt()).text)
    one = planned.apply_plan(gpt())
    two = copy.deepcopy(one)
    tokens = torch.zeros(1, 4, dtype=torch.long)
    with torch.no_grad():
        two.head.weight.zero_()
        assert two(tokens).abs().sum() == 0 < one(tokens).abs().sum()


# the function itself


def test_targets_phases_and_places(tmp_path):
    plan = ps.PrecisionPlan(default="bf16")
    with pytest.raises(UsageError, match=r"no engine 'deepsped' \(did you mean deepspeed.*\); known: torchao"):
        convert(plan, "deepsped")
    phased = plan.replace(phases=[{"from_step": 0, "precision": "fp16"}])
    with pytest.raises(PlanError, match=r"the plan changes over time \(1 phases\).*plan.at_step\(STEP\)"):
        convert(phased, "deepspeed")
    plan.save(tmp_path / "plan.json")
    made = convert(tmp_path / "plan.json", "deepspeed", out=tmp_path / "ds.json")
    assert made.path == tmp_path / "ds.json" and json.loads(made.path.read_text())["torch_autocast"]["enabled"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunDirectoryError, match="cannot write"):
        convert(plan, "deepspeed", out=tmp_path / "file" / "ds.json")
    with pytest.raises(PlanError, match="no module 'blocks.9'"):
        convert(ps.PrecisionPlan(default="bf16", modules={"blocks.9": "fp32"}), "snippet", model=gpt())


def test_keras_goes_there_and_back(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    pytest.importorskip("keras", reason="keras is not installed")
    plan = ps.PrecisionPlan(default=Layer("bf16", policy="cast", params="fp32"), modules={"net.head": "fp32"})
    made = converted(plan, "keras")
    assert type(made.value).__name__ == "DTypePolicyMap" and made.target == "keras"
    back = from_keras(made.value)
    assert back["net.head"].compute == "fp32" and back.default.precision == plan.default.precision


def test_the_command_line(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from precscope.cli import app

    monkeypatch.chdir(tmp_path)
    FP8.save("plan.json")
    ps.PrecisionPlan(phases=[{"from_step": 0, "precision": "bf16"}]).save("phased.json")
    run = CliRunner().invoke
    done = run(app, ["convert", "plan.json", "--to", "transformer-engine", "--task", "gpt@tiny", "--out", "fp8.yaml"])
    assert done.exit_code == 0, done.output
    assert "wrote fp8.yaml\nnext: debug_api" in done.stdout and "not expressed: head: fp32" in done.stderr
    assert "DisableFP8Layer" in Path("fp8.yaml").read_text()
    done = run(app, ["convert", "phased.json", "--to", "deepspeed"])
    assert isinstance(done.exception, PlanError) and "--step on the command line" in str(done.exception)
    done = run(app, ["convert", "phased.json", "--to", "deepspeed", "--step", "3"])
    assert json.loads(done.stdout)["torch_autocast"]["dtype"] == "bfloat16"
    done = run(app, ["convert", "plan.json", "--to", "keras", "--task", "gpt@tiny"])
    assert isinstance(done.exception, UsageError)
    assert "--task does not go with --to keras: tasks make torch models" in str(done.exception)


# regexes


def test_the_first_regex_decides():
    model = gpt()
    plan = from_regexes(
        [(r"blocks\.0\.attn\.proj$", "fp32"), (r"\.attn\.", "bf16"), (r"^head$", Layer("fp16", policy="cast"))],
        default="bf16", model=model,
    )  # fmt: skip
    assert plan["blocks.0.attn.proj"].compute == "fp32" and plan["blocks.1.attn.proj"].compute == "bf16"
    assert plan["head"].precision == ("fp16", "cast", "fp16")
    assert "blocks.0.ln1" not in plan.modules and plan["blocks.0.ln1"] == plan.default
    assert str(plan["blocks.0.attn.proj"].reasons[0]) == r"the regex 'blocks\\.0\\.attn\\.proj$' asks for it"
    plan.check(name for name, _ in model.named_modules())
    names = [name for name, _ in model.named_modules()]
    assert from_regexes([(r"attn$", "fp32")], model=names)["blocks.0.attn.qkv"].compute == "fp32"  # follows its parent


@pytest.mark.parametrize("names", [["enc", "enc.a.b"], ["enc", "enc.a", "enc.a.b"], ["enc.a.b", "enc", "other"]])
def test_a_list_of_names_may_have_gaps(names):
    plan = from_regexes([("^enc$", "fp16"), ("b$", Layer("fp32"))], default="fp32", model=names)
    assert {name: plan[name].compute for name in ("enc", "enc.a.b", "enc.c")} == {
        "enc": "fp16", "enc.a.b": "fp32", "enc.c": "fp16",
    }  # fmt: skip
    same = from_regexes([("^enc$", "fp16"), ("b$", "fp16")], default="fp32", model=names)
    assert list(same.modules) == ["enc"], "what differs in its reasons alone needs no entry"


@pytest.mark.parametrize(("pairs", "options", "error", "message"), [
    ([(r"blokcs\.0", "fp16")], {}, PlanError, r"the regex 'blokcs.*' matches no module; the nearest names are blocks"),
    ([(r"zzzz", "fp16")], {}, PlanError, r"matches no module; the model has wte, wpe, blocks"),
    ([(r"attn(", "fp16")], {}, PlanError, r"'attn\(' is not a regex: .*put a backslash before"),
    ([(r"attn", "fp16"), (r"attn\.proj", "fp32")], {}, PlanError, r"'attn.*' never decides: earlier ones match all"),
    ([(r"attn", "fp16"), (r"proj", "fp32")], {"match": "unique"}, PlanError, r"'blocks.0.attn.proj' matches two reg"),
    ([(r"attn", "fp16"), (r"attn", "fp32")], {}, PlanError, "is there twice"),
    ([(r"attn", "fp16")], {"match": "last"}, UsageError, "match must be 'first' or 'unique', not 'last'"),
    ([(r"attn", "fp17")], {}, PlanError, "compute: got 'fp17'"),
])  # fmt: skip
def test_regexes_that_are_refused(pairs, options, error, message):
    with pytest.raises(error, match=message):
        from_regexes(pairs, model=gpt(), **options)


def test_without_a_model_regexes_become_patterns():
    pairs = [(r"^blocks\.[0-9]\.attn\.", "bf16"), (r"mlp\.fc\d$", "fp16"), (r"ln.f", "fp32"), (r"^wt.+$", "fp32")]
    plan = from_regexes(pairs, default="bf16", match="unique")
    assert list(plan.modules) == ["blocks.[0-9].attn.*", "*mlp.fc[0-9]", "*ln?f*", "wt?*"]
    same = from_regexes(pairs, default="bf16", model=gpt())
    for name, _ in gpt().named_modules():
        assert plan[name].compute == same[name].compute, name
    with pytest.raises(UsageError, match="which regex is found first is looked up among the names of a model"):
        from_regexes(pairs)
    for regex in (r"layers\.\d+\.attn", r"a|b", r"(a)", r"a{2}", r"[^a]"):
        with pytest.raises(PlanError, match=r"no pattern of a plan says .*give the model"):
            from_regexes([(regex, "fp16")], match="unique")


def test_the_template_needs_nothing_of_this_package():
    text = (Path(ps.__file__).parent / "converting" / "plain.py").read_text()
    assert text.count("precscope") <= 3 and "from .." not in text.replace("from ..applying.attention", "")
