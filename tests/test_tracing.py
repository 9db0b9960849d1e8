"""The tracer: producers named with their cause, masks and healthy models left alone, numbers untouched."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from precscope.errors import UsageError
from precscope.tracing import Tracer, trace


class Fn(nn.Module):
    """A module around a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


class Two(nn.Module):
    """`part` runs the function under test; the root adds what follows."""

    def __init__(self, function, after=lambda y: y):
        super().__init__()
        self.part, self.after = Fn(function), after

    def forward(self, *args):
        return self.after(self.part(*args))


def half(*values):
    return torch.tensor(values, dtype=torch.float16)


def traced(function, *args, after=lambda y: y, backward=False, **kwargs) -> Tracer:
    model = Two(function, after)
    with trace(model, **kwargs) as t:
        out = model(*args)
        if backward:
            (out.float().sum() * kwargs.get("scale", 1.0)).backward()
    return t


# producers


def test_a_square_beyond_fp16_is_named_with_its_numbers():
    t = traced(lambda x: x.pow(2).mean(), half(1.0, -795.0, 20.0), after=torch.rsqrt)
    found = t.first_nonfinite
    assert (found.module, found.call, found.op, found.phase) == ("part", 0, "aten.pow.Tensor_Scalar", "forward")
    assert found.kind == "overflow" and found.format == "fp16" and found.limit == 65504
    assert found.cause == "pow: input reaches 795, its square 6.32e+05 is beyond fp16's 65504"
    assert found.wide_amax == 795.0**2
    assert found.line.startswith("test_tracing.py:") and "x.pow(2)" in found.line
    (given,) = found.inputs
    assert (given.shape, given.dtype, given.amax, given.amin_nonzero, given.finite) == ((3,), "fp16", 795, 1, True)
    assert found.shapes == ((3,),) and found.dtypes == ("fp16",)
    assert found.outputs[0].share_inf == pytest.approx(1 / 3) and found.outputs[0].share_nan == 0
    assert len(t.events) == 1  # mean and rsqrt pass on what they got


def test_attention_logits_beyond_fp16_name_the_product_not_the_softmax():
    torch.manual_seed(0)
    q = (torch.randn(1, 6, 64) * 90).half()
    t = traced(lambda q: torch.bmm(q.float(), q.float().mT).half(), q, after=lambda s: s.softmax(-1))
    cast = t.first_nonfinite
    assert cast.op == "aten._to_copy.default" and "made by aten.bmm.default in part" in cast.cause

    class HalfProducts(TorchDispatchMode):  # what a device with fp16 products does, below the tracer
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.bmm.default:
                return func(*[a.float() for a in args]).half()
            return func(*args, **(kwargs or {}))

    with HalfProducts():
        t = traced(lambda q: q @ q.mT, q, after=lambda s: s.softmax(-1))
    first, second = t.events
    assert (first.module, first.op) == ("part", "aten.bmm.default")
    assert first.cause.startswith("bmm: sums of 64 products (") and "beyond fp16's 65504" in first.cause
    assert first.wide_amax == pytest.approx((q.float() @ q.float().mT).abs().max().item(), rel=1e-3)
    assert (second.module, second.op, second.cause) == ("", "aten._softmax.default", "_softmax: of +inf: inf - inf")


def test_zero_times_inf_in_backward():
    x = torch.tensor([300.0, 2.0]).half().requires_grad_()
    t = traced(lambda x: torch.pow(x, 3), x, after=lambda y: y * half(0.0, 1.0).clamp(max=1), backward=True)
    events = [e for e in t.events if e.phase == "backward"]
    assert events[0].node == "PowBackward0" and events[0].module == "part"
    assert "its square 9e+04 is beyond fp16's 65504" in events[0].cause
    assert events[1].kind == "invalid" and events[1].cause == "mul: 0 * inf"
    assert "torch.pow(x, 3)" in events[0].line
    assert torch.isnan(x.grad[0])


def test_log_of_a_flushed_value():
    t = traced(lambda p: (p * p).log(), half(1e-5, 0.5))
    assert t.first_nonfinite.op == "aten.log.default"
    assert t.first_nonfinite.cause == "log: of 0 in 1 of 2 elements (fp16 holds nothing below 3e-08)"


