"""Plans under torch.compile and DDP: the same results, and no graph break that the plan causes."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from precscope.applying import apply
from precscope.errors import PlanError
from precscope.plans import LayerPrecision, PrecisionPlan
from precscope.tasks import make_task
from precscope.training.tasks.gpt import gpt

hidden = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
"""A warning of dynamo's own, which it hides where warnings are not errors."""

PLANS = {
    "autocast": PrecisionPlan.uniform("bf16"),
    "island": PrecisionPlan(default="bf16", modules={"blocks.1": "fp32"}),
    "cast": PrecisionPlan.uniform("bf16", policy="cast"),
    "master weights": PrecisionPlan(
        default=LayerPrecision("bf16", policy="cast", params="fp32"), modules={"blocks.*.norm": "fp32"}
    ),
    "low storage": PrecisionPlan.uniform("bf16", params="bf16"),
    "alternating": PrecisionPlan(modules={"blocks.0": LayerPrecision("fp16", policy="cast"), "blocks.1.fc": "bf16"}),
    "fp8": PrecisionPlan(default="bf16", modules={"blocks.?.fc": "e4m3"}),
    "tf32": PrecisionPlan(default="tf32", modules={"head": "fp32"}),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    """torch.compile keeps code per function object; start and end without any."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 8)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: torch.Tensor, options: dict | None = None) -> torch.Tensor:
        y = F.gelu(self.fc(self.norm(x)))
        if self.training:
            self.mean.add_(y.detach().mean(0).to(self.mean.dtype) / 3)
        return x + y * (options["gain"] if options else 1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, options={"gain": torch.ones(8)})
        return self.head(x)


x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, net: Net) -> list[torch.Tensor]:
    """Output, gradients and buffers of one step, buffers reset before."""
    for buffer in net.buffers():
        buffer.zero_()
    net.zero_grad(set_to_none=True)
    y = model(x)
    y.float().square().sum().backward()
    return [y.detach(), *(p.grad for p in net.parameters()), *(b.clone() for b in net.buffers())]


def assert_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", PLANS)
def test_a_planned_model_compiles_whole_and_gives_the_same(name):
    net = Net()
    with apply(PLANS[name], net):
        expected = step(net, net)
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        assert_equal(step(compiled, net), expected)


GPT_PLANS = {
    "islands": PrecisionPlan(default="bf16", modules={"blocks.1": "fp32", "blocks.0.attn": "fp32", "ln_f": "fp32"}),
    "mixed": PrecisionPlan(
        modules={"blocks.0": LayerPrecision("fp16", policy="cast"), "blocks.1.mlp.fc1": "bf16", "head": "bf16"}
    ),
    "cast": PrecisionPlan(
        default=LayerPrecision("bf16", policy="cast", params="fp32"), modules={"blocks.?.ln?": "fp32"}
    ),
    "low storage": PrecisionPlan.uniform("bf16", params="bf16"),
    "fp8": PrecisionPlan(default="bf16", modules={"blocks.?.mlp.fc?": "e4m3", "blocks.0.attn.qkv": "e5m2"}),
}


@pytest.mark.parametrize(
    "name", [n if n in ("islands", "fp8") else pytest.param(n, marks=pytest.mark.slow) for n in GPT_PLANS]
)
def test_a_planned_gpt_compiles_whole_and_gives_the_same_gradients(name):
    task = make_task(partial(gpt, "tiny"), seed=0)
    net, batch = task.model, task.batch(0)

    def gradients(model):
        net.zero_grad(set_to_none=True)
        with handle.autocast():
            loss = task.loss(model, batch)
        loss.backward()
        return [loss.detach(), *(p.grad for p in net.parameters())]

    with apply(GPT_PLANS[name], net) as handle:
        expected = gradients(net)
        assert_equal(gradients(torch.compile(net, backend="aot_eager", fullgraph=True)), expected)


class Products(TorchDispatchMode):
    """The dtypes of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.dtypes.append(out.dtype)
        return out


def test_the_backward_pass_of_an_fp32_island_is_fp32_where_the_loss_is_under_autocast():
    """torch.compile takes the autocast around the forward pass to be around the backward pass, too, and lowers the
    island's products there (first half: said in a warning); PlanHandle.autocast keeps them as in eager mode."""
    net = Net()
    plan = PrecisionPlan(default="bf16", modules={"blocks": "fp32"})
    seen = {}
    warned = pytest.warns(RuntimeWarning, match=r"leaves autocast .* will run under autocast.*use `with handle.auto")
    with apply(plan, net) as handle:
        for name, context in (("plain", torch.autocast("cpu", dtype=torch.bfloat16)), ("ours", handle.autocast())):
            torch.compiler.reset()
            with context, warned if name == "plain" else nullcontext():
                loss = torch.compile(net, backend="aot_eager", fullgraph=True)(x).float().square().sum()
            with Products() as products:
                loss.backward()
            seen[name] = products.dtypes
        with handle.autocast():
            loss = net(x).float().square().sum()
        with Products() as products:
            loss.backward()
    assert seen["ours"] == products.dtypes == [torch.bfloat16] * 2 + [torch.float32] * 4
    assert set(seen["plain"]) == {torch.bfloat16}


def test_the_loss_compiled_with_the_plans_autocast_inside():
    net = Net()
    with apply(PLANS["island"], net) as handle:

        def loss(batch):
            with handle.autocast():
                return F.mse_loss(net(batch), torch.ones(4, 2))

        assert torch.equal(torch.compile(loss, backend="eager", fullgraph=True)(x), loss(x))


class Branching(nn.Module):
    """Modules that run only sometimes: by a flag, by the mode, by the shape; one twice, one never."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.unused = (nn.Linear(8, 8) for _ in range(4))
        self.extra = None
        self.deep = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.a(x))
        if self.deep:
            x = self.b(self.b(x))
        if self.training and x.shape[0] > 2:
            x = x + self.c(x)
        return x if self.extra is None else self.extra(x)


def test_a_model_with_conditional_modules():
    net = Branching()
    plan = PrecisionPlan(default="bf16", modules={"b": "fp32", "c": LayerPrecision("fp16", policy="cast")})
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    with apply(plan, net):
        for deep in (False, True):
            for training in (True, False):
                net.deep = deep
                net.train(training)
                for data in (x, x[:2]):
                    results = []
                    for model in (net, compiled):
                        net.zero_grad(set_to_none=True)
                        y = model(data)
                        y.float().sum().backward()
                        grads = [p.grad for p in net.parameters()]
                        results.append([y.detach(), *(g for g in grads if g is not None)])
                    assert_equal(*results)


def test_a_planned_model_compiles_for_inference():
    net = Net().eval()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with apply(PLANS["master weights"], net), torch.no_grad():
        assert torch.equal(compiled(x), net(x))


def test_a_model_compiled_before_gets_the_plan_and_loses_it_again():
    net = Net()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    plain = step(compiled, net)
    with apply(PLANS["master weights"], compiled) as handle:
        assert handle.model is net
        inside = step(compiled, net)
        assert inside[0].dtype == torch.bfloat16
        assert_equal(inside, step(net, net))
    assert_equal(step(compiled, net), plain)


def test_a_plan_on_an_inner_module_of_a_compiled_model():
    net = Net()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    plain = compiled(x)
    with apply(PrecisionPlan.uniform("bf16"), net.blocks[1]):
        assert torch.equal(compiled(x), net(x))
        assert not torch.equal(compiled(x), plain)
    assert torch.equal(compiled(x), plain)


@hidden
def test_compiled_blocks_inside_a_model_are_found_by_their_own_names():
    net = Net()
    for i, block in enumerate(net.blocks):
        net.blocks[i] = torch.compile(block, backend="eager", fullgraph=True)
    plan = PrecisionPlan(default="bf16", modules={"blocks.1": "fp32", "blocks.0.fc": "fp16"})
    with apply(plan, net) as handle:
        assert [r.module for r in handle.runs] == ["", "blocks.0.fc", "blocks.1"]
        with pytest.warns(RuntimeWarning, match=r"backward_pass_autocast = 'off'"):  # the plan's own autocast is on
            y = net(x)
    reference = Net()
    with apply(plan, reference):
        assert torch.equal(reference(x), y)


@hidden
def test_graph_breaks_of_the_model_itself_do_not_exhaust_recompilations():
    class Breaking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            torch._dynamo.graph_break()
            return self.fc(x)

    net = nn.Sequential(*(Breaking() for _ in range(12)))
    plan = PrecisionPlan.uniform("bf16", policy="cast", params="fp32")
    with apply(plan, net), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        compiled = torch.compile(net, backend="eager")
        assert torch.equal(compiled(x), net(x))
        assert torch.equal(compiled(x), net(x))


_DDP = """
import copy, os, sys, torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from precscope.applying import apply
from precscope.errors import PlanError
from precscope.plans import LayerPrecision, PrecisionPlan

dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
x = torch.randn(4, 8)

def gradients(model, net):
    net.zero_grad()
    model(x).float().square().sum().backward()
    return [p.grad.clone() for p in net.parameters()]

autocast = PrecisionPlan(default="bf16", modules={"2": "fp32"})
masters = PrecisionPlan(default=LayerPrecision("bf16", policy="cast", params="fp32"), modules={"2": "fp32"})
half = PrecisionPlan.uniform("bf16", policy="cast")
for plan in (autocast, masters, half):
    twin = copy.deepcopy(net)
    with apply(plan, twin):
        expected = gradients(twin, twin)
    for wrap_first in (True, False):
        inner = copy.deepcopy(net)
        if wrap_first:
            model = DistributedDataParallel(inner)
            if plan is half:
                try:
                    apply(plan, model)
                except PlanError as error:
                    assert "apply the plan first, then wrap the model in DDP" in str(error)
                    continue
                raise SystemExit("storage was converted under DDP")
            handle = apply(plan, model)
        else:
            handle = apply(plan, inner)
            model = DistributedDataParallel(inner)
        found = gradients(model, inner)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), plan
        assert torch.equal(inner[1].running_var, twin[1].running_var)
        handle.remove()
