"""accumulate_many equals accumulate, one by one, for every backend; and buffers that CUDA graphs write into."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from precscope.errors import UsageError
from precscope.kernels import SlotBuffer, openmp
from precscope.kernels.reference import new_rows

pytest.importorskip("numba")

BACKENDS = ("torch", "numba")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def one_by_one(slots, tensors, multipliers, capacity, backend):
    buffer = SlotBuffer("cpu", capacity, backend=backend)
    for slot, x, multiplier in zip(slots, tensors, multipliers, strict=True):
        buffer.accumulate(slot, x, multiplier=multiplier)
    return buffer


def all_at_once(slots, tensors, multipliers, capacity, backend):
    buffer = SlotBuffer("cpu", capacity, backend=backend)
    buffer.accumulate_many(slots, tensors, multipliers=multipliers)
    return buffer


def same(a: SlotBuffer, b: SlotBuffer) -> None:
    """Bit for bit, sums included, and what is remembered of the sources."""
    np.testing.assert_array_equal(a._rows.numpy(), b._rows.numpy())
    assert a.read().source.tolist() == b.read().source.tolist()
    assert a.read().source_exponent.tolist() == b.read().source_exponent.tolist()


item = st.tuples(
    st.integers(0, 4),  # slot; the same one may come again
    st.lists(st.integers(-(2**15), 2**15 - 1), max_size=12),  # codes of fp16
    st.sampled_from(DTYPES),
    st.sampled_from([1.0, 0.5, 2.0**-16, 3.0, 2.0**20]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(item, max_size=8), st.sampled_from(BACKENDS))
def test_any_list_of_tensors(items, backend):
    slots = [slot for slot, *_ in items]
    tensors = [torch.tensor(codes, dtype=torch.int16).view(torch.float16).to(dtype) for _, codes, dtype, _ in items]
    multipliers = [m for *_, m in items]
    same(one_by_one(slots, tensors, multipliers, 5, backend), all_at_once(slots, tensors, multipliers, 5, backend))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_small_and_large_ones_of_all_kinds_on_any_number_of_threads(backend, threads):
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(300, 400, generator=generator)
    tensors = [
        torch.randn(n, generator=generator).to(DTYPES[n % 4]) for n in (1, 2, 3, 900, 9_001, 40_002, 65_537, 70_000)
    ]
    tensors += [base.t(), base[:, ::3], base[:0], base[3], torch.tensor(2.0), base[0].to(torch.float8_e4m3fn)]
    tensors += [torch.eye(7).to_sparse(), torch.nn.Parameter(base[:2].clone()), torch.tensor([np.inf, 1e-40, -0.0])]
    slots, multipliers = list(range(len(tensors)))[::-1], [2.0 ** (i % 3) for i in range(len(tensors))]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        many = all_at_once(slots, tensors, multipliers, len(tensors), backend)
        same(one_by_one(slots, tensors, multipliers, len(tensors), backend), many)
        assert many.read().count.sum() == sum(t.numel() for t in tensors)
    finally:
        torch.set_num_threads(before)


def test_small_tensors_are_shared_out_among_threads_in_one_round(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        if openmp.threads() == 1:
            pytest.skip("torch brings no OpenMP library that can be reached here")
        counts = []
        launch = openmp.run
        monkeypatch.setattr(openmp, "run", lambda *args: (counts.append(args[2]), launch(*args)))
        tensors = [torch.full((n,), 1.5) for n in range(1, 500)]
        buffer = SlotBuffer("cpu", 499, backend="numba")
        buffer.accumulate_many(range(499), tensors)
        assert counts == [2]
        assert buffer.read().count.tolist() == list(range(1, 500))
        buffer.accumulate_many(range(3), tensors[:3])  # too little for a second thread
        buffer.accumulate_many([0, 0], [torch.ones(60_000)] * 2)  # one row, two writers
        assert counts == [2] and buffer.read().count[0] == 1 + 1 + 120_000
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("slot", [-1, 3])
def test_no_row_but_the_buffers_own_is_written(backend, slot):
    buffer, x = SlotBuffer("cpu", 3, backend=backend), torch.ones(4)
    for call in (
        lambda: buffer.accumulate(slot, x),
        lambda: buffer.accumulate(slot, torch.eye(3).to_sparse()),
        lambda: buffer.accumulate_many([0, slot], [x[:0], x]),
        lambda: buffer.accumulate_update(0, slot, x, x),
        lambda: buffer.accumulate_weights(slot, x, x),
    ):
        with pytest.raises(UsageError, match=rf"this buffer has rows 0 to 2, got slot {slot}: make room"):
            call()
    assert (buffer._rows == new_rows(3, torch.device("cpu"))).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_negative_views_are_read_with_their_sign(backend):
    x = torch.tensor([1.0, 2.0, -4.0])
    buffer, view = SlotBuffer("cpu", 5, backend=backend), torch._neg_view(x)
    assert view.is_contiguous() and view.is_neg()
    buffer.accumulate(0, view)
    buffer.accumulate_many([1], [view])
    buffer.accumulate_update(2, 3, view, torch.zeros(3))
    buffer.accumulate_update(2, 3, torch.zeros(3), view)
    buffer.accumulate_update(4, 3, view, x)
    assert buffer.read().sum.tolist()[:3] == [1.0, 1.0, 0.0] and buffer.read().sum[4] == -2.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_buffer_of_inference_mode_serves_outside(backend):
    with torch.inference_mode():
        buffer = SlotBuffer("cpu", 1, backend=backend)
        buffer.accumulate(0, torch.ones(5))
        buffer.accumulate_weights(0, torch.ones(5), torch.ones(5))
        buffer.grow(3)
    buffer.accumulate(2, torch.ones(6))
    buffer.accumulate(2, torch.eye(2).to_sparse())
    buffer.accumulate_weights(2, torch.ones(6), torch.ones(6))
    assert buffer.read().count.tolist() == [5, 0, 10] and buffer.read().weights.sum(1)[[0, 2]].tolist() == [5, 6]
    buffer.clear()
    assert buffer.read().count.tolist() == [0, 0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("multiplier", [2.0**-1074, 2.0**-1023, 2.0**-1022, 2.0**1000])
def test_multipliers_at_the_ends_of_fp64(backend, multiplier):
    x = torch.tensor([1.0, -2.0], dtype=torch.float64)
    table = one_by_one([0], [x], [multiplier], 1, backend).read()
    assert (table.amax[0], table.amin_nonzero[0]) == (2 * multiplier, multiplier)
    assert table.source[0] == ("fp64" if multiplier >= 2.0**-1022 else "mixed")  # the kernels' own scale is normal


def test_wrong_lengths_are_said():
    buffer = SlotBuffer("cpu", 3)
    with pytest.raises(UsageError, match="got 2 slots, 1 tensors, 2 multipliers"):
        buffer.accumulate_many([0, 1], [torch.ones(2)])
    with pytest.raises(UsageError, match="got 1 slots, 1 tensors, 3 multipliers"):
        buffer.accumulate_many([0], [torch.ones(2)], multipliers=[1.0, 2.0, 3.0])
    with pytest.raises(UsageError, match="floating-point tensor"):
        buffer.accumulate_many([0], [torch.ones(2, dtype=torch.int64)])
    buffer.accumulate_many([], [])
    assert (buffer._rows == new_rows(3, torch.device("cpu"))).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_many_equal_one_by_one_and_do_not_wait():
    tensors = [
        torch.randn(n, device="cuda").to(DTYPES[i % 4]) for i, n in enumerate([0, 1, 700, 9_000, 70_000, 300_001])
    ]
    tensors += [tensors[5].float()[1:], tensors[3].view(90, 100).t()]
    one, many = (SlotBuffer("cuda", len(tensors)) for _ in range(2))
    many.accumulate_many(range(len(tensors)), tensors)  # compiles
    many.clear()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        many.accumulate_many(range(len(tensors)), tensors)
        for slot, x in enumerate(tensors):
            one.accumulate(slot, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    a, b = one.read(), many.read()
    for name in ("counts", "zeros", "amax", "amin_nonzero"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    np.testing.assert_allclose(a.sumsq, b.sumsq, rtol=2.0**-20)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_graphs_add_at_every_replay():
    x = torch.randn(10_000, device="cuda")
    y = torch.randn(500, device="cuda", dtype=torch.bfloat16)
    buffer = SlotBuffer("cuda", 4)

    def work():
        buffer.accumulate(0, x)
        buffer.accumulate(1, y, multiplier=0.5)
        buffer.accumulate_many([2, 3], [x, y])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    buffer.clear()
    for _ in range(3):
        x.normal_()
        torch.zeros(24, 8, dtype=torch.int64).pin_memory()  # what the captured table was copied from is not reused
        graph.replay()
    table = buffer.read()
    assert table.count.tolist() == [30_000, 1_500, 30_000, 1_500]
    assert table.source.tolist() == ["fp32", "bf16", "fp32", "bf16"] and table.source_exponent[1] == -1
    with pytest.raises(UsageError, match="which cannot move: make it with capacity=9"):
        buffer.grow(9)


def test_what_a_captured_graph_does_is_remembered(monkeypatch):
    """The bookkeeping of captures, without a GPU: the device alone is told to be one."""
    buffer = SlotBuffer("cpu", 3)
    buffer.accumulate(0, torch.ones(3))
    monkeypatch.setattr(buffer, "_on_gpu", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    buffer.accumulate(1, torch.ones(3, dtype=torch.bfloat16), multiplier=0.5)
    with pytest.raises(UsageError, match="call accumulate_weights once before a CUDA graph captures it"):
        buffer.accumulate_weights(2, torch.ones(3), torch.ones(3))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    buffer.clear()
    table = buffer.read()
    assert table.source.tolist() == ["none", "bf16", "none"] and table.source_exponent.tolist() == [0, -1, 0]
    with pytest.raises(
        UsageError, match="a captured CUDA graph writes into the 3 rows of this buffer, which cannot move"
    ):
        buffer.grow(4)
