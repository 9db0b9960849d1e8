"""Attribution: the module, call and phase of every op, and the user's line."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from precscope.attribution import Attribution, Where
from precscope.errors import ModelError


class Listing(TorchDispatchMode):
    """Notes (op, where, line) of every op but views and detach."""

    def __init__(self, who: Attribution) -> None:
        super().__init__()
        self.who = who
        self.seen: list[tuple[str, Where, str | None]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        where = self.who.where()
        if not func.is_view:
            self.seen.append((func.overloadpacket.__name__, where, self.who.line()))
        return func(*args, **(kwargs or {}))

    def of(self, op, **what):
        return [
            where
            for name, where, _ in self.seen
            if name == op and all(getattr(where, key) == value for key, value in what.items())
        ]


def listed(model, run, **kwargs):
    with Attribution(model, **kwargs) as who, Listing(who) as listing:
        run()
    return listing


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x):
        return torch.exp(self.lin(x) * 0.1)


class Net(nn.Module):
    """exp runs in `block`, addmm in `block.lin` and twice in the shared `head`, sin in the root."""

    def __init__(self):
        super().__init__()
        self.block, self.head = Inner(), nn.Linear(4, 4)

    def forward(self, x):
        return torch.sin(self.head(self.head(self.block(x))))


def test_forward_ops_belong_to_the_innermost_module_and_its_call():
    net = Net()
    listing = listed(net, lambda: net(torch.ones(2, 4)).square().mean())
    assert [(w.module, w.call) for w in listing.of("addmm")] == [("block.lin", 0), ("head", 0), ("head", 1)]
    assert [w.module for w in listing.of("exp")] == ["block"]
    assert listing.of("sin") == [Where("", 0, "forward")]
    assert listing.of("mean") == [Where("", 0, "forward", inside=False)]  # the loss is in no module


def test_backward_ops_belong_to_the_module_whose_forward_made_the_node():
    net = Net()
    listing = listed(net, lambda: net(torch.ones(2, 4)).square().mean().backward())
    products = [(w.module, w.call) for w in listing.of("mm", phase="backward")]
    assert products == [("head", 1), ("head", 1), ("head", 0), ("head", 0), ("block.lin", 0)]
    assert listing.of("cos") == [Where("", 0, "backward", "SinBackward0")]
    assert {w.module for w in listing.of("mul", node="ExpBackward0")} == {"block"}
    assert {w.inside for w in listing.of("mul", node="PowBackward0")} == {False}


def test_calls_are_counted_per_pass():
    net = Net()

    def run():
        for _ in range(3):
            net(torch.ones(2, 4))

    listing = listed(net, run)
    assert [w.call for w in listing.of("addmm", module="head")] == [0, 1] * 3


def test_two_passes_before_one_backward_stay_apart():
    net = Net()
    listing = listed(net, lambda: (net(torch.ones(2, 4)) + net(torch.zeros(2, 4))).sum().backward())
    assert len(listing.of("cos", module="", phase="backward")) == 2
    assert len(listing.of("mm", module="head", phase="backward")) == 8


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.lin, self.out, self.reentrant = nn.Linear(4, 4), nn.Linear(4, 4), reentrant

    def part(self, x):
        return torch.sin(torch.exp(self.lin(torch.tanh(x))))

    def forward(self, x):
        return self.out(checkpoint(self.part, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_is_forward_of_the_module_recomputed(reentrant):
    net = Checkpointed(reentrant)
    x = torch.ones(2, 4, requires_grad=True)
    listing = listed(net, lambda: net(x).sum().backward())
    assert listing.of("addmm", module="lin") == [
        Where("lin", 0, "forward"),
        Where("lin", 0, "forward", recompute=True),
    ]
    for op in ("tanh", "exp"):  # of the root's own code, in no module while it is recomputed
        assert listing.of(op) == [Where("", 0, "forward"), Where("", 0, "forward", recompute=True)]
    assert listing.of("cos") == [Where("", 0, "backward", "SinBackward0")]
    assert {(w.module, w.inside) for w in listing.of("tanh_backward")} == {("", True)}
    assert {w.module for w in listing.of("mm", node="AddmmBackward0")} == {"lin", "out"}


def test_a_gradient_taken_inside_forward_is_backward():
    class Penalty(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x):
            (slope,) = torch.autograd.grad(torch.sin(self.lin(x)).sum(), x, create_graph=True)
            return torch.tan(slope)

    net = Penalty()
    x = torch.ones(2, 4, requires_grad=True)
    listing = listed(net, lambda: net(x).sum().backward())
    assert listing.of("cos")[0] == Where("", 0, "backward", "SinBackward0")
    assert listing.of("tan") == [Where("", 0, "forward")]
    assert listing.of("mm", module="lin", phase="backward")


def test_custom_functions_accumulation_and_gradient_hooks():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return torch.ceil(g)

    class User(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x):
            y = self.lin(x)
            y.register_hook(torch.floor)
            return Double.apply(y)

    net = User()
    listing = listed(
        net, lambda: [net(torch.ones(2, 4)).sum().backward() for _ in range(2)], lines=True
    )  # the second time gradients accumulate
    assert {(w.module, w.node) for w in listing.of("ceil")} == {("", "DoubleBackward")}
    assert {w.module for w in listing.of("floor")} == {"lin"}
    assert {w.module for w in listing.of("add_", node="AccumulateGrad")} == {"lin"}
    line = next(line for op, _, line in listing.seen if op == "ceil")
    assert "in backward: return torch.ceil(g)" in line


def test_casts_of_autocast_belong_to_the_module_they_are_made_for():
    net = Net()

    def run():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = net(torch.ones(2, 4)).sum()
        loss.backward()

    listing = listed(net, run)
    assert {w.module for w in listing.of("_to_copy", phase="forward")} == {"block.lin", "head"}
    assert {w.module for w in listing.of("_to_copy", node="ToCopyBackward0")} == {"block.lin", "head"}


def test_lines_are_the_users_in_backward_those_of_the_forward_op():
    net = Net()
    listing = listed(net, lambda: net(torch.ones(2, 4)).sum().backward(), lines=True)
    lines = {(op, where.phase): line for op, where, line in listing.seen}
    assert lines["exp", "forward"].startswith("test_attribution.py:")
    assert lines["exp", "forward"].endswith("in forward: return torch.exp(self.lin(x) * 0.1)")
    assert lines["cos", "backward"].endswith("in forward: return torch.sin(self.head(self.head(self.block(x))))")
    assert all(line is None for _, _, line in listed(net, lambda: net(torch.ones(2, 4))).seen)


class Fails(nn.Module):
    def forward(self, x):
        raise ArithmeticError("on purpose")


def hooks_of(model):
    return [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


def test_no_hook_is_left_after_an_error_inside_the_model():
    net = nn.Sequential(nn.Linear(4, 4), Fails())
    with pytest.raises(ArithmeticError), Attribution(net):
        net(torch.ones(2, 4))
    assert hooks_of(net) == []


def test_a_module_that_raises_and_is_caught_does_not_stay_on_the_stack():
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.fails, self.lin = nn.Sequential(Fails()), nn.Linear(4, 4)

        def forward(self, x):
            try:
                return self.fails(x)
            except ArithmeticError:
                return torch.sin(self.lin(x))

    net = Careful()
    listing = listed(net, lambda: net(torch.ones(2, 4)).sum().backward())
    assert listing.of("sin") == [Where("", 0, "forward")]
    assert [w.module for w in listing.of("addmm")] == ["lin"]
    assert listing.of("cos") == [Where("", 0, "backward", "SinBackward0")]


def test_nothing_is_noted_of_a_copy_made_inside():
    net = Net()
    with Attribution(net) as who, Listing(who) as listing:
        twin = copy.deepcopy(net)
        twin(torch.ones(2, 4))
    assert not any(w.inside for w in listing.of("addmm"))
    for module in twin.modules():  # the copy took the hooks along
        module._forward_hooks.clear(), module._forward_pre_hooks.clear()


def test_wrapped_models_are_named_by_the_model_within():
    net = Net()
    wrapped = nn.DataParallel(net)
    listing = listed(wrapped, lambda: wrapped.module(torch.ones(2, 4)))
    assert [w.module for w in listing.of("addmm")] == ["block.lin", "head", "head"]


def test_compiled_models_run_eagerly():
    net = Net()
    compiled = torch.compile(net, backend="eager")
    listing = listed(compiled, lambda: compiled(torch.ones(2, 4)).sum().backward())
    assert [w.module for w in listing.of("addmm")] == ["block.lin", "head", "head"]
    assert listing.of("cos") == [Where("", 0, "backward", "SinBackward0")]


def test_numbers_are_untouched():
    def gradients(watched):
        torch.manual_seed(3)
        net = Net()
        x = torch.randn(2, 4)
        if watched:
            listed(net, lambda: net(x).sum().backward(), lines=True)
        else:
            net(x).sum().backward()
        return [p.grad for p in net.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False), strict=True))


def test_owner_of_a_parameter():
    net = Net()
    with Attribution(net) as who:
        assert who.owner(net.block.lin.bias) == "block.lin"
        assert who.owner(torch.ones(1)) is None


def test_a_model_is_needed():
    with pytest.raises(ModelError, match=r"expected a torch.nn.Module, got int"):
        Attribution(3)
