"""fp16 matrix products on CPUs without fp16 arithmetic: computed through fp32, at fp32 speed.

Few CPUs multiply fp16 matrices (AVX512-FP16, AMX-FP16, Arm FP16FML). On the others PyTorch falls back to scalar loops,
one hundred times slower than fp32: an fp16 run that takes a minute on a GPU takes hours, and an LSTM does not run at
all. `half_matmul_through_fp32()` intercepts those operations, forward and backward, widens their fp16 operands to fp32
(exact), multiplies in fp32, and rounds the result to fp16 once.

Why this is the same arithmetic: fp16 hardware with fp32 accumulation does just that, up to the order of summation. The
product of two fp16 values is exact in fp32, what overflows fp16 becomes inf on rounding, and subnormals are kept. One
exception: oneDNN's fused LSTM rounds its hidden state to fp16 once per layer here, not once per time step.

    with half_matmul_through_fp32():
        loss = model(x)
        loss.backward()                    # on the CPU, backward runs in this thread, hence under the mode too

torch.compile leaves functions alone that are called under such a mode. For models that are to be compiled there is
`compiling_half_matmul`, the same mode but one that lets them compile, with `inductor_through_fp32` as their backend.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten

_KEEP: dict[Any, frozenset[int]] = {
    op: frozenset()
    for op in (
        _aten.mm.default,
        _aten.addmm.default,
        _aten.bmm.default,
        _aten.baddbmm.default,
        _aten.addbmm.default,
        _aten._addmm_activation.default,
        _aten.convolution.default,
        _aten.convolution_backward.default,
        _aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
        _aten.mkldnn_rnn_layer.default,
    )
} | {
    # outputs at these positions are fp32 in the native kernel too: the logsumexp; the gradients of the fused LSTM
    _aten._scaled_dot_product_flash_attention_for_cpu.default: frozenset({1}),
    _aten.mkldnn_rnn_layer_backward.default: frozenset(range(7)),
}
"""Operations that go through fp32, and which of their outputs are not rounded to fp16 afterwards."""

_IN_PLACE = {
    _aten.addmm_.default: _aten.addmm.default,
    _aten.baddbmm_.default: _aten.baddbmm.default,
    _aten.addbmm_.default: _aten.addbmm.default,
}


class half_matmul_through_fp32(TorchDispatchMode):
    """Inside: matrix products, convolutions and attention on fp16 CPU tensors are computed in fp32, rounded once.

    Everything else, other dtypes and other devices run as they would without it. Costs a few microseconds of Python per
    operation of the model. PyTorch's fused encoder layers, used in evaluation, are off: they would arrive here whole,
    and below a mode autocast casts nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fused: list[bool] = []  # of each entry: whether they were on

    def __enter__(self) -> Any:
        self._fused.append(torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        return super().__enter__()

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        super().__exit__(kind, value, traceback)
        torch.backends.mha.set_fastpath_enabled(self._fused.pop())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        keep = _KEEP.get(func)
        if keep is not None:
            return _through_fp32(func, keep, args, kwargs) if _is_half(args) else func(*args, **kwargs)
        if func in _IN_PLACE and _is_half(args):
            return args[0].copy_(_through_fp32(_IN_PLACE[func], frozenset(), args, kwargs))
        if _is_composite(func) and _is_half(args):
            # under inference_mode, linear, matmul and the like arrive whole: take them apart under this mode
            with self:
                return func.decompose(*args, **kwargs)
        return func(*args, **kwargs)


class compiling_half_matmul(half_matmul_through_fp32):
    """The same around a model under torch.compile, which then compiles it; code that is not compiled is served too."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


def inductor_through_fp32(graph: Any, inputs: Any, *, mode: str | None, options: Mapping[str, Any] | None) -> Any:
    """A backend for torch.compile: inductor, with the fp16 products of this module computed in fp32, rounded once.

    graph, inputs: as torch.compile gives them. mode, options: inductor's.
    """
    from torch import _inductor
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    table = {**select_decomp_table(), **{op: functools.partial(_decomposed, op, keep) for op, keep in _KEEP.items()}}
    patches = {**(_inductor.list_mode_options(mode) if mode else {}), **(options or {})}
    # the key of autograd's cache knows nothing of decompositions: it would serve code that was made without ours
    with config.patch(enable_autograd_cache=False):
        return compile_fx(graph, inputs, config_patches=patches or None, decompositions=table)


def _decomposed(func: Any, keep: frozenset[int], *args: Any, **kwargs: Any) -> Any:
    for value in args:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            half = value.dtype is torch.float16 and value.device.type == "cpu"
            return _through_fp32(func, keep, args, kwargs) if half else NotImplemented
    return NotImplemented


def _is_half(args: tuple) -> bool:
    """Whether the first floating tensor among the arguments is a plain fp16 CPU tensor."""
    for value in args:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.dtype is torch.float16 and value.device.type == "cpu" and type(value) in _PLAIN
    return False


_PLAIN = (torch.Tensor, torch.nn.Parameter)


@functools.cache
def _is_composite(func: Any) -> bool:
    return (
        isinstance(func, torch._ops.OpOverload)
        and func.namespace != "prim"  # tracers ask for attributes of tensors with these: no kernels are registered
        and func._can_decompose()
        and func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    )


def _through_fp32(func: Any, keep: frozenset[int], args: tuple, kwargs: dict) -> Any:
    out = func(*[_widen(a) for a in args], **{k: _widen(v) for k, v in kwargs.items()})
    if isinstance(out, torch.Tensor):
        return out.half()
    return tuple(_narrow(o) if i not in keep else o for i, o in enumerate(out))


def _widen(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype is torch.float16 else value


def _narrow(value: Any) -> Any:
    return value.half() if isinstance(value, torch.Tensor) and value.dtype is torch.float32 else value


@functools.cache
def matmul_rates() -> tuple[float, float]:
    """Measured rates of a 192 x 192 matrix product on this CPU, (fp16, fp32) in GFLOP/s. Takes about 0.06 s, once."""
    return _rate(torch.float16), _rate(torch.float32)


def needs_half_matmul() -> bool:
    """Whether this CPU multiplies fp16 matrices more than three times slower than fp32 ones (measured once)."""
    half, single = matmul_rates()
    return single > 3 * half


def _rate(dtype: torch.dtype, size: int = 192) -> float:
    with torch.no_grad():
        a = torch.ones(size, size, dtype=dtype)
        best, spent = float("inf"), 0.0
        for _ in range(100):  # three products of 0.1 ms can all fall into one stall of the machine
            start = time.perf_counter()
            torch.mm(a, a)
            took = time.perf_counter() - start
            best, spent = min(best, took), spent + took
            if spent > 0.03:
                break
    return 2 * size**3 / best / 1e9
