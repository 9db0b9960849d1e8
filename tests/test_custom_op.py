"""SlotBuffer inside torch.compile: one whole graph, counts equal to eager mode, at every call."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from precscope.kernels import SlotBuffer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own making
COMPILERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
EXACT = ("counts", "zeros", "pos_inf", "neg_inf", "nan", "amax", "amin_nonzero", "sum", "sumsq", "source_exponent")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def same(a, b):
    for name in EXACT:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    assert a.source.tolist() == b.source.tolist()


def twins(capacity=4):
    return SlotBuffer("cpu", capacity), SlotBuffer("cpu", capacity)


@pytest.mark.parametrize("backend", COMPILERS)
def test_a_compiled_function_counts_what_eager_counts(backend):
    buffer, eager = twins()

    def watch(buffer, x):
        h = x * 2  # exact, whatever the compiler fuses
        buffer.accumulate(0, h)
        buffer.accumulate(1, h.bfloat16(), multiplier=2.0**-8)
        buffer.accumulate_many([2, 3], [x, h.half()], multipliers=[1.0, 4.0])
        return h.relu()

    compiled = torch.compile(lambda x: watch(buffer, x), backend=backend, fullgraph=True)
    for seed in range(3):
        x = torch.randn(40, 50, generator=torch.Generator().manual_seed(seed))
        x[0, :3] = torch.tensor([torch.inf, torch.nan, 0.0])
        torch.testing.assert_close(compiled(x), watch(eager, x), rtol=0, atol=0, equal_nan=True)
    same(buffer.read(), eager.read())
    assert buffer.read().count.tolist() == [6000] * 4
    assert buffer.read().source.tolist() == ["fp32", "bf16", "fp32", "fp16"]


@pytest.mark.parametrize("backend", COMPILERS)
def test_training_steps_count_each_forward_once_and_leave_gradients_alone(backend):
    torch.manual_seed(0)
    buffer, eager = twins(1)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))
    counted = []

    def loss(buffer, x):
        h = model[0](x)
        buffer.accumulate(0, h)
        return model[2](model[1](h)).square().mean()

    for target in (eager, buffer):
        function = loss if target is eager else torch.compile(loss, backend=backend, fullgraph=True)
        for seed in range(3):
            model.zero_grad()
            function(target, torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))).backward()
        counted.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*counted, strict=True):
        torch.testing.assert_close(a, b)
    assert buffer.read().count[0] == eager.read().count[0] == 3 * 8 * 32
    if backend == "aot_eager":
        same(buffer.read(), eager.read())


def test_one_graph_serves_all_calls_after_clear_and_grow():
    buffer, _ = twins(2)
    compiled = torch.compile(lambda x: (buffer.accumulate(1, x), x + 1)[1], backend="aot_eager", fullgraph=True)
    compiled(torch.ones(8))
    assert buffer.read().count.tolist() == [0, 8]
    buffer.clear()
    assert buffer.read().source.tolist() == ["none", "none"]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(3):
        compiled(torch.ones(8))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs  # nothing that is noted guards the graph
    assert buffer.read().source.tolist() == ["none", "fp32"] and buffer.read().count[1] == 24
    buffer.grow(5)
    compiled(torch.ones(8))
    assert buffer.read().count.tolist() == [0, 32, 0, 0, 0]


def test_bookkeeping_mixes_formats_as_in_eager_mode():
    buffer, eager = twins(1)
    compiled = torch.compile(lambda x: (buffer.accumulate(0, x), x + 1)[1], backend="aot_eager", fullgraph=True)
    for x in (torch.ones(3), torch.ones(3, dtype=torch.bfloat16)):
        compiled(x)
        eager.accumulate(0, x)
    same(buffer.read(), eager.read())
    assert buffer.read().source[0] == "mixed"


@pytest.mark.skipif(not hasattr(torch, "float8_e5m2"), reason="this torch has no fp8")
def test_fp8_and_strided_values_pass_too():
    buffer, eager = twins(2)

    def watch(buffer, x, y):
        buffer.accumulate(0, x)
        buffer.accumulate(1, y.t()[1:])
        return y + 1

    compiled = torch.compile(lambda x, y: watch(buffer, x, y), backend="aot_eager", fullgraph=True)
    x, y = torch.randn(64).to(torch.float8_e5m2), torch.randn(6, 7)
    compiled(x, y)
    watch(eager, x, y)
    same(buffer.read(), eager.read())
    assert buffer.read().source.tolist() == ["e5m2", "fp32"]


def test_the_operator_is_registered_as_one_that_writes_its_rows():
    buffer, eager = twins(1)
    x = torch.randn(10)
    torch.library.opcheck(
        torch.ops.precscope.accumulate.default, (buffer._rows, x, buffer.number, 0, 0.5),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip
    buffer.clear()
    torch.ops.precscope.accumulate(buffer._rows, x, buffer.number, 0, 0.5)
    eager.accumulate(0, x, multiplier=0.5)
    same(buffer.read(), eager.read())


def test_eager_calls_do_not_go_through_the_dispatcher():
    from torch.utils._python_dispatch import TorchDispatchMode

    names = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    with Seen():
        SlotBuffer("cpu", 1).accumulate(0, torch.ones(3))
    assert not [name for name in names if name.startswith("precscope")]


def test_a_buffer_is_not_kept_alive_by_its_number():
    buffer = SlotBuffer("cpu", 1)
    alive = weakref.ref(buffer)
    del buffer
    gc.collect()
    assert alive() is None


def test_a_graph_that_outlives_its_buffer_says_so():
    buffer = SlotBuffer("cpu", 1)
    rows, number = buffer._rows, buffer.number
    del buffer
    gc.collect()
    with pytest.raises(Exception, match="outlived its SlotBuffer"):
        torch.ops.precscope.accumulate(rows, torch.ones(3), number, 0, 1.0)
