"""8-bit products of the device (torch._scaled_mm, which the CPU has too) beside their emulation."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import precscope as ps
from precscope.applying import apply, scaled
from precscope.applying.fp8 import round_scaled
from precscope.applying.scaled import cast, missing_on, native_anywhere
from precscope.plans import LayerPrecision, PrecisionPlan
from precscope.tasks import make_task
from precscope.training.tasks.gpt import gpt

E4M3 = PrecisionPlan.uniform("e4m3")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 48, bias=False), nn.LayerNorm(48))


def data(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of one step."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]


def both(model: nn.Module, plan: PrecisionPlan, run) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What `run` gives emulated, and with the device's products."""
    with apply(plan, model) as handle:
        emulated = run(model)
        assert handle.runs[0].how == "emulated"
    with native_anywhere(), apply(plan, model) as handle:
        native = run(model)
        assert "natively (torch._scaled_mm)" in handle.describe()
    return emulated, native


def assert_same(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        # equal operands: only sums of another order may round to another bf16 (2^-8)
        torch.testing.assert_close(a.float(), b.float(), rtol=2.0**-7, atol=2.0**-8 * float(a.abs().max()))


def test_a_product_is_that_of_the_rounded_operands():
    torch.manual_seed(0)
    layer, x, g = nn.Linear(48, 32), data(21, 48).mul_(100).requires_grad_(), data(21, 32, seed=2).bfloat16()
    with native_anywhere(), apply(E4M3, layer):
        y = layer(x)
        y.backward(g)
    q, w = (round_scaled(t.detach(), "e4m3").double() for t in (x, layer.weight))
    r = round_scaled(g, "e5m2").double()
    expected = [q @ w.T + layer.bias.bfloat16().double(), r @ w, r.T @ q, r.sum(0)]
    for found, oracle in zip([y, x.grad, layer.weight.grad, layer.bias.grad], expected, strict=True):
        error = (found.double() - oracle).abs()
        assert (error <= 2.0**-8 * oracle.abs() + 1e-5 * oracle.abs().max()).all()  # half an ulp of bf16
    assert (y.dtype, x.grad.dtype, layer.weight.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)


@pytest.mark.parametrize("policy", ["autocast", "cast"])
@pytest.mark.parametrize("shape", [(16, 32), (3, 7, 32), (32,), (1, 32)])
def test_native_equals_emulated(policy, shape):
    model = net()
    assert_same(*both(model, PrecisionPlan.uniform("e4m3", policy=policy), lambda m: step(m, data(*shape))))


@pytest.mark.parametrize("layout", ["transposed", "bf16", "expanded"])
def test_layouts_of_the_input(layout):
    x = {"transposed": data(32, 24).t(), "bf16": data(24, 32).bfloat16(), "expanded": data(1, 32).expand(24, 32)}
    assert_same(*both(nn.Sequential(nn.Linear(32, 16)), E4M3, lambda m: step(m, x[layout])))


def test_an_empty_batch_is_left_to_the_emulation():
    with native_anywhere(), apply(E4M3, layer := nn.Linear(32, 16)):
        assert layer(torch.zeros(0, 32)).shape == (0, 16)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_so_and_spoils_no_other_row(value):
    x = data(16, 32)
    x[3, 5] = value
    layer, g = nn.Linear(32, 16), data(16, 16, seed=2)
    g[7, 2] = value

    def run(model):
        model.zero_grad()
        y = model(x)
        y.backward(g.to(y.dtype))
        return [y.detach(), layer.weight.grad.clone(), layer.bias.grad.clone()]

    emulated, native = both(layer, E4M3, run)
    for a, b in zip(emulated, native, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
        torch.testing.assert_close(a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0), rtol=2.0**-7, atol=1e-3)
    assert emulated[0].isfinite().all(1).sum() == 15


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_casts_hold_the_emulated_values(fmt):
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).view(256, 256)
    for x in (codes, data(9, 33), data(33, 9).t() * 1e-30, torch.zeros(4, 16), data(5, 16).half()):
        found = cast(x, fmt, columns=True)
        values = found.rows.float() * found.scale
        expected = round_scaled(x.float(), fmt)
        assert torch.equal(values.isnan(), expected.isnan())
        assert torch.equal(values.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))
        m = x.shape[0]
        turned = found.columns.view(torch.uint8)
        assert torch.equal(turned[:, :m].t(), found.rows.view(torch.uint8))
        assert turned.shape == (x.shape[1], -(-m // 16) * 16) and not turned[:, m:].any()


def test_only_8_bit_operands_wait_for_the_backward():
    kept = []
    with native_anywhere(), apply(E4M3, layer := nn.Linear(32, 64)):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            layer(data(16, 32).requires_grad_())
    assert sorted(t.numel() * t.element_size() for t in kept) == [4, 4, 16 * 32, 32 * 64]


class Own(nn.Linear):
    """A linear module that does something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight) * 2


@pytest.mark.parametrize(("module", "compute", "why"), [
    (nn.Linear(32, 5), "e4m3", "weight 5 x 32: both must be multiples of 16"),
    (nn.Linear(32, 16), "e5m2", "no instruction multiplies e5m2 by e5m2"),
    (nn.Conv2d(16, 16, 3), "e4m3", "only linear modules have scaled products"),
    (Own(32, 16), "e4m3", "Own has a forward of its own"),
    (nn.Linear(32, 16).double(), "e4m3", "weight stored as float64"),
])  # fmt: skip
def test_it_says_what_is_emulated_and_why(module, compute, why):
    model = nn.Sequential(nn.Linear(32, 16), module)
    plan = PrecisionPlan(modules={"0": "e4m3", "1": compute})
    with native_anywhere(), apply(plan, model) as handle:
        text = handle.describe()
    assert why in text and "1 linear modules multiply e4m3 natively (torch._scaled_mm)" in text
    with apply(plan, model) as handle:
        assert {r.how for r in handle.runs if r.module} == {"emulated"}
        assert "no scaled 8-bit products on cpu" in handle.describe()


def test_a_region_of_both_says_partly():
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 5))
    with native_anywhere(), apply(E4M3, model) as handle:
        assert [r.how for r in handle.runs] == ["partly native"]
        assert "rounded to e4m3, the rest in bf16: weight 5 x 16" in handle.describe()
        assert model(data(4, 32)).shape == (4, 5)


def test_what_the_product_does_not_take_is_emulated():
    layer = nn.Linear(32, 16)
    emulated, native = both(layer, E4M3, lambda m: [m(input=data(4, 32)).detach()])
    assert torch.equal(emulated[0], native[0])
    with native_anywhere(), apply(E4M3, layer):
        zeros = {"weight": torch.zeros(16, 32), "bias": torch.ones(16)}
        assert torch.equal(torch.func.functional_call(layer, zeros, (data(4, 32),)), torch.ones(4, 16).bfloat16())
        program = torch.export.export(layer, (data(4, 32),), strict=False)
    assert "_scaled_mm" not in str(program.graph)


def test_inference_and_frozen_parameters():
    model = net()
    emulated, native = both(model, E4M3, lambda m: [_inferred(m)])
    assert_same(emulated, native)
    model[0].weight.requires_grad_(False)
    model[2].requires_grad_(False)
    with native_anywhere(), apply(E4M3, model):
        model(data(16, 32)).float().square().sum().backward()
    assert model[0].weight.grad is None and model[0].bias.grad.abs().sum() > 0 and model[2].weight.grad is None


@torch.inference_mode()
def _inferred(model: nn.Module) -> torch.Tensor:
    return model(data(16, 32)).clone()


def test_without_gradients_nothing_is_written_for_a_backward(monkeypatch):
    asked = []
    monkeypatch.setattr(scaled, "cast", lambda *args, **how: asked.append(how["columns"]) or cast(*args, **how))
    with native_anywhere(), apply(E4M3, layer := nn.Linear(32, 16)):
        with torch.no_grad():
            layer(data(4, 32))
        assert asked == [False, False]
        layer(data(4, 32).requires_grad_())
    assert asked == [False, False, True, True]


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch 2.15, of vmap
def test_gradients_of_gradients_are_refused_and_vmap_is_emulated():
    with native_anywhere(), apply(E4M3, layer := nn.Linear(32, 16)):
        x = data(4, 32).requires_grad_()
        (slope,) = torch.autograd.grad(layer(x).float().square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            slope.sum().backward()
        assert torch.func.vmap(layer)(data(3, 4, 32)).shape == (3, 4, 16)


def test_each_step_sees_the_weights_as_they_are_also_written_through_data():
    layer = nn.Linear(32, 16, bias=False)
    with native_anywhere(), apply(E4M3, layer):
        layer(data(4, 32))
        layer.weight.data.zero_()
        assert not layer(data(4, 32)).any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    model = net()
    with native_anywhere(), apply(E4M3, model):
        expected = step(model, data(16, 32))
        found = step(lambda_module(lambda x: checkpoint(model, x, use_reentrant=reentrant), model), data(16, 32))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def lambda_module(call, model: nn.Module) -> nn.Module:
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return call(x)

    return Called()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # dynamo's own doing, hidden where not an error
@pytest.mark.parametrize("policy", ["autocast", pytest.param("cast", marks=pytest.mark.slow)])
def test_compiled_whole_and_equal(policy):
    torch.compiler.reset()
    model = net()
    with native_anywhere(), apply(PrecisionPlan.uniform("e4m3", policy=policy), model):
        expected = step(model, data(3, 7, 32))
        graphs = []

        def backend(graph, example):
            graphs.append(graph.print_readable(print_output=False))
            return torch._dynamo.lookup_backend("aot_eager")(graph, example)

        found = step(torch.compile(model, backend=backend, fullgraph=True), data(3, 7, 32))
    torch.compiler.reset()
    assert "_scaled_mm" in graphs[0]
    assert_same(expected, found)


def test_conv1d_of_transformers():
    conv1d = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed").Conv1D
    torch.manual_seed(0)
    layer = conv1d(48, 32)
    assert_same(*both(layer, E4M3, lambda m: step(m, data(5, 32))))


def test_recording_changes_nothing(tmp_path):
    model = net()

    def losses(watch):
        found, optimizer = [], torch.optim.SGD(model.parameters(), lr=0.01)
        start = {k: v.clone() for k, v in model.state_dict().items()}
        for i in range(3):
            loss = model(data(16, 32, seed=i)).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
            if watch:
                watch.step()
        model.load_state_dict(start)
        return found

    with native_anywhere(), apply(PrecisionPlan(default=LayerPrecision("e4m3")), model):
        plain = losses(None)
        with ps.record(model, tmp_path / "run", every=1) as watch:
            assert losses(watch) == plain
    assert len(ps.Profile.load(tmp_path / "run").steps) == 3


def test_training_says_which():
    plan = PrecisionPlan(modules={"blocks.*": "e4m3"})
    emulated = _trained(plan)
    with native_anywhere():
        native = _trained(plan)
    assert any(n.startswith("8-bit products emulated: ") and "on cpu" in n for n in emulated.notes)
    assert any(n.startswith("8-bit products native: 4 linear modules") for n in native.notes)
    assert emulated.losses == pytest.approx(native.losses, rel=1e-3)


def _trained(plan: PrecisionPlan) -> Any:
    task = make_task(partial(gpt, "tiny"), seed=0)
    task.eval_batches = None
    return ps.train(task, plan=plan, steps=3)


DDP = """
import sys, torch, torch.distributed as dist
from torch import nn
from precscope.applying import apply, scaled
from precscope.applying.scaled import native_anywhere
from precscope.plans import PrecisionPlan
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
torch.manual_seed(0)
model, x = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 16)), torch.randn(16, 32)
with native_anywhere(), apply(PrecisionPlan.uniform("e4m3"), model) as handle:
    assert handle.runs[0].how == "native"
    model(x).float().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    nn.parallel.DistributedDataParallel(model)(x).float().sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(expected, model.parameters()))
