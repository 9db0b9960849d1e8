"""ps.export: the planned model as a file that computes the same without precscope."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from models import ALL, MLP, batch
from torch import nn

from precscope import PrecisionPlan, Task, apply, train
from precscope.batches import seed_everything
from precscope.errors import ModelError, PlanError, RunDirectoryError, RunError, UsageError
from precscope.exporting import export, onnxfile
from precscope.training.halfmatmul import half_matmul_through_fp32

X = batch(0)[0]
ALTERNATING = {"fc1": "fp16", "fc2": "bf16"}


def make(build=MLP):
    seed_everything(0)
    return build().eval()


def layers(formats, policy="autocast"):
    return PrecisionPlan(modules={name: {"compute": fmt, "policy": policy} for name, fmt in formats.items()})


def planned(plan, model, *args):
    with apply(plan, model), torch.no_grad():
        return model(*args)


LOADER = """
import json, sys
class Forbidden:
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] != "precscope", "precscope is imported"
sys.meta_path.insert(0, Forbidden())
import torch
for file in sys.argv[1:]:
    program = torch.export.load(file).module()
    x = torch.load(file + ".x", weights_only=True)
    with torch.no_grad():
        torch.save(program(x), file + ".y")
assert "precscope" not in sys.modules
"""


@pytest.mark.parametrize(("build", "plan"), [
    (MLP, layers(ALTERNATING, "cast")), (MLP, PrecisionPlan.uniform("e4m3")), (ALL["lstm"], layers({"lstm": "bf16"})),
], ids=["alternating", "8 bit", "recurrent"])  # fmt: skip
def test_the_file_holds_plain_operations_that_give_the_same_numbers(build, plan, tmp_path):
    model = make(build)
    expected = planned(plan, model, X)
    export(plan, model, (X,), out=tmp_path / "m.pt2")
    program = torch.export.load(tmp_path / "m.pt2")
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert targets and all(t.startswith(("aten.", "<built-in function getitem>")) for t in targets), targets
    with torch.no_grad():
        assert torch.equal(program.module()(X), expected)


@pytest.mark.slow
def test_loaded_without_precscope_it_gives_the_same_numbers_bit_for_bit(tmp_path):
    """In a process that cannot import precscope: alternating layers, 8 bit as fake quantisation, a recurrent model."""
    cases = {
        "cast": (MLP, layers(ALTERNATING, "cast")), "e4m3": (MLP, PrecisionPlan.uniform("e4m3")),
        "lstm": (ALL["lstm"], layers({"lstm": "bf16"})),
    }  # fmt: skip
    expected = {}
    for name, (build, plan) in cases.items():
        model = make(build)
        expected[name] = planned(plan, model, X)
        assert not torch.equal(expected[name].float(), planned(PrecisionPlan(), model, X)), "the plan does nothing"
        result = export(plan, model, (X,), out=tmp_path / f"{name}.pt2")
        assert result.equal and result.relative_l2 == 0 and result.regions == 0, name
        torch.save(X, tmp_path / f"{name}.pt2.x")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", LOADER, *(str(tmp_path / f"{n}.pt2") for n in cases)],
                          capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name, y in expected.items():
        got = torch.load(tmp_path / f"{name}.pt2.y", weights_only=True)
        assert got.dtype is y.dtype and torch.equal(got, y), name


def test_the_graph_holds_the_casts_of_the_plan(tmp_path):
    """autocast: input, weight and bias to the format, its output back up for fp32 code. cast: weights lie low."""
    result = export(layers(ALTERNATING), make(), (X,), out=tmp_path / "a.pt2")
    assert result.casts == {"float16": 3, "bfloat16": 3, "float32": 2}
    assert result.weights == {"float32": 4 * (8 * 16 + 16 + 16 * 4 + 4)}
    result = export(layers(ALTERNATING, "cast"), make(), (X,), out=tmp_path / "c.pt2")
    assert result.casts == {"float16": 1, "bfloat16": 1, "float32": 2}
    assert result.weights == {"float16": 2 * (8 * 16 + 16), "bfloat16": 2 * (16 * 4 + 4)}
    loaded = torch.export.load(tmp_path / "a.pt2", extra_files=(extra := {"precscope.json": ""}))
    about = json.loads(extra["precscope.json"])
    assert about["schema"] == 1 and about["plan"]["modules"]["fc1"]["compute"] == "fp16"
    assert loaded.example_inputs is None, "the user's data is no part of the model"
    assert "run by torch" in str(result) and "bit for bit" in str(result)
    assert max(map(len, str(result).splitlines()[1:])) <= 80


@pytest.mark.parametrize(("policy", "name"), [
    *(("autocast", n) for n in ("structured", "in_place", "tied", "shared", "checkpoint", "empty", "conv", "lstm")),
    *(("cast", n) for n in ("in_place", "tied", "lstm")),
])  # fmt: skip
def test_models_of_all_kinds(name, policy, tmp_path):
    model = make(ALL[name])
    result = export(PrecisionPlan.uniform("bf16", policy=policy), model, (X,), out=tmp_path / "m.pt2")
    assert result.equal and result.casts["bfloat16"] >= 1


def test_fused_kernels_that_no_graph_holds_are_told(tmp_path):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = make(lambda: nn.Sequential(nn.Unflatten(1, (1, 8)), layer))
    result = export(PrecisionPlan.uniform("bf16"), model, (X,), out=tmp_path / "m.pt2")
    assert not result.equal and 0 < result.relative_l2 < 0.02
    assert any("without PyTorch's fused kernels" in n for n in result.notes)
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_model_is_left_as_found(tmp_path):
    model = make(ALL["conv"])
    model.train()
    before = {n: t.detach().clone() for n, t in model.state_dict().items()}
    state = torch.get_rng_state()
    export(PrecisionPlan.uniform("bf16", policy="cast"), model, (X,), out=tmp_path / "m.pt2")
    after = model.state_dict()
    assert all(torch.equal(t, after[n]) and t.dtype is after[n].dtype for n, t in before.items())
    assert all(m.training for m in model.modules()) and torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad for n, p in model.named_parameters() if "frozen" not in n)


def test_an_open_batch_dimension(tmp_path):
    model, plan = make(), layers(ALTERNATING)
    export(plan, model, (X,), out=tmp_path / "m.pt2", dynamic_batch=True)
    more = torch.cat([X, X[:3] * 2])
    program = torch.export.load(tmp_path / "m.pt2").module()
    with torch.no_grad():
        assert torch.equal(program(more), planned(plan, model, more))
        export(plan, model, (X,), out=tmp_path / "fixed.pt2")
        with pytest.raises(RuntimeError, match="to be equal to 6, but got 9"):
            torch.export.load(tmp_path / "fixed.pt2").module()(more)


def task():
    seed_everything(0)
    loss = lambda m, b: F.cross_entropy(m(b[0]).float(), b[1])  # noqa: E731
    return Task(model=MLP(), loss=loss, batches=batch, eval_batches=[batch(9)])


def test_a_task_gives_inputs_and_a_run_gives_weights(tmp_path):
    trained = task()
    train(trained, steps=3, out=tmp_path / "run", checkpoint_every=3)
    fresh, plan = task(), PrecisionPlan.uniform("bf16")
    start = fresh.model.fc1.weight.detach().clone()
    export(plan, fresh, out=tmp_path / "m.pt2", run=tmp_path / "run")
    assert torch.equal(fresh.model.fc1.weight, start)
    trained.model.eval()
    x = batch(5)[0]
    with torch.no_grad():
        got = torch.export.load(tmp_path / "m.pt2").module()(x)
    assert torch.equal(got, planned(plan, trained.model, x)) and not torch.equal(got, planned(plan, fresh.model, x))


def test_a_program_that_computes_something_else_is_not_written(tmp_path):
    class Forgetful(MLP):
        calls = 0

        def forward(self, x):
            Forgetful.calls += 1
            return super().forward(x) * Forgetful.calls

    path = tmp_path / "m.pt2"
    with pytest.raises(RunError, match=r"does not compute what the planned model does \(relative difference 1\): not"):
        export(PrecisionPlan.uniform("bf16"), make(Forgetful), (X,), out=path)
    assert not list(tmp_path.iterdir())
    Forgetful.calls = 0
    result = export(PrecisionPlan.uniform("bf16"), make(Forgetful), (X,), out=path, check=False)
    assert path.exists() and not result.equal and "relative difference 1 to the planned model" in str(result)


def test_the_file_itself_is_run_and_not_only_what_it_was_made_of(tmp_path, monkeypatch):
    """A file that was damaged on its way to the disk is not given its name."""
    save = torch.export.save

    def damaged(made, file, **more):
        with torch.no_grad():
            made.state_dict["fc1.weight"].mul_(2)
        save(made, file, **more)

    monkeypatch.setattr(torch.export, "save", damaged)
    with pytest.raises(RunError, match="does not compute what the planned model does .*: not written"):
        export(PrecisionPlan.uniform("bf16", policy="cast"), make(), (X,), out=tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["m.pt2", "m.onnx"])
def test_a_model_without_an_output_is_refused(name, tmp_path):
    class Silent(MLP):
        def forward(self, x):
            super().forward(x)

    if name == "m.onnx":
        pytest.importorskip("onnxscript")
    with pytest.raises(ModelError, match="the model returns no tensor on the example inputs"):
        export(PrecisionPlan.uniform("bf16"), make(Silent), (X,), out=tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_traced_says_why(tmp_path):
    class Branches(MLP):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(ModelError, match="torch.export cannot trace this model .* must not branch on values"):
        export(PrecisionPlan.uniform("bf16"), make(Branches), (X,), out=tmp_path / "m.pt2")


@pytest.mark.parametrize("plan, given, more, message", [
    (PrecisionPlan(), (X,), {"out": "m.pth"}, r"m.pth: its name must end in .pt2 or .onnx"),
    (PrecisionPlan(), None, {}, r"give example inputs for the model, for instance \(x,\), or a Task"),
    (PrecisionPlan(), 3, {}, "example inputs are a tuple of arguments, a dict .* not int"),
    (PrecisionPlan(phases=[{"from_step": 0, "precision": "bf16"}]), (X,), {}, r"export that of one step, plan.at_step"),
    (None, (X,), {}, "export takes a PrecisionPlan or its file first, not NoneType"),
    (PrecisionPlan(), (X,), {"dynamic_batch": True, "dynamic_shapes": {}}, "dynamic_shapes or dynamic_batch, not both"),
])  # fmt: skip
def test_wrong_use_is_refused(plan, given, more, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        export(plan, make(), given, **{"out": tmp_path / "m.pt2", **more})


def test_other_refusals(tmp_path):
    with pytest.raises(PlanError, match="no module 'fc7'"):
        export(layers({"fc7": "bf16"}), make(), (X,), out=tmp_path / "m.pt2")
    with pytest.raises(UsageError, match="a Task's batches give the example inputs"):
        export(PrecisionPlan(), task(), (X,), out=tmp_path / "m.pt2")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="cannot write .*choose another place"):
        export(PrecisionPlan(), make(), (X,), out=tmp_path / "file" / "m.pt2")


def test_onnx_without_its_packages_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(onnxfile, "find_spec", lambda name: None)
    with pytest.raises(RunError, match="ONNX export needs onnx and onnxscript: pip install onnx onnxscript"):
        export(PrecisionPlan(), make(), (X,), out=tmp_path / "m.onnx")


# ONNX itself


@pytest.fixture
def onnx():
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    return pytest.importorskip("onnx")


def values(onnx, path, x):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("policy", ["autocast", "cast"])
def test_onnx_has_the_casts_in_place_and_runs(policy, onnx, tmp_path):
    model, plan = make(), layers({"fc1": "fp16"}, policy)
    result = export(plan, model, (X,), out=tmp_path / "m.onnx", dynamic_batch=True, opset=20)
    graph = onnx.load(str(tmp_path / "m.onnx")).graph
    assert [n.op_type for n in graph.node] == ["Cast", "Gemm", "Cast", "Gelu", "Gemm"]
    kinds = {i.name: onnx.TensorProto.DataType.Name(i.data_type) for i in graph.initializer}
    assert sorted(kinds.values()) == ["FLOAT", "FLOAT", "FLOAT16", "FLOAT16"]
    assert result.casts == {"float16": 1, "float32": 1}
    assert result.weights == {"float16": 2 * 144, "float32": 4 * 68} and result.checked.startswith("onnxruntime")
    with half_matmul_through_fp32():
        expected = planned(plan, model, X[:4])
    got = values(onnx, tmp_path / "m.onnx", X[:4])
    assert float((got - expected).norm() / expected.norm()) < 2**-10, "an ulp of fp16"
    assert onnx.load(str(tmp_path / "m.onnx")).opset_import[0].version == 20
    metadata = {p.key: p.value for p in onnx.load(str(tmp_path / "m.onnx")).metadata_props}
    assert json.loads(metadata["precscope"])["plan"]["modules"]["fc1"]["compute"] == "fp16"


def test_bf16_that_onnxruntime_cannot_run_is_not_written_unnoticed(onnx, tmp_path):
    path, plan = tmp_path / "m.onnx", PrecisionPlan.uniform("bf16")
    with pytest.raises(RunError, match="onnxruntime .* cannot run it .* few bf16 operations on CPUs: use fp16"):
        export(plan, make(), (X,), out=path)
    assert not list(tmp_path.iterdir())
    result = export(plan, make(), (X,), out=path, check=False)
    assert path.exists() and (result.checked, result.equal) == ("", None)
    said = " ".join(str(result).split())
    assert "this file may run on GPUs only" in said and "the file was not run" in said


def test_an_opset_that_torch_cannot_write_is_refused(onnx, tmp_path, capfd):
    with pytest.raises(
        ModelError, match=r"cannot write this model in opset 3, only in \d+: leave opset= .--opset. out"
    ):
        export(layers({"fc1": "fp16"}), make(), (X,), out=tmp_path / "m.onnx", opset=3)
    assert not list(tmp_path.iterdir()) and capfd.readouterr() == ("", "")


def test_emulated_8_bit_formats_do_not_go_to_onnx(onnx, tmp_path):
    with pytest.raises(UsageError, match="the plan has e4m3 modules, whose emulated rounding ONNX has no operations"):
        export(PrecisionPlan.uniform("e4m3"), make(), (X,), out=tmp_path / "m.onnx")


def test_onnx_that_optimisation_breaks_is_written_without(onnx, tmp_path):
    """torch.onnx folds an fp32 batch norm into an fp16 convolution and gets a model of two dtypes."""
    result = export(PrecisionPlan.uniform("fp16"), make(ALL["conv"]), (X,), out=tmp_path / "m.onnx")
    assert 0 <= result.relative_l2 < 2**-9


TASK = """
import torch, precscope as ps
from torch import nn

def make():
    def batch(step):
        g = torch.Generator().manual_seed(step)
        return torch.randn(8, 16, generator=g), torch.randint(0, 4, (8,), generator=g)
    loss = lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])
    return ps.Task(model=nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)), loss=loss, batches=batch)
"""


def test_the_command(tmp_path, monkeypatch, capsys):
    from precscope.cli import main

    (tmp_path / "task.py").write_text(TASK)
    PrecisionPlan(modules={"0": "bf16"}).save(tmp_path / "plan.json")
    monkeypatch.chdir(tmp_path)
    line = "precscope export task.py:make --plan plan.json --out m.pt2 --dynamic-batch"
    monkeypatch.setattr("sys.argv", line.split())
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr()
    assert not stop.value.code and not said.err
    assert "equal to the planned model, bit for bit" in said.out and "wrote m.pt2" in said.out
    assert "next: precscope infer task.py:make --plan plan.json" in said.out
    with torch.no_grad():
        assert torch.export.load(tmp_path / "m.pt2").module()(torch.ones(3, 16)).shape == (3, 4)
