"""What applying a plan means, module by module, and that nothing of it stays."""

from __future__ import annotations

import collections
import copy
import dataclasses
import gc
import inspect
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from precscope.applying import apply, remove
from precscope.errors import ModelError, PlanError
from precscope.plans import LayerPrecision, PrecisionPlan

LOW = {"fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(autouse=True)
def no_plan_left():
    """No planned forward and no mark may outlive a test, in any module that it made and that still exists."""
    gc.freeze()  # what is there already need not be looked through
    yield
    modules = [m for m in gc.get_objects() if issubclass(type(m), nn.Module)]
    gc.unfreeze()
    planned = [m for m in modules if hasattr(m.__dict__.get("forward"), "_precscope_plan")]
    assert not planned
    assert not [m for m in modules if "_precscope_plan" in m.__dict__]


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)
        self.register_buffer("gain", torch.full((width,), 1.1))

    def forward(self, x: torch.Tensor, *, mask: torch.Tensor | None = None) -> torch.Tensor:
        """One block."""
        y = self.fc2(F.gelu(self.fc1(self.norm(x))))
        return x + self.gain * (y if mask is None else y * mask)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Probe(nn.Module):
    """Remembers what its forward saw: input dtypes, parameter dtype, autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("offset", torch.zeros(4))
        self.register_buffer("index", torch.arange(4))
        self.seen: list[object] = []

    def forward(self, x, *rest, **more):
        on = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
        self.seen.append((x.dtype, self.weight.dtype, self.offset.dtype, on))
        self.given = (x, *rest), more
        return x * self.weight


def gradients(model: nn.Module, x: torch.Tensor, forward=None):
    model.zero_grad(set_to_none=True)
    y = (forward or model)(x)
    y.float().square().sum().backward()
    return y.detach(), [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_same(first, second) -> None:
    assert first[0].dtype == second[0].dtype
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict(keep_vars=True).items()}


def assert_restored(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = snapshot(model)
    assert list(after) == list(before)
    for name in before:
        assert after[name].dtype == before[name].dtype, name
        assert torch.equal(after[name], before[name]), name


x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


# Autocast


@pytest.mark.parametrize("fmt", ["bf16", "fp16"])
def test_a_uniform_autocast_plan_is_torch_autocast_bit_for_bit(fmt):
    model = Net()

    def plain(data):
        with torch.autocast("cpu", dtype=LOW[fmt]):
            return model(data)

    expected = gradients(model, x, plain)
    with apply(PrecisionPlan.uniform(fmt), model):
        assert_same(gradients(model, x), expected)
    assert_same(gradients(model, x, plain), expected)


def test_a_uniform_fp32_plan_is_the_plain_model_even_under_autocast():
    model = Net()
    expected = gradients(model, x)

    def under_autocast(data):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(data)

    with apply(PrecisionPlan.uniform("fp32"), model):
        assert_same(gradients(model, x, under_autocast), expected)


def test_an_fp32_island_inside_bf16_sees_fp32():
    model = nn.Sequential(nn.Linear(4, 4), Probe(), nn.Linear(4, 4), Probe())
    with apply(PrecisionPlan(default="bf16", modules={"1": "fp32"}), model):
        y = model(torch.ones(2, 4))
    assert model[1].seen == [(torch.float32, torch.float32, torch.float32, False)]
    assert model[3].seen == [(torch.bfloat16, torch.float32, torch.float32, torch.bfloat16)]
    assert y.dtype == torch.float32  # bf16 times an fp32 parameter, as under plain autocast


@pytest.mark.parametrize("policy", ["autocast", "cast"])
def test_the_roots_own_code_runs_as_its_entry_says_and_its_children_as_theirs(policy):
    class Rooted(Probe):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.inherits = Probe(), Probe()

        def forward(self, x, *rest, **more):
            return super().forward(x) + self.low(x) + self.inherits(x)

    low = LayerPrecision("bf16", policy=policy, params="fp32")
    inside = {"autocast": (torch.float32, torch.bfloat16), "cast": (torch.bfloat16, False)}[policy]
    for own, other in ((LayerPrecision("fp32"), low), (low, LayerPrecision("fp32"))):
        model = Rooted()
        plan = PrecisionPlan(default=LayerPrecision("fp16"), modules={"": own, "low": other})
        with apply(plan, model) as handle:
            model(torch.ones(2, 4))
            assert handle.runs[0].module == ""
            assert (handle.runs[0].precision.compute, handle.runs[0].modules) == (own.compute, 2)
            assert handle.describe().splitlines()[0].startswith(f"(root)  {own}, native, 2 modules")
        for probe, precision in ((model, own), (model.low, other), (model.inherits, own)):
            dtype, autocast = (torch.float32, False) if precision.compute == "fp32" else inside
            ((_, weight, offset, on),) = probe.seen
            assert (weight, offset, on) == (dtype, dtype, autocast)


def test_the_classic_layer1_fp16_layer2_fp32():
    model = nn.Sequential(collections.OrderedDict(layer1=nn.Linear(8, 8), layer2=nn.Linear(8, 2)))
    plan = PrecisionPlan(modules={"layer1": LayerPrecision("fp16", policy="cast"), "layer2": "fp32"})
    before = snapshot(model)
    hidden = F.linear(x.half(), model.layer1.weight.half(), model.layer1.bias.half())
    expected = F.linear(hidden.float(), model.layer2.weight, model.layer2.bias)
    with apply(plan, model) as handle:
        assert (model.layer1.weight.dtype, model.layer2.weight.dtype) == (torch.float16, torch.float32)
        y = model(x)
        assert "layer1  fp16 cast params fp16, native" in handle.describe()
    assert torch.equal(y, expected)
    assert_restored(model, before)


def test_a_modules_own_autocast_switch_keeps_its_meaning():
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return self.fc(x.float())

    model = nn.Sequential(nn.Linear(4, 4), Careful())
    with apply(PrecisionPlan.uniform("bf16"), model):
        assert model(torch.ones(2, 4)).dtype == torch.float32


def test_a_module_called_past_its_parents_forward_still_runs_as_planned():
    model = Net()
    with apply(PrecisionPlan(modules={"blocks.1": "bf16"}), model):
        assert model.blocks[1].fc1(torch.ones(2, 16)).dtype == torch.bfloat16
        assert model.blocks[0].fc1(torch.ones(2, 16)).dtype == torch.float32
    with apply(PrecisionPlan.uniform("fp16"), model):
        assert model.head(torch.ones(2, 16)).dtype == torch.float16


def test_low_inputs_of_another_dtype_are_cast_up():
    model = nn.Sequential(Probe())
    with apply(PrecisionPlan.uniform("fp16"), model):
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            model(torch.ones(4, dtype=dtype))
    assert [seen[0] for seen in model[0].seen] == [torch.float32, torch.float16, torch.float32, torch.float64]


def test_the_loss_outside_the_model_can_run_under_the_plans_default():
    model = Net()
    target = torch.zeros(5, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = F.cross_entropy(model(x), target)
    with apply(PrecisionPlan.uniform("bf16"), model) as handle, handle.autocast("cpu"):
        loss = F.cross_entropy(model(x), target)
    assert torch.equal(loss, expected)
    with apply(PrecisionPlan.uniform("fp32"), model) as handle, handle.autocast("cpu"):
        assert not torch.is_autocast_enabled("cpu")


# Cast


def test_cast_with_low_params_is_a_half_model_bit_for_bit():
    model = Net()
    twin = copy.deepcopy(model).bfloat16()
    expected = gradients(twin, x.bfloat16())
    with apply(PrecisionPlan.uniform("bf16", policy="cast"), model):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert_same(gradients(model, x), expected)


def test_cast_with_fp32_params_computes_the_same_and_grows_fp32_gradients():
    model = Net()
    before = snapshot(model)
    low, low_gradients = gradients(copy.deepcopy(model).bfloat16(), x.bfloat16())
    with apply(PrecisionPlan.uniform("bf16", policy="cast", params="fp32"), model):
        y, grads = gradients(model, x)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert all(isinstance(p, nn.Parameter) for p in model.parameters())
    assert torch.equal(y, low)
    assert {g.dtype for g in grads} == {torch.float32}
    assert all(torch.equal(g, low_g.float()) for g, low_g in zip(grads, low_gradients, strict=True))
    assert_restored(model, before)


def test_everything_inside_sees_the_dtype_and_integers_stay():
    model = nn.Sequential(Probe())
    with apply(PrecisionPlan.uniform("fp16", policy="cast", params="fp32"), model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(torch.ones(4, dtype=torch.float64))
        assert model[0].index.dtype == torch.int64
    assert model[0].seen == [(torch.float16, torch.float16, torch.float16, False)]
    assert model[0].weight.dtype == torch.float32


def test_master_weights_train_as_fp32_masters_do():
    model = Net()
    twin = copy.deepcopy(model)
    with apply(PrecisionPlan.uniform("bf16", policy="cast", params="fp32"), model):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        for _ in range(3):
            gradients(model, x)
            optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)]
    assert all(changed)  # steps far below a bf16 ulp arrive
    rounded = model.bfloat16().parameters(), twin.bfloat16().parameters()
    assert any(torch.equal(a, b) for a, b in zip(*rounded, strict=True))


def test_an_fp32_module_in_a_cast_parent_keeps_its_values_and_is_cast_to():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Probe(), nn.Linear(4, 4)), nn.Linear(4, 4))
    plan = PrecisionPlan(default=LayerPrecision("fp16", policy="cast"), modules={"1.0": "fp32"})
    weight = model[1][0].weight
    with apply(plan, model):
        assert weight.dtype == torch.float32
        y = model(torch.ones(2, 4))
    assert model[1][0].seen == [(torch.float32, torch.float32, torch.float32, False)]
    assert y.dtype == torch.float16


def test_params_of_a_child_that_is_not_called_are_cast_too():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=True)  # uses out_proj.weight itself
    data = torch.randn(2, 3, 8)
    twin = copy.deepcopy(model).bfloat16()
    expected = twin(data.bfloat16(), data.bfloat16(), data.bfloat16())[0]
    with apply(PrecisionPlan.uniform("bf16", policy="cast", params="fp32"), model):
        y = model(data, data, data)[0]
        y.float().sum().backward()
    assert torch.equal(y, expected)
    assert model.out_proj.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("params", ["fp32", "bf16"])
def test_recurrent_weights_follow(params):
    torch.manual_seed(0)
    model = nn.LSTM(8, 4, num_layers=2)
    data = torch.randn(3, 2, 8)
    before = snapshot(model)
    plain = model(data)[0]
    expected = copy.deepcopy(model).bfloat16()(data.bfloat16())[0]
    with apply(PrecisionPlan.uniform("bf16", policy="cast", params=params), model):
        y = model(data)[0]
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        copied = copy.deepcopy(model)
        remove(copied)
    assert torch.equal(y, expected)
    assert_restored(model, before)
    assert torch.equal(model(data)[0], plain)
    assert torch.equal(copied(data)[0], plain)


# Buffers


class Counting(nn.Module):
    """Buffers written to in every way that models use."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("in_place", torch.full((4,), 1 / 3))
        self.register_buffer("by_data", torch.full((4,), 1 / 3))
        self.register_buffer("anew", torch.full((4,), 1 / 3))
        self.register_buffer("untouched", torch.full((4,), 1 / 3))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        assert self.in_place.dtype == x.dtype
        self.in_place[:2] += 1
        self.by_data.data.add_(1)
        self.anew = self.anew + 1
        self.calls += 1
        return x + self.untouched


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_buffers_keep_what_the_forward_writes_and_what_it_does_not(context):
    model = nn.Sequential(Counting())
    third = torch.tensor(1 / 3)
    with apply(PrecisionPlan.uniform("bf16", policy="cast", params="fp32"), model), context():
        model(torch.ones(4))
        model(torch.ones(4))
    counted = model[0]
    assert {b.dtype for b in (counted.in_place, counted.by_data, counted.anew, counted.untouched)} == {torch.float32}
    assert torch.equal(counted.untouched, third.expand(4))
    assert torch.equal(counted.in_place[2:], third.expand(2))  # unrounded
    for written in (counted.in_place[:2], counted.by_data, counted.anew):
        assert torch.allclose(written, torch.tensor(7 / 3), atol=2**-6)  # an ulp of bf16
    assert counted.calls == 2


