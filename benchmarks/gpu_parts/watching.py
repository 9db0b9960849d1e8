"""What watching costs: steps of the GPT with and without a recorder, in turn; shadow steps; every op."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import precscope as ps
from precscope.kernels import SlotBuffer

from .setting import DTYPES, Setting


class Loop:
    """The GPT in training as a user writes it: autocast, a GradScaler under fp16; watched where `every` is given."""

    def __init__(self, setting: Setting, word: str, every: int | None = None, out: Path | None = None) -> None:
        self.setting, self.dtype, self.task = setting, DTYPES[word], setting.task()
        self.model = self.task.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.scaler = torch.amp.GradScaler(setting.device.type, enabled=word == "fp16")
        self.batches = [tuple(t.to(setting.device) for t in self.task.batch(i)) for i in range(4)]
        self.step, self.recorder = 0, None
        if every is not None:
            assert out is not None
            self.recorder = ps.record(self.model, out, optimizer=self.optimizer, scaler=self.scaler, every=every)
            self.recorder.__enter__()

    def loss(self) -> torch.Tensor:
        """Of the present batch."""
        return self.task.loss(self.model, self.batches[self.step % 4])

    def one_step(self) -> float:
        """Seconds of a training step, the device waited for."""
        self.setting.wait()
        start = time.perf_counter()
        with torch.autocast(self.setting.device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32):
            loss = self.loss()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.recorder is not None:
            self.recorder.step()
        self.step += 1
        self.setting.wait()
        return time.perf_counter() - start

    def close(self) -> None:
        """End recording."""
        if self.recorder is not None:
            self.recorder.__exit__(None, None, None)


def recorder(setting: Setting) -> None:
    """Mean step time by every= over that of unwatched steps in turn, and the bytes that a recorded step reads."""
    bandwidth, rows = setting.copy_bandwidth(), []
    setting.keep(copy_bytes_per_s=bandwidth)
    turns = ((1, setting.count(20, 3)), (10, setting.count(40, 10)), (100, setting.count(100, 10)))
    for word in ("fp16", "bf16") if setting.cuda else ("bf16",):  # most CPUs have no fp16 products
        traffic = _bytes_read(setting, word)
        for every, steps in turns if setting.cuda else turns[:2]:
            row = _beside(setting, word, every, steps)
            floor = traffic / bandwidth
            of_a_step = floor / (row["plain_ms"] * 1e-3)
            rows.append({**row, "bytes_of_a_recorded_step": traffic, "floor_ms": 1e3 * floor,
                         "floor_ratio": 1 + of_a_step / every})  # fmt: skip
            setting.keep(rows=rows)


def _beside(setting: Setting, word: str, every: int, steps: int) -> dict[str, Any]:
    """Watched and unwatched steps in turn; means, for a recorded step is one in `every`."""
    with tempfile.TemporaryDirectory() as folder:
        plain, watched = Loop(setting, word), Loop(setting, word, every, Path(folder) / "run")
        times: dict[str, list[float]] = {"plain": [], "watched": []}
        warm = every if every <= 10 else 3
        for turn in range(steps + warm):
            pair = [("plain", plain), ("watched", watched)]
            for name, loop in pair if turn % 2 else pair[::-1]:
                spent = loop.one_step()
                if turn >= warm:
                    times[name].append(spent)
        watched.close()
    mean = {name: 1e3 * statistics.fmean(values) for name, values in times.items()}
    quartiles = statistics.quantiles(times["plain"], n=4) if steps > 1 else [times["plain"][0]] * 3
    return {"precision": word, "every": every, "steps": steps, "plain_ms": mean["plain"], "ms": mean["watched"],
            "ratio": mean["watched"] / mean["plain"],
            "plain_spread": (quartiles[2] - quartiles[0]) / quartiles[1]}  # fmt: skip


def _bytes_read(setting: Setting, word: str) -> int:
    """Bytes of all tensors that the kernels are given in one recorded step, each once per kernel call."""
    with tempfile.TemporaryDirectory() as folder:
        loop = Loop(setting, word, 1, Path(folder) / "run")
        loop.one_step()  # buffers take their places
        with _counted() as count:
            loop.one_step()
        loop.close()
    return count[0]


@contextmanager
def _counted() -> Iterator[list[int]]:
    """Count the bytes that SlotBuffer's methods are given."""
    count, depth = [0], [0]
    names = ("accumulate", "accumulate_many", "accumulate_update")
    own = {name: getattr(SlotBuffer, name) for name in names}

    def counting(method: Any) -> Any:
        def call(self: SlotBuffer, *args: Any, **kwargs: Any) -> Any:
            if not depth[0]:  # not what one of them hands to another
                for value in [*args, *kwargs.values()]:
                    tensors = value if isinstance(value, list | tuple) else [value]
                    count[0] += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
            depth[0] += 1
            try:
                return method(self, *args, **kwargs)
            finally:
                depth[0] -= 1

        return call

    for name in names:
        setattr(SlotBuffer, name, counting(own[name]))
    try:
        yield count
    finally:
        for name, method in own.items():
            setattr(SlotBuffer, name, method)


def shadow(setting: Setting) -> None:
    """A shadow step, and the same with every op recorded, over a plain fp32 forward and backward; the tracer over the
    bf16 one that it watches."""
    rounds = setting.count(5)
    for name, ops in (("shadow", False), ("shadow with every op", True)):
        setting.keep(**{name: _shadowed(setting, rounds, ops)})
    loop = Loop(setting, "bf16")

    def forward_backward(traced: bool) -> None:
        with torch.autocast(setting.device.type, dtype=torch.bfloat16):
            if traced:
                with ps.trace(loop.model):
                    loop.loss().backward()
            else:
                loop.loss().backward()
        loop.model.zero_grad()

    calls = {"plain": lambda: forward_backward(False), "trace": lambda: forward_backward(True)}
    spent = setting.median_ms(calls, rounds)
    setting.keep(trace={"plain_ms": spent["plain"], "ms": spent["trace"], "ratio": spent["trace"] / spent["plain"]})


def _shadowed(setting: Setting, rounds: int, ops: bool) -> dict[str, float]:
    loop = Loop(setting, "bf16")
    with (
        tempfile.TemporaryDirectory() as folder,
        ps.record(loop.model, Path(folder) / "run", optimizer=loop.optimizer, every=1, ops=ops) as watch,
    ):

        def plain() -> None:
            with watch.paused():
                loop.loss().backward()
            loop.model.zero_grad()

        spent = setting.median_ms({"fp32": plain, "shadow": lambda: watch.shadow(loop.loss)}, rounds)
    return {"fp32_ms": spent["fp32"], "ms": spent["shadow"], "ratio": spent["shadow"] / spent["fp32"]}
