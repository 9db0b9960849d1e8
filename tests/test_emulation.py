"""Emulation against real half execution, ml_dtypes and PyTorch's own autocast."""

from __future__ import annotations

import copy
import random
import warnings

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import ALL, MLP, batch, loss_of
from torch import nn

from precscope import quantize
from precscope.emulation import emulate
from precscope.emulation.autocast import entry_of, entry_of_node, lists
from precscope.errors import FormatError, ModelError, PlanError, UsageError
from precscope.recording import record
from precscope.recording.ops import record_ops
from precscope.tracing import trace

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Run(nn.Module):
    """A module whose forward is a function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def values(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


ELEMENTWISE = {
    "add": lambda x, y: x + y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "square": lambda x, y: x.square(),
    "relu": lambda x, y: F.relu(x),
    "scalar": lambda x, y: x * 0.1,
    "in_place": lambda x, y: x.clone().mul_(y).add_(1),
    "out": lambda x, y: torch.mul(x, y, out=torch.empty_like(x)),
    "clamp": lambda x, y: x.clamp(-1, 1),
    "masked": lambda x, y: x.masked_fill(y > 0, -1e4),
    "where": lambda x, y: torch.where(y > 0, x, y),
    "chain": lambda x, y: (x * y + x) / (y.abs() + 1) - x,
    "cat": lambda x, y: torch.cat([x, y * x], -1)[:, 3:],
    "gather": lambda x, y: (x * y).gather(1, y.argsort(-1)),
}


@pytest.mark.parametrize("fmt", HALVES)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_ops_equal_half_execution_bit_for_bit(name, fmt):
    x, y = values(64, 33, scale=100.0), values(64, 33, seed=1)
    real = ELEMENTWISE[name](x.to(HALVES[fmt]), y.to(HALVES[fmt]))
    model = Run(ELEMENTWISE[name])
    with emulate(model, fmt):
        ours = model(x, y)
    assert ours.dtype is torch.float32
    assert torch.equal(ours, real.float())


@pytest.mark.parametrize("fmt", HALVES)
@pytest.mark.parametrize("function", [torch.exp, torch.tanh, torch.sigmoid, F.gelu, torch.log1p, torch.sqrt])
def test_transcendental_ops_are_within_an_ulp_of_half_execution(function, fmt):
    x = values(64, 33).abs()
    model = Run(function)
    with emulate(model, fmt):
        ours = model(x)
    real = function(x.to(HALVES[fmt])).float()
    eps = torch.finfo(HALVES[fmt]).eps
    assert torch.equal(quantize(ours, fmt), ours)
    assert torch.allclose(ours, real, rtol=eps, atol=torch.finfo(HALVES[fmt]).tiny)
    assert (ours == real).float().mean() > 0.99


def test_every_op_overflows_on_its_own():
    model = Run(lambda x: (x * x) / (x * x))
    x = torch.tensor([300.0, 2.0])
    with emulate(model, "fp16"):
        assert model(x).isnan().tolist() == [True, False]
    with emulate(model, "fp16", saturate=True):
        assert model(x).tolist() == [1.0, 1.0]
    with emulate(model, "bf16"):
        assert model(x).tolist() == [1.0, 1.0]
    assert model(x).tolist() == [1.0, 1.0]


def test_e4m3_against_ml_dtypes():
    x, y = values(50, 50, scale=20.0), values(50, 50, seed=1)
    model = Run(lambda a, b: a * b)
    with emulate(model, "e4m3"):
        ours = model(x, y)
    e4m3 = ml_dtypes.float8_e4m3fn
    product = x.numpy().astype(e4m3).astype(np.float32) * y.numpy().astype(e4m3).astype(np.float32)
    assert np.array_equal(ours.numpy(), product.astype(e4m3).astype(np.float32), equal_nan=True)


@pytest.mark.parametrize("fmt", HALVES)
def test_matrix_products_round_operands_and_result(fmt):
    layer = nn.Linear(64, 32)
    x = values(16, 64)
    with emulate(layer, fmt):
        ours = layer(x)
    q = lambda t: quantize(t, fmt)  # noqa: E731
    expected = q((q(x).double() @ q(layer.weight).double().T + q(layer.bias).double()).float())
    real = copy.deepcopy(layer).to(HALVES[fmt])(x.to(HALVES[fmt])).float()
    eps = torch.finfo(HALVES[fmt]).eps
    assert torch.allclose(ours, expected, rtol=eps, atol=eps * 0.1)
    assert torch.allclose(ours, real, rtol=2 * eps, atol=2 * eps)
    assert torch.equal(q(ours), ours)


@pytest.mark.parametrize("fmt", HALVES)
def test_gradients_equal_those_of_the_half_model(fmt):
    torch.manual_seed(0)
    model = MLP(8, 4)
    data, labels = batch(0)
    with emulate(model, fmt):
        loss_of(model, (data, labels)).backward()
    real = copy.deepcopy(model).to(HALVES[fmt])
    real.zero_grad()
    F.cross_entropy(real(data.to(HALVES[fmt])).float(), labels).backward()
    for (name, ours), theirs in zip(model.named_parameters(), real.parameters(), strict=True):
        assert torch.equal(quantize(ours.grad, fmt), ours.grad), name
        error = (ours.grad - theirs.grad.float()).norm() / theirs.grad.float().norm()
        assert error < 3 * torch.finfo(HALVES[fmt]).eps, (name, error)


def test_backward_false_leaves_gradient_ops_alone():
    model = Run(lambda x: x * 3)
    x = torch.tensor([1.0], requires_grad=True)
    for backward, expected in ((True, float("inf")), (False, 3 * 30000.0)):
        x.grad = None
        with emulate(model, "fp16", backward=backward):
            (model(x) * 30000.0).sum().backward()  # the loss outside the module is not emulated
        assert x.grad.item() == expected


def test_gradients_of_a_square_overflow_where_real_ones_do():
    model = Run(lambda x: (x**3).sum())
    x = torch.tensor([200.0], requires_grad=True)
    with emulate(model, "fp16"):
        model(x).backward()
    half = torch.tensor([200.0], dtype=torch.float16, requires_grad=True)
    (half**3).sum().backward()
    assert x.grad.isinf().all() and half.grad.isinf().all()


def test_formats_by_name_pattern_and_parent():
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList([MLP(8, 8) for _ in range(3)]), "head": nn.Linear(8, 8)})
    x = values(4, 8)
    outputs = {}
    with emulate(model, {"blocks.1": "bf16", "blocks.1.act": "fp32", "blocks.[2-9].*": "e4m3", "head": "e5m2"}):
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.GELU):
                width = module.in_features if isinstance(module, nn.Linear) else 16
                outputs[name] = module(x if width == 8 else torch.cat([x, x], 1))
    rounded = {n: [f for f in ("bf16", "e4m3", "e5m2") if torch.equal(quantize(y, f), y)] for n, y in outputs.items()}
    assert rounded["blocks.0.fc1"] == [] == rounded["blocks.1.act"]
    assert rounded["blocks.1.fc1"] == ["bf16"] == rounded["blocks.1.fc2"]
    assert all("e4m3" in rounded[f"blocks.2.{n}"] for n in ("fc1", "act", "fc2"))
    assert "e5m2" in rounded["head"]


def test_wrong_use_says_what_is_wrong():
    model = MLP()
    with pytest.raises(UsageError, match=r"no module 'fc3' \(did you mean .*fc1"):
        emulate(model, {"fc3": "fp16"})
    with pytest.raises(UsageError, match=r"pattern 'x\.\*' matches no module"):
        emulate(model, {"x.*": "fp16"})
    with pytest.raises(PlanError, match="matches two patterns"):
        emulate(model, {"f*": "fp16", "*1": "bf16"})
    with pytest.raises(FormatError, match="did you mean"):
        emulate(model, "fp61")
    with pytest.raises(UsageError, match="policy must be 'cast'"):
        emulate(model, "fp16", policy="amp")
    with pytest.raises(UsageError, match="device must be 'cuda' or 'cpu'"):
        emulate(model, "fp16", device="tpu")
    with pytest.raises(ModelError, match="takes a torch.nn.Module"):
        emulate(torch.exp, "fp16")
    with emulate(model, "fp16"):
        with pytest.raises(UsageError, match="emulation is active already"):
            emulate(model, "bf16").__enter__()
        assert torch.equal(quantize(y := model(values(2, 8)), "fp16"), y)
    with emulate(model, "fp16"):
        pass  # the refused one left nothing behind


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("policy", ["cast", "autocast"])
def test_everything_is_left_as_found(name, policy):
    torch.manual_seed(1)
    model = ALL[name]()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state, python = torch.get_rng_state(), random.getstate()
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    with emulate(model, "bf16", policy=policy):
        loss = loss_of(model, batch(0))
        loss.backward()
        torch.rand(3)
    assert loss.isfinite()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    reference = copy.deepcopy(model)
    reference.zero_grad()
    exact = loss_of(reference, batch(0))
    exact.backward()
    assert abs(loss - exact) < 0.1
    for (key, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        if q.grad is not None:
            ours, theirs = (g.to_dense() if g.is_sparse else g for g in (p.grad, q.grad))
            assert torch.allclose(ours, theirs, rtol=0.1, atol=0.02), key


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same(reentrant):
    torch.manual_seed(0)
    from models import Checkpointed

    checkpointed = Checkpointed(reentrant=reentrant)
    plain = copy.deepcopy(checkpointed)
    plain.forward = lambda x: plain.head((h := plain.stem(x)) + plain.body(h))
    data = batch(0)
    gradients = []
    for model in (checkpointed, plain):
        with emulate(model, "bf16"):
            loss_of(model, data).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_after_an_exception_nothing_is_left():
    def fail(x):
        raise ZeroDivisionError

    model = nn.Sequential(nn.Linear(8, 8), Run(fail))
    with pytest.raises(ZeroDivisionError):
        with emulate(model, "fp16"):
            model(values(2, 8))
    with emulate(model, "fp16"):
        pass


def test_running_statistics_are_rounded_inside_and_restored():
    norm = nn.BatchNorm1d(4)
    norm.running_var.fill_(1e6)
    norm.eval()
    x = values(8, 4, scale=1e3)
    with emulate(norm, "fp16"):
        assert norm(x).abs().max() == 0  # 1e6 is inf in fp16, as in .half()
    assert norm.running_var[0] == 1e6
    norm.train()
    with emulate(norm, "fp16"):
        norm(x)
        inside = norm.running_mean.clone()
    assert torch.equal(quantize(inside, "fp16"), inside) and inside.abs().max() > 0
    assert norm.running_mean.abs().max() == 0 and norm.num_batches_tracked == 0


def test_integers_views_and_random_numbers_are_untouched():
    def forward(x):
        index = torch.arange(5000)[-3:] * 3
        noise = torch.rand(1000)
        return index, x[2:5].view(-1), (noise > 0.5).sum()

    model = Run(forward)
    x = values(10)
    torch.manual_seed(3)
    plain = model(x)
    torch.manual_seed(3)
    with emulate(model, "e4m3", rounding="stochastic"):
        index, view, _ = model(x)
    assert torch.equal(index, plain[0])
    assert torch.equal(view, plain[1]) and view.data_ptr() == x[2:5].data_ptr()


def test_stochastic_rounding_is_seeded_and_leaves_the_generator():
    model = Run(lambda x: x * 1.3)
    x = values(1000)

    def run(seed):
        with emulate(model, "e4m3", rounding="stochastic", seed=seed):
            before = torch.get_rng_state()
            y = model(x)
            assert torch.equal(before, torch.get_rng_state())
            return y

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


def test_a_cast_to_float32_by_name_is_kept():
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x):
            dtype = x.dtype
            x = x.to(torch.float32)
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
            return self.weight * x.to(dtype)

    class Hidden(Norm):
        def forward(self, x):
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    x = torch.full((1, 4), 300.1, requires_grad=True)
    for kind, finite in ((Norm, True), (Hidden, False)):
        norm = kind()
        with emulate(norm, "fp16"):
            y = norm(x)
            y.sum().backward()
        real = copy.deepcopy(norm).half()(x.detach().half()).float()
        assert torch.equal(y.detach(), real)
        assert (y != 0).all() == finite
        assert torch.equal(quantize(x.grad, "fp16"), x.grad)
    softmax = Run(lambda x: torch.softmax(x, -1, dtype=torch.float32))
    with emulate(softmax, "e4m3"):
        assert torch.allclose(softmax(values(2, 9)).sum(-1), torch.ones(2), atol=1e-6)


def test_inside_a_module_dtypes_answer_as_in_the_real_run():
    class Asks(nn.Module):
        def forward(self, x, mask):
            self.dtypes = x.dtype, x.float().dtype, torch.arange(3.0).dtype, mask.to(x.dtype).dtype
            hidden = x.masked_fill(mask, torch.finfo(x.dtype).min)
            return hidden, mask.to(x.dtype) * 1000.1, torch.full((2,), 0.1, dtype=x.dtype), x.half() * 1

    model, x, mask = Asks(), values(2), torch.tensor([True, False])
    with emulate(model, "bf16"):
        outputs = model(x, mask)
        assert outputs[0].dtype is torch.float32  # asked outside
    assert model.dtypes == (torch.bfloat16, torch.float32, torch.float32, torch.bfloat16)
    real = model(x.bfloat16(), mask)
    assert model.dtypes == (torch.bfloat16, torch.float32, torch.float32, torch.bfloat16)
    for ours, theirs in zip(outputs, real, strict=True):
        assert torch.equal(ours, theirs.float())


def test_the_module_after_an_upcast_one_is_rounded_again():
    model = nn.Sequential(Run(lambda x: x.float() * 1.1), nn.Linear(8, 8))
    with emulate(model, "fp16"):
        y = model(values(2, 8))
    assert torch.equal(quantize(y, "fp16"), y)


@pytest.mark.parametrize("fmt", HALVES)
def test_additions_one_by_one_stagnate_as_in_the_real_format(fmt):
    n = 5000
    index = torch.zeros(n, dtype=torch.long)
    model = Run(lambda x: torch.zeros_like(x[:1]).index_add(0, index, x))
    with emulate(model, fmt):
        ours = model(torch.ones(n))
    real = torch.zeros(1, dtype=HALVES[fmt]).index_add(0, index, torch.ones(n, dtype=HALVES[fmt]))
    assert ours.item() == real.item() < n
    summing = Run(lambda x: x.sum())
    with emulate(summing, fmt):
        assert summing(torch.ones(n)).item() == torch.ones(n, dtype=HALVES[fmt]).sum().item()


def test_the_optimizer_is_not_emulated():
    model = MLP()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with emulate(model, "e4m3", outside=True):
        loss_of(model, batch(0)).backward()
        optimizer.step()
    assert not torch.equal(quantize(model.fc1.weight.detach(), "e4m3"), model.fc1.weight)
    assert all(not torch.equal(quantize(s["exp_avg_sq"], "e4m3"), s["exp_avg_sq"]) for s in optimizer.state.values())


def test_outside_code_follows_the_root_only_where_asked():
    model = nn.Identity()
    x = torch.tensor([300.0])
    with emulate(model, "fp16"):
        assert model(x).square().item() == 90000
    with emulate(model, "fp16", outside=True):
        assert model(x).square().item() == float("inf")


# autocast


@pytest.mark.parametrize(("device", "key"), [("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")])
def test_the_lists_are_those_that_torch_registers(device, key):
    names = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("aten::")}
    registered = {n for n in names if torch._C._dispatch_has_kernel_for_dispatch_key(n, key)}
    expected = set(lists(device))
    if device == "cuda" and torch.backends.cudnn.is_available():  # of builds for CUDA only
        expected |= {"_cudnn_rnn"}
    if device == "cuda" and torch.__version__ < "2.12":
        expected -= {"rms_norm"}
    there = {n.partition("::")[2].partition(".")[0] for n in names}
    expected -= {"qr", "cholesky", "linalg_matrix_sqrth"} - there  # two left torch with 2.15, one came
    assert {n.partition("::")[2].partition(".")[0] for n in registered} == expected


PROBES = {
    "exp": lambda x: torch.exp(x),
    "log": lambda x: torch.log(x),
    "pow": lambda x: torch.pow(x, 2),
    "rsqrt": lambda x: torch.rsqrt(x),
    "softmax": lambda x: torch.softmax(x, -1),
    "log_softmax": lambda x: torch.log_softmax(x, -1),
    "layer_norm": lambda x: F.layer_norm(x, (4,)),
    "group_norm": lambda x: F.group_norm(x, 2),
    "sum": lambda x: x.sum(),
    "cumsum": lambda x: x.cumsum(0),
    "prod": lambda x: x.prod(),
    "norm": lambda x: torch.norm(x),
    "mse_loss": lambda x: F.mse_loss(x, x),
    "l1_loss": lambda x: F.l1_loss(x, x),
    "cosine_similarity": lambda x: F.cosine_similarity(x, x),
    "softplus": lambda x: F.softplus(x),
    "cdist": lambda x: torch.cdist(x, x),
    "mm": lambda x: torch.mm(x, x),
    "addmm": lambda x: torch.addmm(x, x, x),
    "matmul": lambda x: x @ x,
    "linear": lambda x: F.linear(x, x),
    "bmm": lambda x: torch.bmm(x.unsqueeze(0), x.unsqueeze(0)),
    "prelu": lambda x: F.prelu(x, x.select(0, 0).narrow(0, 0, 1)),
    "gelu": lambda x: F.gelu(x),
    "mul": lambda x: x * x,
    "mean": lambda x: x.mean(),
    "cat": lambda x: torch.cat([x, x]),
    "tanh": lambda x: torch.tanh(x),
}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", PROBES)
def test_the_lists_say_what_autocast_does(name, device):
    """Asked of torch itself, with fake tensors, so that CUDA's autocast can be asked without a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    old = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    with FakeTensorMode():
        wide, low = (torch.empty(4, 4, device=device, dtype=d) for d in (torch.float32, torch.bfloat16))
        torch.set_autocast_dtype(device, torch.bfloat16)
        torch.set_autocast_enabled(device, True)
        try:
            dtypes = PROBES[name](wide).dtype, PROBES[name](low).dtype
        finally:
            torch.set_autocast_enabled(device, old[0])
            torch.set_autocast_dtype(device, old[1])
            torch.clear_autocast_cache()
    expected = {
        (torch.bfloat16, torch.bfloat16): "low",
        (torch.float32, torch.float32): "fp32",
        (torch.float32, torch.bfloat16): "promote",
    }
    assert entry_of(name, device) == expected[dtypes]