@pytest.mark.parametrize("params", ["fp32", "fp16"])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_keeps_its_running_statistics(params, training):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)).train(training)
    model[1].running_var.fill_(1e6)  # inf in fp16
    before = snapshot(model)
    with apply(PrecisionPlan.uniform("fp16", policy="cast", params=params), model) as handle:
        y = model(x)
        assert y.dtype == torch.float16
        assert y.isfinite().all()
        if params == "fp32":
            assert model[1].running_var.dtype == torch.float32
            assert "batch norms keep fp32 statistics" in handle.describe()
    if not training:
        assert_restored(model, before)
    elif params == "fp32":
        assert model[1].num_batches_tracked == 1
        assert torch.allclose(model[1].running_var, torch.tensor(0.9e6), rtol=1e-3)


def test_a_batch_norm_kept_in_fp32_loses_nothing():
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)).eval()
    model[1].running_var.copy_(torch.tensor([1e6, 1e-9, 1.0, 1 / 3]))
    before = snapshot(model)
    with apply(PrecisionPlan(default=LayerPrecision("fp16", policy="cast"), modules={"1": "fp32"}), model):
        assert torch.equal(model[1].running_var, before["1.running_var"])
        assert model(x).isfinite().all()
    assert_restored(model, before)


# Storage


def test_storage_is_restored_bit_for_bit_where_nothing_changed_it():
    model = Net()
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-30, 1e30, 65519.999, 1e-8, -1 / 3])
    with torch.no_grad():
        model.embed.weight[0] = special
    before, pointers = snapshot(model), [p.data_ptr() for p in model.parameters()]
    identities = [id(p) for p in model.parameters()]
    for fmt in LOW:
        with apply(PrecisionPlan.uniform(fmt, policy="cast"), model):
            assert [id(p) for p in model.parameters()] == identities
            model(x)
        after = snapshot(model)
        for name, value in before.items():
            assert torch.equal(after[name].view(torch.int32), value.view(torch.int32)), name
        assert [p.data_ptr() for p in model.parameters()] == pointers


