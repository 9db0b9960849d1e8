"""ps.train(compile=True): the same run, the same names, what it says of its cost, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

from precscope.errors import TrainingError, UsageError
from precscope.plans import LayerPrecision, PrecisionPlan
from precscope.recording import record
from precscope.tasks import Task, make_task
from precscope.training import CompileConfig, compiling, train
from precscope.training.halfmatmul import needs_half_matmul
from precscope.training.log import read_log
from precscope.training.tasks.gpt import gpt

traced = CompileConfig(backend="aot_eager", fullgraph=True)
"""Traced forward and backward, run by eager kernels: no C++ compiler, and the same bits."""

tiny = partial(make_task, partial(gpt, "tiny"))
hidden = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
"""A warning of dynamo's own, which it hides where warnings are not errors."""

inductors_own = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")

needs_cxx = pytest.mark.skipif(not compiling._has_cxx(), reason="inductor needs a C++ compiler")
ISLAND = PrecisionPlan(default="bf16", modules={"fc1": "fp32"})


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.drop, self.fc2 = nn.Linear(8, 16), nn.Dropout(0.2), nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.drop(F.gelu(self.fc1(x))))


def regression(**changes) -> Task:
    torch.manual_seed(0)
    x = torch.randn(40, 8)
    batches = [(x[i : i + 8], x[i : i + 8].sum(1, keepdim=True)) for i in range(0, 40, 8)]
    parts = {"model": Net(), "loss": lambda m, b: F.mse_loss(m(b[0]), b[1]), "batches": batches}
    return Task(**{**parts, "eval_batches": batches[:2], **changes})


def parameters(task: Task) -> torch.Tensor:
    return nn.utils.parameters_to_vector(task.model.parameters()).detach().clone()


HOW = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "islands": {"plan": ISLAND},
    "cast": {"plan": PrecisionPlan(default=LayerPrecision("bf16", policy="cast", params="fp32"))},
    "stored low": {"plan": PrecisionPlan.uniform("bf16", params="bf16")},
    "fp8": {"plan": PrecisionPlan(default="bf16", modules={"fc?": "e4m3"})},
}


@pytest.mark.parametrize("how", HOW)
def test_the_same_run_as_uncompiled(how):
    """Traced and run by the same kernels, all is equal bit for bit: nothing of the precision is lost in tracing."""
    plain, compiled = regression(), regression()
    settings = {"steps": 4, "eval_every": 2, "accumulate": 2, "lr": 3e-3, **HOW[how]}
    expected = train(plain, **settings)
    found = train(compiled, compile=traced, **settings)
    assert found.losses == expected.losses
    assert found.evaluations == expected.evaluations
    assert torch.equal(parameters(compiled), parameters(plain))
    assert counters["stats"]["unique_graphs"] == 2, "one for training, one for evaluation"
    assert "2 graphs in training and evaluation, 0 graph breaks" in " ".join(found.notes)


def test_checkpoints_of_compiled_and_uncompiled_runs_are_interchangeable(tmp_path):
    reference = regression()
    train(reference, steps=6, schedule="none")
    for first, then in ((traced, False), (False, traced)):
        out = tmp_path / str(bool(first))
        task = regression()
        train(task, steps=3, out=out, compile=first, schedule="none", checkpoint_every=3)
        assert not any("_orig_mod" in name for name in task.model.state_dict())
        task = regression()
        result = train(task, steps=6, out=out, compile=then, resume=True, schedule="none")
        assert len(result.losses) == 6
        assert torch.equal(parameters(task), parameters(reference))


def test_a_phase_recompiles_once_and_a_plan_that_comes_back_does_not(tmp_path):
    phases = [{"from_step": 2, "precision": "fp32"}, {"from_step": 4, "precision": "plan"},
              {"from_step": 6, "precision": "fp32"}]  # fmt: skip
    plan = PrecisionPlan(default="bf16", modules={"fc1": "fp32"}, phases=phases)
    expected = train(regression(), steps=8, plan=plan)
    found = train(regression(), steps=8, plan=plan, compile=traced, out=tmp_path / "run")
    assert found.losses == expected.losses
    said = json.loads((tmp_path / "run" / "run.json").read_text())["compile"]
    assert said["replanned_at"] == [2, 4, 6]
    assert said["graphs_at_step"] == {"0": 1, "2": 1}
    assert any("another plan from step 2, 4, 6 on: compiled anew at 1 of these steps" in n for n in found.notes)


def test_many_changes_of_plan_do_not_exhaust_recompilations():
    """PyTorch gives up on a function after recompile_limit variants and runs it uncompiled."""
    plans = [PrecisionPlan(default=d, modules={"fc1": f}) for d in ("bf16", "fp32") for f in ("fp16", "e4m3", "e5m2")]
    phases = [{"from_step": i, "plan": p} for i, p in enumerate(plans) if i]
    plan = PrecisionPlan(default=plans[0].default, modules=plans[0].modules, phases=phases)
    limit = torch._dynamo.config.recompile_limit
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        result = train(regression(), steps=len(plans), plan=plan, compile=CompileConfig(backend="eager"))
    assert len(result.losses) == len(plans)
    assert torch._dynamo.config.recompile_limit == limit