dist.destroy_process_group()
print("all equal")
"""


@pytest.mark.slow
def test_under_ddp(tmp_path):
    command = [sys.executable, "-W", "error", "-c", DDP, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "all equal", done.stderr


def test_no_device_but_cuda_has_them_here():
    assert missing_on(torch.device("cpu")) == "no scaled 8-bit products on cpu"
    with native_anywhere():
        assert missing_on(torch.device("cpu")) == ""


INTERPRETED = """
import math, torch
from precscope.applying import scaled, scaled_triton

codes = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).view(256, 256)
x = torch.randn(70, 90) * torch.exp2(torch.randint(-30, 4, (70, 90)).float())
special = x.clone()
special[3, 4], special[5, 6], special[7, 8], special[9] = math.inf, -math.inf, math.nan, 0.0
ties = torch.arange(2**12).float().view(64, 64) / 64
for y in (codes, x, x.t(), x[:1].expand(37, 90), special, ties, torch.zeros(5, 16), torch.full((3, 3), 1e-45), x.half(),
          x * 2.0**-120, x * 2.0**120):
    for fmt in ("e4m3", "e5m2"):
        expected = scaled.cast(y, fmt, rows=True, columns=True)
        found = scaled_triton.cast(y, fmt, rows=True, columns=True)
        assert expected.scale == found[2]
        for a, b in zip(expected[:2], found[:2]):
            assert a.shape == b.shape and a.dtype == b.dtype
            same = (a.view(torch.uint8) == b.view(torch.uint8)) | (a.float().isnan() & b.float().isnan())
            assert same.all(), (fmt, int((~same).sum()))