def test_what_training_changed_is_cast_up_and_the_rest_is_unrounded():
    model = nn.Sequential(nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.fill_(1 / 3)
    bias = model[0].bias.detach().clone()
    with apply(PrecisionPlan.uniform("bf16", policy="cast"), model), torch.no_grad():
        model[0].weight[0] += 1
    assert torch.equal(model[0].weight[0], (torch.tensor(1 / 3).bfloat16() + 1).float().expand(4))
    assert torch.equal(model[0].weight[1], torch.full((4,), 1 / 3))
    assert torch.equal(model[0].bias, bias)


def test_gradients_at_hand_follow_the_storage():
    model = Net()
    gradients(model, x)
    with apply(PrecisionPlan.uniform("bf16", policy="cast"), model):
        assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}
        model(x).float().sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp16", "e4m3"])
def test_low_storage_under_autocast_changes_values_not_arithmetic(compute):
    model = Net()
    rounded = copy.deepcopy(model).bfloat16().float()
    for name, buffer in model.named_buffers():
        rounded.get_buffer(name).copy_(buffer)
    with apply(PrecisionPlan.uniform(compute), rounded):
        y, grads = gradients(rounded, x)
    before = snapshot(model)
    with apply(PrecisionPlan.uniform(compute, params="bf16"), model):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert {b.dtype for b in model.buffers()} == {torch.float32}
        low, low_grads = gradients(model, x)
    assert torch.equal(y, low)
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(grads, low_grads, strict=True))
    assert_restored(model, before)