def test_many_runs_in_one_process_do_not_exhaust_recompilations():
    """All planned models run the same function: each run has PyTorch's limit of recompilations for itself."""
    with torch._dynamo.config.patch(recompile_limit=2, accumulated_recompile_limit=3, fail_on_recompile_limit_hit=True):
        kept = [nn.Sequential(nn.Linear(8, width), nn.Linear(width, 1)) for width in (3, 4, 5)]
        for model in kept:
            result = train(
                regression(model=model),
                steps=2,
                plan=PrecisionPlan(default="bf16"),
                compile=CompileConfig(backend="eager"),
            )
            assert any("2 graphs" in note for note in result.notes), result.notes
        limits = torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit
        assert limits == (2, 3)


def test_code_of_an_earlier_run_is_used_again_and_said():
    first, second = (train(regression(), steps=2, plan=ISLAND, compile=traced) for _ in range(2))
    assert first.losses == second.losses
    assert any("all code was there from an earlier run" in note for note in second.notes), second.notes


def test_shadowed_steps_run_eager_and_nothing_is_compiled_again(tmp_path):
    expected = train(regression(), steps=12, plan=ISLAND)
    found = train(regression(), steps=12, plan=ISLAND, compile=traced, out=tmp_path / "run", shadow_every=3)
    assert found.losses == expected.losses
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["recorded_steps"] == 4
    said = run["compile"]
    assert said["graphs_at_step"] == {"1": 1} and said["graphs"] == 2, "the switch to eager steps and back costs none"
    times = {row.step: row.time_ms for row in read_log(tmp_path / "run")}
    assert said["eager_ms"] == sorted(times[s] for s in (3, 6, 9))[1]
    ratio = said["eager_ms"] / said["compiled_ms"]
    note = next(n for n in found.notes if "recorded steps ran eager" in n)
    assert note.startswith("4 recorded steps ran eager, not compiled") and f"{ratio:.2f} times as long" in note