def test_an_eps_that_is_zero_in_fp16():
    t = traced(lambda x: F.normalize(x, dim=-1, eps=1e-12), half(0.0, 0.0))
    assert t.first_nonfinite.op == "aten.div.Tensor" and t.first_nonfinite.kind == "invalid"
    assert t.first_nonfinite.cause == "div: 0/0 in 2 of 2 elements; the constant 1e-12 of clamp_min is 0 in fp16"


def test_a_negative_variance():
    x = half(20.0, 20.1)
    t = traced(lambda x: ((x * x).mean() - x.mean() ** 2 - 1).sqrt(), x)
    assert "sqrt: of a negative number (-1" in t.first_nonfinite.cause


def test_a_sum_over_many():
    t = traced(lambda x: x.sum(), torch.ones(70_000, dtype=torch.float16))
    assert t.first_nonfinite.cause == "sum: over 70000 elements of up to 1 comes to 7e+04, beyond fp16's 65504"


@pytest.mark.parametrize("function, args, cause", [
    (lambda x: x / 0.0001, (half(60.0),), "div: 60 divided by 0.0001 is beyond fp16's 65504"),
    (torch.div, (half(60.0, 1.0), half(0.0, 1.0)), "div: division of up to 60 by 0 in 1 of 2 elements"),
    (torch.mul, (half(300.0), half(400.0)), "mul: 300 * 400 is 1.2e+05, beyond fp16's 65504"),
    (torch.add, (half(60000.0), half(6000.0)), "add: 6e+04 + 6000 is 6.6e+04, beyond fp16's 65504"),
    (torch.exp, (half(12.0),), "exp: of 12 is 1.63e+05, beyond fp16's 65504"),
    (torch.rsqrt, (half(0.0, 4.0),), "rsqrt: 0 in 1 of 2 elements (fp16 holds nothing below 3e-08)"),
    (lambda x: x.half(), (torch.tensor([1e5, 1.0]),),
     "_to_copy: cast from fp32 to fp16: values reach 1e+05, beyond fp16's 65504"),
    (torch.cumprod, (half(300.0, 300.0), 0), "cumprod: inputs reach 300, the result 9e+04, beyond fp16's 65504"),
    (torch.exp, (torch.tensor([100.0]),), "exp: of 100 is 2.69e+43, beyond fp32's 3.4028e+38"),
])  # fmt: skip
def test_causes(function, args, cause):
    assert traced(function, *args).first_nonfinite.cause == cause


def test_in_place_ops_are_judged_by_what_was_there_before():
    x = half(300.0, 2.0)
    t = traced(lambda x: x.mul_(x).mul_(2), x)
    assert [e.op for e in t.events] == ["aten.mul_.Tensor"]
    assert t.first_nonfinite.cause == "mul_: 300 * 300 is 9e+04, beyond fp16's 65504"


def test_an_overflow_by_the_loss_scale_says_so():
    x = torch.tensor([3.0], dtype=torch.float16, requires_grad=True)
    t = traced(lambda x: x * half(4.0), x, backward=True, scale=65536.0)
    found = t.first_nonfinite
    assert found.phase == "backward" and found.loss_scale == 65536
    assert "without the loss scale 65536 it would be 1: a smaller scale avoids it" in found.cause


def test_a_constant_that_fp16_has_no_place_for_is_reported_and_raised():
    model = Two(lambda x: x.masked_fill(x > 0, -1e9))
    with pytest.raises(RuntimeError, match="without overflow"), trace(model) as t:
        model(half(1.0, -1.0))
    found = t.first_nonfinite
    assert (found.kind, found.module, found.op) == ("exception", "part", "aten.masked_fill.Scalar")
    assert found.cause == "masked_fill: the constant -1e+09 is beyond fp16's 65504"
    assert "x.masked_fill(x > 0, -1e9)" in found.line and "without overflow" in found.error
    assert t.last_module == "part" and t.raised == found


def test_any_other_exception_of_an_op_is_kept_apart():
    model = Two(lambda x: x @ torch.ones(3, 3))
    with pytest.raises(RuntimeError), trace(model) as t:
        model(torch.ones(2, 4))
    assert t.first_nonfinite is None
    assert t.raised.module == "part" and "mm raised RuntimeError" in t.raised.cause
    assert not model.part._forward_hooks and not model.part._forward_pre_hooks


def test_buffers_that_held_inf_before():
    norm = nn.BatchNorm1d(2)
    norm.running_var.fill_(1e6)
    model = nn.Sequential(norm).half().eval()
    with trace(model) as t:
        model(half(1.0, 2.0)[None])
    assert (t.first_nonfinite.module, t.first_nonfinite.kind, t.first_nonfinite.op) == ("0", "held", "")
    assert t.first_nonfinite.cause == (
        "buffer 0.running_var held 2 inf before anything ran: values beyond fp16's 65504 were cast to it"
    )