def test_a_model_stored_low_is_stored_as_the_plan_says_and_put_back():
    model = Net().bfloat16()
    before = snapshot(model)
    with apply(PrecisionPlan.uniform("bf16", params="fp32"), model) as handle:
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert "head.weight was stored in torch.bfloat16: stored in fp32 while the plan is on" in handle.describe()
        model(x)
    assert_restored(model, before)


def test_fp64_models_stay_fp64_under_fp32():
    model = Net().double()
    expected = model(x.double())
    with apply(PrecisionPlan.uniform("fp32"), model):
        assert torch.equal(model(x.double()), expected)


def test_optimizer_keeps_working_on_the_same_parameters():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with apply(PrecisionPlan.uniform("bf16", policy="cast"), model):
        before = model.head.weight.detach().clone()
        gradients(model, x)
        optimizer.step()
        assert not torch.equal(model.head.weight, before)
    assert all(a is b for a, b in zip(model.parameters(), optimizer.param_groups[0]["params"], strict=True))


def test_state_dict_saves_and_loads_while_applied():
    model, other = Net(), Net()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.5)
    keys = list(model.state_dict())
    with apply(PrecisionPlan.uniform("fp16", policy="cast"), model):
        assert list(model.state_dict()) == keys
        model.load_state_dict(other.state_dict())
        assert model.head.weight.dtype == torch.float16
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=2**-11)