def test_lists_know_what_composites_are_made_of():
    assert entry_of("_softmax", "cuda") == "fp32" and entry_of("_softmax", "cpu") == "promote"
    assert entry_of("native_layer_norm_backward", "cuda") == "fp32"
    assert entry_of("convolution_backward", "cpu") == "low"
    assert entry_of("_scaled_dot_product_flash_attention_for_cpu", "cpu") == "low"
    assert entry_of_node("PowBackward0", "cuda") == "fp32" and entry_of_node("PowBackward0", "cpu") == "promote"
    assert entry_of_node("LogSoftmaxBackward0", "cuda") == "fp32"
    assert entry_of_node("AddmmBackward0", "cpu") == "low"


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.qkv, self.proj = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.ln2, self.mlp, self.head = nn.LayerNorm(16), MLP(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        q, k, v = self.qkv(self.ln1(x)).chunk(3, -1)
        x = x + self.proj(torch.softmax(q @ k.transpose(-2, -1) / 4, -1) @ v)
        x = x + self.mlp(self.ln2(x))
        return self.head(x).mean(1)


@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("fmt", HALVES)
def test_autocast_policy_follows_real_autocast(fmt, outside):
    """The same roundings at the same places: outputs equal, gradients off by a small part of what rounding does."""
    torch.manual_seed(0)
    model = Transformer()
    x, labels = values(3, 5, 16, scale=1.0), torch.tensor([0, 1, 2])

    def run():
        model.zero_grad()
        y = model(x)
        F.cross_entropy(y, labels).backward()
        return [y.detach().float(), *(p.grad.clone() for p in model.parameters())]

    exact = run()
    with torch.autocast("cpu", dtype=HALVES[fmt]):
        real = run()
    with emulate(model, fmt, policy="autocast", device="cpu", outside=outside):
        ours = run()
    assert torch.equal(ours[0], real[0])
    for a, b, c in zip(exact, real, ours, strict=True):
        assert (c - b).norm() <= 0.05 * (b - a).norm()


@pytest.mark.parametrize("fmt", HALVES)
@pytest.mark.parametrize("name", sorted(set(ALL) - {"sparse", "lstm"}))
def test_every_model_follows_real_autocast(name, fmt):
    torch.manual_seed(2)
    model = ALL[name]()
    buffers = {k: v.clone() for k, v in model.named_buffers()}

    def run():
        model.zero_grad()
        loss = loss_of(model, batch(0))
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found = torch.cat([loss.detach().view(1), *gradients])
        for key, value in model.named_buffers():
            value.copy_(buffers[key])
        return found

    exact = run()
    with torch.autocast("cpu", dtype=HALVES[fmt]):
        real = run()
    with emulate(model, fmt, policy="autocast", device="cpu"):
        ours = run()
    # Where it may differ: the CPU's fp16 matrix products do not always round the exact sum; and autocast keeps the low
    # copy of a weight that is used several times, whose gradients then add up in the low format.
    assert (ours - real).norm() <= (0.5 if fmt == "fp16" or name == "shared" else 0.1) * (real - exact).norm()


def test_autocast_of_cuda_keeps_its_float32_list_wide():
    model = Run(lambda x, w: ((h := F.linear(x, w)).pow(2).mean(), h))
    x, w = torch.full((1, 4), 10.0), torch.full((4, 4), 10.0)
    with emulate(model, "fp16", policy="autocast", device="cuda"):
        assert model(x, w)[0].item() == 160000.0
    with emulate(model, "fp16", policy="autocast", device="cpu"):
        assert model(x, w)[0].item() == float("inf")
    similar = Run(lambda x, w: F.cosine_similarity(F.linear(x, w), F.linear(x, 3 * w)))
    with emulate(similar, "fp16", policy="autocast", device="cuda"):
        assert similar(x, w).item() == pytest.approx(1.0)


def test_code_that_switches_autocast_off_is_heard():
    def forward(x, w):
        low = F.linear(x, w)
        with torch.autocast("cpu", enabled=False):
            wide = (w @ w).sum() * float(torch.is_autocast_enabled("cpu"))
            kept = w @ w
        return low, kept, wide, F.linear(x, w)

    model, x, w = Run(forward), values(4, 4), values(4, 4, seed=1)
    with emulate(model, "bf16", policy="autocast"):
        low, kept, wide, again = model(x, w)
        inside = torch.is_autocast_enabled("cpu")
    assert inside and not torch.is_autocast_enabled("cpu")
    assert torch.get_autocast_dtype("cpu") is torch.bfloat16
    assert torch.equal(kept, w @ w) and wide == 0
    assert torch.equal(low, again) and torch.equal(low, quantize(low, "bf16"))


def test_autocast_leaves_float32_ops_on_float32_inputs_alone():
    model = Run(lambda x: x * x)
    with emulate(model, "fp16", policy="autocast"):
        assert model(torch.tensor([300.0])).item() == 90000


@pytest.mark.parametrize("watch", [record_ops, trace])
def test_what_watches_ops_belongs_inside(watch):
    model = nn.Linear(4, 4)
    with watch(model), pytest.raises(UsageError, match=r"with ps\.emulate\(model, \.\.\.\), ps\.trace\(model\)"):
        emulate(model, "fp16").__enter__()
    with emulate(model, "fp16"), watch(model):
        model(torch.ones(1, 4))


def test_stochastic_rounding_draws_the_same_when_entered_again():
    model, x = nn.Linear(8, 8), torch.randn(64, 8)
    emulation = emulate(model, "e4m3", rounding="stochastic", seed=3)
    results = []
    for _ in range(2):
        with emulation:
            results.append(model(x))
    assert torch.equal(*results)


def test_a_scripted_submodule_runs_as_part_of_the_module_around_it(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script is deprecated
        model = nn.Sequential(nn.Linear(8, 8), torch.jit.script(nn.BatchNorm1d(8)))
    x = torch.randn(4, 8)
    before = model[1].running_mean.clone()
    with emulate(model, "bf16"):
        model(x)
    assert torch.equal(model[1].running_mean, before)
    with record(model, tmp_path / "run", every=1) as rec:
        loss = model(x).sum()
        loss.backward()
        truth = rec.shadow(lambda: model(x).sum(), loss=loss)
    assert truth.loss_low == truth.loss_fp32