def test_a_batch_that_is_not_finite():
    t = traced(lambda x: x * 2, torch.tensor([1.0, math.nan]))
    assert t.first_nonfinite.kind == "held" and "an input held 1 NaN" in t.first_nonfinite.cause


def test_the_optimizer_names_the_parameter():
    model = nn.Sequential(nn.Linear(2, 2, bias=False)).half()
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    optimizer = torch.optim.Adam(model.parameters(), foreach=False)
    with trace(model) as t:
        optimizer.step()
    assert t.first_nonfinite.module == "0" and not t.first_nonfinite.inside
    assert "0/0 in 4 of 4 elements; the constant 1e-08 of add_ is 0 in fp16" in t.first_nonfinite.cause


def test_foreach_ops_are_looked_at_one_by_one():
    model = nn.Linear(1, 1)
    with trace(model) as t:
        torch._foreach_mul_([half(2.0), half(60000.0)], 2.0)
    assert t.first_nonfinite.op == "aten._foreach_mul_.Scalar"
    assert t.first_nonfinite.inputs[0].amax == 60000


# what is no failure


CAUSAL = torch.ones(4, 4).triu(1).bool()


@pytest.mark.parametrize("write", [
    lambda s: s.masked_fill(CAUSAL, float("-inf")),
    lambda s: s.masked_fill_(CAUSAL, float("-inf")),
    lambda s: torch.where(CAUSAL, float("-inf"), s),
    lambda s: s + torch.full((4, 4), float("-inf")).triu(1),
    lambda s: s + torch.zeros(4, 4).masked_fill(CAUSAL, -1e9).half(),
    lambda s: s + torch.zeros(4, 4).masked_fill(CAUSAL, torch.finfo(torch.float32).min).half(),
    lambda s: s + (~CAUSAL).float().log(),
    lambda s: s + CAUSAL.half() * -1e9,
], ids=["masked_fill", "in place", "where", "full", "cast", "finfo", "log of a mask", "scaled"])  # fmt: skip
def test_masks_are_not_flagged(write):
    scores = torch.randn(4, 4).half()
    t = traced(write, scores, after=lambda s: s.float().softmax(-1) @ torch.ones(4, 4))
    assert t.first_nonfinite is None


def test_a_row_that_is_masked_throughout_is_flagged_where_it_becomes_nan():
    t = traced(lambda s: s.masked_fill(torch.ones(2, 2).bool(), float("-inf")), torch.zeros(2, 2),
               after=lambda s: s.softmax(-1))  # fmt: skip
    assert (t.first_nonfinite.module, t.first_nonfinite.op) == ("", "aten._softmax.default")
    assert t.first_nonfinite.cause == ("_softmax: a row is -inf throughout, nothing to choose from (2 of 2 rows)")


def test_what_the_next_op_repairs_is_not_flagged():
    x = torch.zeros(2, 3, requires_grad=True)
    t = traced(lambda x: x.norm(dim=-1), x, backward=True)  # 0/0, then masked_fill, inside torch's own backward
    assert t.first_nonfinite is None and torch.equal(x.grad, torch.zeros(2, 3))
    assert traced(lambda x: torch.where(x > 0, x.log(), 0.0), torch.zeros(2)).first_nonfinite is None
    assert traced(lambda x: x.log().exp(), torch.tensor([0.0, 3.0])).first_nonfinite is not None


def test_fresh_memory_and_infinity_on_purpose():
    def run(x):
        torch.full((3,), float("nan"))  # what empty may find
        y = torch.empty(3).copy_(x)
        return torch.minimum(y, torch.tensor(float("inf"))).clamp(max=float("inf"))

    assert traced(run, torch.ones(3)).first_nonfinite is not None  # NaN from full is no mask
    assert traced(lambda x: torch.empty(3).copy_(x).minimum(torch.tensor(math.inf)), torch.ones(3)).events == []
    assert traced(lambda x: torch.full((2,), math.inf).minimum(x).sum(), torch.ones(2)).events == []


class Healthy(nn.Module):
    """A bit of everything: convolution, norms, masked attention, dropout, an embedding, checkpointing."""

    def __init__(self):
        super().__init__()
        self.emb, self.conv, self.norm = nn.Embedding(10, 8), nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, ids):
        x = self.norm(self.conv(self.emb(ids).mT)).mT
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(checkpoint(self.attention, x, mask, use_reentrant=False))