# Shared and tied


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first

    def forward(self, x):
        return self.second(self.first(x))


def test_a_shared_module_is_decided_once():
    model = Twice()
    exact = model(torch.ones(1, 4))
    for plan in ({"first": "bf16"}, {"second": "bf16"}, {"first": "bf16", "second": "bf16"}, {"*": "bf16"}):
        with apply(PrecisionPlan(modules=plan), model):
            out = model(torch.ones(1, 4))
            assert torch.equal(out, out.bfloat16().float()) and not torch.equal(out, exact)
    with pytest.raises(PlanError, match=r"'first' \(bf16\) and 'second' \(fp16\) are one shared module: give both"):
        apply(PrecisionPlan(modules={"first": "bf16", "second": "fp16"}), model)


def test_an_fp32_module_gets_its_low_childrens_results_in_fp32():
    """Its own code is not under autocast: an fp32 and a bf16 operand of a product would raise there."""

    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x) @ self.b(x)

    model, x = Mixes(), torch.randn(4, 4)
    with apply(PrecisionPlan(modules={"a": "bf16"}), model):
        out = model(x)
        out.sum().backward()
    assert out.dtype is torch.float32 and model.a.weight.grad.dtype is torch.float32
    low = torch.nn.functional.linear(x.bfloat16(), model.a.weight.bfloat16(), model.a.bias.bfloat16())
    torch.testing.assert_close(out, low.float() @ model.b(x), rtol=1e-5, atol=1e-6)


def test_a_shared_module_under_two_parents_that_differ():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    with pytest.raises(PlanError, match=r"'a.0' \(fp16\) and 'b.0' \(bf16\)"):
        apply(PrecisionPlan(modules={"a": "fp16", "b": "bf16"}), model)
    with apply(PrecisionPlan(modules={"a": "fp16", "b": "bf16", "b.0": "fp32"}), model):
        assert model["a"](torch.ones(1, 4)).dtype == torch.float32


def test_tied_weights_are_stored_in_the_wider_format_and_it_is_said():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    before = snapshot(model)
    plan = PrecisionPlan(default=LayerPrecision("bf16", policy="cast"), modules={"2": LayerPrecision("bf16")})
    with apply(plan, model) as handle:
        assert model[0].weight is model[2].weight
        assert (model[0].weight.dtype, model[0].bias.dtype) == (torch.float32, torch.bfloat16)
        assert "0.weight and 2.weight are one tensor" in handle.describe()
        gradients(model, torch.ones(2, 4))
        assert model[0].weight.grad.dtype == torch.float32
    assert_restored(model, before)
    with apply(PrecisionPlan.uniform("bf16", policy="cast"), model) as handle:
        assert model[0].weight is model[2].weight
        assert model[0].weight.dtype == torch.bfloat16
        assert handle.notes == ()
    assert model[0].weight is model[2].weight
    assert_restored(model, before)


# Inputs


@dataclasses.dataclass(frozen=True)
class Batch:
    values: torch.Tensor
    label: str


Pair = collections.namedtuple("Pair", ["a", "b"])