def test_a_recorder_around_a_compiled_loop_of_ones_own(tmp_path):
    task = tiny(seed=0)
    model = torch.compile(task.model, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-3)
    compiled = []
    with record(model, tmp_path / "run", optimizer=optimizer, every=4) as rec:
        for step in range(13):
            task.loss(model, task.batch(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
            compiled.append(counters["stats"]["unique_graphs"])
            rec.step()
    assert compiled == [0] + [1] * 12
    said = json.loads((tmp_path / "run" / "run.json").read_text())["compiled"]
    assert "recorded steps ran eager" in said["note"]
    assert said["recorded_ms"] > 0 and said["other_ms"] > 0
    assert said["ratio"] == pytest.approx(said["recorded_ms"] / said["other_ms"])


_DDP = """
import json, sys, torch, torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel
import precscope as ps

dist._DEFAULT_FIRST_BUCKET_BYTES = 20000  # several buckets: torch.compile splits the graph between them
dist.init_process_group("gloo", init_method="file://" + sys.argv[1] + "/store", rank=0, world_size=1)
plan = ps.PrecisionPlan(default="bf16", modules={"1": "fp32"})
x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))

def train(out, compiled):
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(6)), nn.Linear(64, 1))
    losses, graphs = [], []
    with ps.apply(plan, net) as handle:
        model = DistributedDataParallel(net, bucket_cap_mb=0.04)
        if compiled:
            model = torch.compile(model, backend="aot_eager")
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        with ps.record(model, out, optimizer=optimizer, every=3) as rec:
            for step in range(8):
                with handle.autocast():
                    loss = model(x).square().mean()
                loss.backward()
                rec.shadow(lambda: model(x).square().mean(), loss=loss)
                optimizer.step()
                optimizer.zero_grad()
                rec.step()
                losses.append(loss.item())
                graphs.append(counters["stats"]["unique_graphs"])
    return losses, graphs

plain, none = train(sys.argv[1] + "/plain", False)
found, graphs = train(sys.argv[1] + "/compiled", True)
assert found == plain, (found, plain)
assert none == [0] * 8 and graphs[0] == 0 and graphs[1] > 0 and set(graphs[1:]) == {graphs[1]}, graphs
with open(sys.argv[1] + "/compiled/run.json") as file:
    assert "recorded steps ran eager" in json.load(file)["compiled"]["note"]
dist.destroy_process_group()
print("all equal")
"""


def test_recording_and_shadow_steps_of_compiled_ddp(tmp_path):
    slower = "ignore:Guards may run slower:RuntimeWarning"  # torch says so on Python 3.13.0 alone
    command = [sys.executable, "-W", "error", "-W", slower, "-c", _DDP, str(tmp_path)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "all equal", done.stderr


def test_a_recorder_around_an_uncompiled_loop_says_nothing_of_compiling(tmp_path):
    torch.compile(nn.Linear(2, 2), backend="eager")(torch.ones(1, 2))  # another model
    model = nn.Linear(8, 1)
    with record(model, tmp_path / "run", every=2) as rec:
        for _ in range(4):
            model(torch.ones(2, 8)).sum().backward()
            rec.step()
    assert "compiled" not in json.loads((tmp_path / "run" / "run.json").read_text())


def test_a_loss_that_never_calls_the_models_forward_is_told(recwarn):
    task = regression(loss=lambda m, b: F.mse_loss(m.fc2(F.gelu(m.fc1(b[0]))), b[1]))
    result = train(task, steps=2, compile=CompileConfig(backend="eager"))
    assert any(note.startswith("compile=True compiled nothing") for note in result.notes)


@hidden
def test_graph_breaks_of_the_model_are_counted_and_fullgraph_refuses_them():
    class Breaking(Net):
        def forward(self, x):
            y = super().forward(x)
            torch._dynamo.graph_break()
            return y * 2

    result = train(regression(model=Breaking()), steps=2, compile=CompileConfig(backend="aot_eager"))
    assert any("2 graph breaks" in note for note in result.notes), result.notes
    torch.compiler.reset()
    with pytest.raises(TrainingError, match=r"does not compile whole .*train with fullgraph=False, or without compile"):
        train(regression(model=Breaking()), steps=2, compile=traced)


def test_what_is_refused(monkeypatch):
    with pytest.raises(UsageError, match="no backend 'inducter' .did you mean inductor"):
        train(regression(), steps=1, compile=CompileConfig(backend="inducter"))
    with pytest.raises(UsageError, match="compile mode must be one of default, reduce-overhead"):
        CompileConfig(mode="fast")
    with pytest.raises(UsageError, match="not both"):
        CompileConfig(mode="default", options={"max_autotune": True})
    with pytest.raises(
        UsageError, match=r"compile must be True, False or a precscope.training.CompileConfig, not 'yes'"
    ):
        train(regression(), steps=1, compile="yes")
    monkeypatch.setenv("PATH", "/nowhere")
    from torch._inductor import config

    with (
        config.patch({"cpp.cxx": (None, "g++")}),
        pytest.raises(UsageError, match=r"needs a C\+\+ compiler on the CPU, and none was found: install g\+\+"),
    ):
        train(regression(), steps=1, compile=True)


REAL_CXX = shutil.which("c++") or "g++"


@pytest.mark.slow
@inductors_own
@needs_cxx
def test_a_compiler_that_fails_is_told_in_a_sentence(monkeypatch, tmp_path):
    broken = tmp_path / "g++"
    complaint = "x.cpp:1: fatal error: Python.h: No such file"
    broken.write_text(
        f'#!/bin/sh\ncase "$*" in *main.cpp*) echo \'{complaint}\' >&2; exit 1; esac\nexec {REAL_CXX} "$@"\n'
    )
    broken.chmod(0o755)
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with (
        config.patch({"cpp.cxx": (None, str(broken)), "fx_graph_cache": False}),
        pytest.raises(TrainingError, match="fatal error: Python.h: No such file.*install Python's headers") as caught,
    ):
        train(regression(), steps=2, compile=True)
    assert len(str(caught.value)) < 500


GPT = {
    "islands": {"plan": PrecisionPlan(default="bf16", modules={"blocks.1": "fp32"})},
    "fp8": {"plan": PrecisionPlan(default="bf16", modules={"blocks.?.mlp.fc?": "e4m3"})},
}


@pytest.mark.slow
@inductors_own
@needs_cxx
@pytest.mark.parametrize("how", HOW)
def test_inductor_on_a_gpt_ends_near_the_uncompiled_run(how):
    """Fused kernels round elsewhere. The losses of ten steps agree to 2e-3 of their value, bf16's step is 4e-3."""
    settings = {"steps": 10, "lr": 3e-3, **GPT.get(how, HOW[how])}
    expected = train(tiny(seed=0), **settings)
    found = train(tiny(seed=0), compile=True, **settings)
    assert found.losses == pytest.approx(expected.losses, rel=2e-3)
    assert found.eval_loss == pytest.approx(expected.eval_loss, rel=2e-3)


@pytest.mark.slow
@inductors_own
@needs_cxx
@pytest.mark.skipif(not needs_half_matmul(), reason="this CPU multiplies fp16 matrices itself")
def test_compiled_fp16_products_go_through_fp32():
    """2048 products of 1 and 1: each partial sum is exact in fp32, and in fp16 too; 65600 overflows fp16 only at the
    end. An accumulation in fp16 of 4096 times (1 + 2^-10) would lose the small part."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.full((4096, 8), 1 + 2.0**-10))

        def forward(self, x):
            return (x @ self.w).float().mean() * 1e-3

    seen = []

    def loss(model, batch):
        seen.append(model(batch))
        return seen[-1]

    task = Task(model=Product(), loss=loss, batches=[torch.ones(4, 4096)])
    train(task, steps=1, precision="fp16", compile=True, lr=1e-9)
    exact = torch.tensor(4096 * (1 + 2.0**-10)).half().float() * 1e-3
    assert seen[0].item() == pytest.approx(exact.item(), rel=1e-6)