dist.destroy_process_group()
print("all equal")
"""


def test_ddp_with_the_plan_applied_before_or_after(tmp_path):
    root = Path(__file__).parents[1]
    command = [sys.executable, "-W", "error", "-c", _DDP, str(tmp_path / "store")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "all equal", done.stderr


def test_data_parallel_is_refused():
    with pytest.raises(ValueError, match="use DDP instead"):
        apply(PrecisionPlan(), nn.DataParallel(nn.Linear(2, 2)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", PLANS)
def test_on_cuda_eager_and_compiled(name):
    net = Net().cuda()
    data = x.cuda()
    before = (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision)
    exact = net(data)
    stored = {k: v.clone() for k, v in net.state_dict().items()}
    with apply(PLANS[name], net):
        y = net(data)
        assert torch.allclose(y.float(), exact, atol=0.1)
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(data), net(data)) or name == "tf32"
        y.float().sum().backward()
    assert before == (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision)
    assert all(torch.equal(v, stored[k]) for k, v in net.state_dict().items() if "mean" not in k)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_uniform_plan_is_autocast_on_cuda():
    net = Net().cuda().eval()
    for fmt, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        with torch.autocast("cuda", dtype=dtype):
            expected = net(x.cuda())
        with apply(PrecisionPlan.uniform(fmt), net):
            assert torch.equal(net(x.cuda()), expected)


def test_an_error_names_the_module_that_has_a_plan_already():
    net = Net()
    with apply(PrecisionPlan(), net.blocks[1]), pytest.raises(PlanError, match=r"blocks\.1 already"):
        apply(PrecisionPlan(), torch.compile(net, backend="eager"))