def test_inputs_are_cast_wherever_they_are_nested():
    model = nn.Sequential(Probe())[0]
    t = torch.ones(4)
    ids, mask = torch.arange(4), torch.ones(4, dtype=torch.bool)
    cache = [ids, "text", {"deep": (mask, None)}]
    with apply(PrecisionPlan.uniform("fp16", policy="cast", params="fp32"), model):
        mappings = collections.OrderedDict(z=t, a=3), collections.UserDict(u=t)
        model(t, (t, 1), [t, ids], Pair(t, 2), Batch(t, "x"), *mappings, cache=cache, mask=mask, nothing=None)
    (first, pair, listed, named, record, ordered, user), more = model.given
    found = [first, pair[0], listed[0], named.a, ordered["z"], record.values, user["u"]]
    assert [f.dtype for f in found] == [torch.float16] * 7
    assert [type(named), type(record), type(ordered), type(user)] == [Pair, Batch, *map(type, mappings)]
    assert (list(ordered), record.label, named.b, pair[1]) == (["z", "a"], "x", 2, 1)
    assert listed[1] is ids
    assert more["cache"] is cache  # nothing in it changes: the very object, so that a cache can be filled
    assert more["mask"] is mask
    assert t.dtype == torch.float32


def test_gradients_flow_to_inputs_through_the_casts():
    model = Net()
    data = x.clone().requires_grad_()
    with apply(PrecisionPlan(default=LayerPrecision("bf16", policy="cast"), modules={"blocks.1": "fp32"}), model):
        model(data).float().sum().backward()
    assert data.grad.dtype == torch.float32
    assert data.grad.abs().sum() > 0


# 8-bit


def test_e4m3_rounds_operands_and_output_gradients_of_linear_modules():
    from precscope.rounding import quantize

    torch.manual_seed(0)
    layer = nn.Linear(8, 4)
    with torch.no_grad():
        layer.weight.mul_(0.01)
    data = torch.randn(5, 8).mul_(100).requires_grad_()

    def rounded(t, fmt, emax):  # amax's binade moved to one below the top
        k = emax - 1 - int(torch.floor(torch.log2(t.abs().amax())))
        return quantize(t.detach().float(), fmt, scale_exponent=k)

    q, w = rounded(data, "e4m3", 8).bfloat16(), rounded(layer.weight, "e4m3", 8).bfloat16()
    upstream = torch.randn(5, 4).bfloat16()
    g = rounded(upstream, "e5m2", 15).bfloat16()
    with apply(PrecisionPlan.uniform("e4m3"), layer) as handle:
        y = layer(data)
        y.backward(upstream)
        assert "e4m3, emulated (operands of 1 linear or convolution modules rounded to e4m3" in handle.describe()
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, F.linear(q, w, layer.bias.bfloat16()))
    assert torch.equal(layer.weight.grad, (g.T @ q).float())
    assert torch.equal(data.grad, (g @ w).float())


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
@pytest.mark.parametrize("policy", ["autocast", "cast"])
def test_8_bit_formats_on_convolutions_and_restoring(fmt, policy):
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 2, 2)
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.LazyLinear(3))
    image = torch.randn(2, 3, 6, 6)
    exact = model(image)
    before = snapshot(model)
    with apply(PrecisionPlan.uniform(fmt, policy=policy), model):
        y, grads = gradients(model, image)
    error = (y.float() - exact).norm() / exact.norm()
    assert 1e-3 < error < 0.3
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)
    assert_restored(model, before)


@pytest.mark.parametrize("values", [[0.0, 0.0], [1e-45, 1e-40], [1e38, 3e38], [float("inf"), 1.0], []])
def test_extreme_tensors_round_without_new_non_finite_values(values):
    from precscope.applying.fp8 import round_scaled

    t = torch.tensor(values)
    for fmt in ("e4m3", "e5m2"):
        y = round_scaled(t, fmt)
        assert (y.shape, y.dtype) == (t.shape, t.dtype)
        assert y[t.isfinite()].isfinite().all()
        normal = t.isfinite() & (t.abs() > 1e-37)
        assert torch.allclose(y[normal], t[normal], rtol=0.25)
        assert not y[t.isinf()].isfinite().any()


def test_tf32_is_fp32_on_the_cpu_and_says_so():
    model = Net()
    expected = model(x)
    switches = (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision)
    with apply(PrecisionPlan.uniform("tf32"), model) as handle:
        assert torch.equal(model(x), expected)
        assert "fp32 elsewhere" in handle.describe()
    assert switches == (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision)