def one_step(watched, dtype=None):
    torch.manual_seed(5)
    model, ids = Healthy(), torch.randint(0, 10, (4, 6))
    with trace(model) if watched else contextlib.nullcontext() as t:
        with torch.autocast("cpu", dtype=dtype) if dtype else contextlib.nullcontext():
            loss = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
    return t, [loss, *(p.grad for p in model.parameters()), *model.buffers()]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_healthy_model_gives_none_and_the_same_bits(dtype):
    t, watched = one_step(True, dtype)
    _, alone = one_step(False, dtype)
    assert t.first_nonfinite is None and t.events == [] and t.ops > 100
    assert all(torch.equal(a, b) for a, b in zip(watched, alone, strict=True))


def test_a_failing_model_gives_the_same_bits():
    def run(watched):
        x = half(300.0, 1.0, -2.0).requires_grad_()
        model = Two(lambda x: (x * x + 1).log(), after=lambda y: y * y)
        with trace(model) if watched else contextlib.nullcontext():
            y = model(x)
            y.float().sum().backward()
        return y.detach().view(torch.int16), x.grad.view(torch.int16)

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


# life


def test_hooks_and_modes_are_gone_after_an_error_in_the_model():
    model = Two(lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError), trace(model) as t:
        model(torch.ones(1))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert t.raised is None and t.last_module == "part"


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_parts_are_named_once_in_forward_and_again_when_recomputed(reentrant):
    inner = Fn(lambda x: torch.sin(x * x))
    model = Fn(lambda x: checkpoint(inner, x, use_reentrant=reentrant).float().sum())
    model.inner = inner
    x = half(300.0).requires_grad_()
    with trace(model) as t:
        model(x).backward()
    assert [(e.module, e.phase, e.recompute) for e in t.events if e.op == "aten.mul.Tensor"][:2] == [
        ("inner", "forward", False),
        ("inner", "forward", True),
    ]


def test_stop_looks_no_further():
    def many(x):
        return [x * x for _ in range(5)]

    assert len(traced(many, half(300.0)).events) == 5
    assert len(traced(many, half(300.0), stop=True).events) == 1
    assert len(traced(many, half(300.0), keep=3).events) == 3


def test_a_finding_prints_what_a_person_needs():
    found = traced(lambda x: x.pow(2), half(795.0)).first_nonfinite
    text = str(found)
    assert text.startswith("part, forward: aten.pow.Tensor_Scalar\n  cause   pow: input reaches 795")
    assert "  line    test_tracing.py:" in text and "  input   fp16 1, amax 795, smallest 795" in text
    assert text.endswith("  output  fp16 1, amax 0, smallest 0, 1 inf")
    assert found.to_dict()["inputs"][0]["amax"] == 795


def test_a_logarithm_of_zero_that_ends_in_an_integer_is_not_flagged():
    def buckets(distance):
        far = (torch.log(distance.float()) / 3.0 * 8.0).long()
        return torch.where(distance < 4, distance, far.clamp(max=31)).float()

    for stop in (False, True):
        fn = Fn(buckets)
        with trace(fn, stop=stop) as t:
            fn(torch.arange(8))
        assert t.first_nonfinite is None

    fn = Fn(lambda x: (torch.log(x) * -1.0).long())
    with trace(fn) as t:
        fn(torch.tensor([0.0, 0.5]))  # +inf: no bucket has that number
    assert t.first_nonfinite is not None and "log" in t.first_nonfinite.op


def test_what_an_op_made_and_another_replaced_was_not_in_the_batch():
    fn = Fn(lambda x: (x / x).nan_to_num())
    x = torch.zeros(3, requires_grad=True)
    with trace(fn) as t:
        y = fn(x)
        assert t.first_nonfinite is None
        y.sum().backward()  # its backward reads the NaN once more
    assert t.first_nonfinite is None or t.first_nonfinite.kind != "held"


def test_a_tracer_is_entered_once_at_a_time():
    fn, x = Fn(torch.relu), torch.ones(2)
    t = trace(fn)
    with t, pytest.raises(UsageError, match=r"entered already: call ps\.trace\(model\) again"):
        t.__enter__()
    with t:
        fn(x)
    assert t.ops == 1 and not fn._forward_hooks