assert scaled_triton.cast(special, "e4m3", rows=False, columns=True)[0] is None
print("all equal")
"""


def test_the_triton_casts_equal_torchs():
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "all equal" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_the_triton_casts_compile_for_a_gpu_with_wide_loads_and_stores(kind):
    triton = pytest.importorskip("triton", reason="triton is not installed")
    from triton.backends.compiler import GPUTarget

    from precscope.applying import scaled_triton as ours

    constants = {"stride_n": 1, "p": 3, "bias": 7, "infinity": 127, "target": 7, "rows": True, "columns": True,
                 "tile": ours._TILE}  # fmt: skip
    signature = {"x_pointer": f"*{kind}", "bits_pointer": "*i32", "scale_pointer": "*fp32", "rows_pointer": "*u8",
                 "columns_pointer": "*u8", "m": "i32", "n": "i32", "padded": "i32", "stride_m": "i32"}  # fmt: skip
    aligned = {(at,): [["tt.divisibility", 16]] for at in (0, 3, 4, 6, 7, 8)}
    signature |= dict.fromkeys(constants, "constexpr")
    source = triton.compiler.ASTSource(fn=ours._cast_kernel, signature=signature, constexprs=constants, attrs=aligned)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=ours._OPTIONS).asm["ptx"]
    assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx


@pytest.mark.gpu
@pytest.mark.skipif(
    bool(not torch.cuda.is_available() or missing_on(torch.device("cuda"))), reason="needs a GPU with 8-bit products"
)
@pytest.mark.parametrize("shape", [(256, 512), (3, 7, 512), (8, 128, 512)])
def test_on_a_gpu_native_is_taken_and_equals_the_emulation(shape):
    """Emulated on the CPU; the GPU's sums are fp32 of another order."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(512, 256), nn.GELU(), nn.Linear(256, 128)), data(*shape)
    with apply(E4M3, model):
        expected = step(model, x)
    model.cuda()
    with apply(E4M3, model) as handle:
        assert [r.how for r in handle.runs] == ["native"]
        found = [t.cpu() for t in step(model, x.cuda())]
        compiled = [t.cpu() for t in step(torch.compile(model, fullgraph=True), x.cuda())]
    for a, b, c in zip(expected, found, compiled, strict=True):
        assert a.dtype == b.dtype == c.dtype
        # a bf16 of other rounding may fall to another 8-bit value in the next layer
        assert (a.float() - b.float()).norm() <= 0.03 * a.float().norm()
        assert (a.float() - c.float()).norm() <= 0.03 * a.float().norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_casts_equal_the_cpus_and_do_not_wait():
    for x in (data(70, 90), data(90, 70).t().bfloat16(), data(1, 64).expand(33, 64)):
        for fmt in ("e4m3", "e5m2"):
            expected, there = cast(x, fmt, columns=True), x.cuda()
            torch.cuda.set_sync_debug_mode("error")
            try:
                found = cast(there, fmt, columns=True)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            for a, b in zip(expected, found, strict=True):
                assert torch.equal(a.view(torch.uint8), b.cpu().view(torch.uint8))