# Life and death


def test_applying_twice_is_refused_and_removing_twice_is_not():
    model = Net()
    handle = apply(PrecisionPlan.uniform("bf16"), model)
    for target in (model, model.blocks, nn.Sequential(model)):
        with pytest.raises(PlanError, match=r"applied to .* already; remove it first"):
            apply(PrecisionPlan.uniform("fp16"), target)
    assert model(x).dtype == torch.bfloat16
    handle.remove()
    handle.remove()
    assert model(x).dtype == torch.float32
    remove(nn.Linear(2, 2))


def test_exceptions_leave_nothing_changed():
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x):
            assert self.weight.dtype == torch.float16
            raise KeyError("the model's own")

    model = nn.Sequential(nn.Linear(8, 8), Failing())
    weight = model[1].weight
    with apply(PrecisionPlan.uniform("fp16", policy="cast", params="fp32"), model):
        for _ in range(2):
            with pytest.raises(KeyError, match="the model's own"):
                model(x)
            assert model[1].weight is weight
            assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(RuntimeError, match="in the block"), apply(PrecisionPlan.uniform("fp16"), model):
        raise RuntimeError("in the block")


def test_a_plan_that_does_not_fit_leaves_the_model_alone():
    model = Net()
    with pytest.raises(PlanError, match="no module 'blocks.7'.*did you mean blocks"):
        apply(PrecisionPlan(modules={"blocks.7": "fp16"}), model)
    with pytest.raises(PlanError, match="takes a PrecisionPlan, not str"):
        apply("plan.json", model)
    with pytest.raises(ModelError, match=r"torch.nn.Module, not to function"):
        apply(PrecisionPlan(), lambda x: x)
    with pytest.raises(ModelError, match=r"0.weight has no values yet .*run one batch first"):
        apply(PrecisionPlan(), nn.Sequential(nn.LazyLinear(3)))
    assert all("forward" not in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("model", [nn.Identity(), nn.Sequential(), nn.ModuleList(), nn.ReLU()])
def test_models_without_parameters_or_children(model):
    with apply(PrecisionPlan.uniform("bf16"), model) as handle:
        assert handle.describe().startswith("(root)  bf16, native")


def test_containers_without_a_forward_pass_their_precision_on():
    model = Net()
    with apply(PrecisionPlan(modules={"blocks": "bf16"}), model) as handle:
        assert "forward" not in model.blocks.__dict__
        assert model.blocks[0].fc1(torch.ones(1, 16)).dtype == torch.bfloat16
        assert model(x).dtype == torch.float32
    assert [(r.module, r.modules) for r in handle.runs] == [("", 3), *((f"blocks.{i}", 4) for i in range(3))]


def test_a_forward_that_was_replaced_before_is_called_and_put_back():
    model = nn.Linear(4, 4)
    own = lambda data: nn.Linear.forward(model, data) + 1  # noqa: E731
    model.forward = own
    with apply(PrecisionPlan.uniform("bf16"), model):
        y = model(torch.ones(1, 4))
        assert y.dtype == torch.bfloat16
    assert model.__dict__["forward"] is own


def test_a_planned_forward_that_somebody_kept_is_the_modules_own_afterwards():
    """Accelerate wraps the forward that it finds; the plan comes off, and the wrapper stays."""
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    expected = model(x)
    with apply(PrecisionPlan(default="bf16"), model):
        kept = model.forward
        assert kept(x).dtype is torch.bfloat16
    assert torch.equal(kept(x), expected)


def test_signature_and_doc_are_those_of_the_module():
    model = Net()
    own = inspect.signature(Block().forward)
    with apply(PrecisionPlan.uniform("bf16"), model):
        assert inspect.signature(model.blocks[0].forward) == own
        assert model.blocks[0].forward.__doc__ == "One block."
        mask = torch.zeros(16)
        given = torch.ones(1, 16)
        assert torch.equal(model.blocks[0](given, mask=mask), given)


@pytest.mark.parametrize("plan", [
    PrecisionPlan(default="bf16", modules={"blocks.1": "fp32"}),
    PrecisionPlan.uniform("fp16", policy="cast"),
    PrecisionPlan.uniform("fp16", policy="cast", params="fp32"),
])  # fmt: skip
def test_a_deepcopy_is_planned_by_itself(plan):
    model = Net()
    before = snapshot(model)
    handle = apply(plan, model)
    expected = model(x)
    copied = copy.deepcopy(model)
    handle.remove()
    assert torch.equal(copied(x), expected)
    with torch.no_grad():
        model.head.weight.zero_()
    assert torch.equal(copied(x), expected)  # bound to the copy, not to the original
    remove(copied)
    assert_restored(copied, before)


def test_a_planned_model_is_not_pickled_without_its_plan():
    model = Net()
    with apply(PrecisionPlan.uniform("bf16"), model), pytest.raises(PlanError, match=r"save model.state_dict\(\)"):
        torch.save(model, io.BytesIO())


def test_train_and_eval_and_no_grad():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    with apply(PrecisionPlan.uniform("bf16", policy="cast", params="fp32"), model):
        assert (model.eval()(x) != 0).all()
        assert (model.train()(x) == 0).any()
        with torch.no_grad():
            assert not model(x).requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("plan", [
    PrecisionPlan(default="bf16", modules={"blocks.1": "fp32"}),
    PrecisionPlan.uniform("bf16", policy="cast", params="fp32"),
    PrecisionPlan(modules={"blocks.*.fc1": "e4m3"}),
])  # fmt: skip
def test_activation_checkpointing_gives_the_same_gradients(plan, reentrant):
    class Checkpointed(Net):
        def forward(self, x):
            x = self.embed(x)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return self.head(x)

    plain, saved = Net(), Checkpointed()
    with apply(plan, plain):
        expected = gradients(plain, x)
    with apply(plan, saved):
        assert_same(gradients(saved, x), expected)


def test_hooks_of_others_still_fire_and_see_what_they_would():
    model = Net()
    seen = []
    handle = model.head.register_forward_hook(lambda m, args, out: seen.append((args[0].dtype, out.dtype)))
    with apply(PrecisionPlan(default="bf16", modules={"head": "fp32"}), model):
        model(x)
    handle.remove()
    assert seen == [(torch.float32, torch.float32)]


def test_functional_call_on_a_planned_model():
    model = Net()
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    with apply(PrecisionPlan.uniform("bf16", policy="cast", params="fp32"), model):
        assert torch.func.functional_call(model, zeros, (x,)).abs().sum() == 0
        assert model(x).abs().sum() > 0
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


def test_weight_norm_and_parametrizations():
    torch.manual_seed(0)
    model = nn.Sequential(
        torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
        torch.nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
    )
    before = snapshot(model.eval())
    exact = model(x)
    for plan in (
        PrecisionPlan.uniform("bf16"),
        PrecisionPlan.uniform("bf16", policy="cast"),
        PrecisionPlan.uniform("bf16", policy="cast", params="fp32"),
        PrecisionPlan.uniform("e4m3"),
    ):
        with apply(plan, model):
            y = model(x)
            y.float().sum().backward()
        assert y.dtype == torch.bfloat16
        assert torch.allclose(y.float(), exact, atol=0.05)
        model.zero_grad()
        assert_restored(model, before)


def test_transformer_layers_train_and_infer_under_each_plan():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    data = torch.randn(2, 5, 16)
    before = snapshot(model)
    exact = model(data)
    for plan in (
        PrecisionPlan.uniform("bf16"),
        PrecisionPlan.uniform("fp16", policy="cast"),
        PrecisionPlan(default=LayerPrecision("bf16", policy="cast", params="fp32"), modules={"layers.*.norm1": "fp32"}),
        PrecisionPlan(modules={"layers.?.linear*": "e5m2", "layers.1.self_attn": "fp16"}),
    ):
        with apply(plan, model):
            y, _ = gradients(model, data)
            with torch.no_grad():
                inferred = model.eval()(data)
            model.train()
        assert (y.float() - exact).norm() / exact.norm() < 0.15
        assert (inferred.float() - exact).norm() / exact.norm() < 0.15
        assert_restored(model, before)
