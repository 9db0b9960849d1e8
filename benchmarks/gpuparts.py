"""The parts of gpu.py. Times of single operations are of CUDA events; each figure is a median of alternating rounds."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import precscope as ps
from precscope.kernels import SlotBuffer, backend_for
from precscope.rounding import quantize
from precscope.training.tasks.gpt import SIZES

FORMATS = ("fp16", "bf16", "e4m3", "e5m2", "e4m3fnuz", "e5m2fnuz", "e3m2", "e2m3", "e2m1")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Setting:
    """device: where. size: of the GPT. steps: of training runs. out: where files go."""

    device: torch.device
    size: str
    steps: int
    out: Path

    @property
    def cuda(self) -> bool:
        """Whether this is the real thing."""
        return self.device.type == "cuda"

    def task(self) -> ps.Task:
        """A new GPT on the device, of equal start."""
        from precscope.tasks import load_task
        from precscope.training.tasks.gpt import gpt

        task = load_task(lambda: gpt(self.size)).make(seed=0)
        task.model.to(self.device)
        return task

    def wait(self) -> None:
        """Until the device has done its work."""
        if self.cuda:
            torch.cuda.synchronize()


def median_ms(calls: dict[str, Callable[[], object]], setting: Setting, rounds: int = 15) -> dict[str, float]:
    """Milliseconds of each call, in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 3):
        for name, call in calls.items():
            setting.wait()
            start = time.perf_counter()
            if setting.cuda:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                call()
                end.record()
                end.synchronize()
                spent = begin.elapsed_time(end)
            else:
                call()
                spent = 1e3 * (time.perf_counter() - start)
            if turn > 2:
                times[name].append(spent)
    return {name: statistics.median(values) for name, values in times.items()}


def correctness(setting: Setting) -> dict[str, Any]:
    """Mismatches of the kernels' counts and of quantize against the CPU: all must be 0."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (2**20,), generator=generator, dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32)
    rounding, counts = {}, {}
    for fmt in FORMATS:
        here, there = quantize(x, fmt), quantize(x.to(setting.device), fmt).cpu()
        same = (here.view(torch.int32) == there.view(torch.int32)) | (here.isnan() & there.isnan())
        rounding[fmt] = int((~same).sum())
    for name, dtype in {**DTYPES, "fp64": torch.float64}.items():
        values = x.to(dtype)
        here, there = ps.summarize(values), ps.summarize(values.to(setting.device))
        differ = int((np.asarray(here.counts) != np.asarray(there.counts)).sum())
        rest = [(getattr(here, n), getattr(there, n)) for n in ("zeros", "pos_inf", "neg_inf", "nan", "amax")]
        counts[name] = differ + sum(a != b for a, b in rest)
    if any(rounding.values()) or any(counts.values()):
        raise AssertionError(f"mismatches: quantize {rounding}, summarize {counts}")
    return {"backend": backend_for(setting.device), "quantize_mismatches": rounding, "summarize_mismatches": counts}


def copy_bandwidth(setting: Setting) -> float:
    """Bytes per second that a device-to-device copy reads and writes together."""
    source = torch.empty((1 << 30 if setting.cuda else 1 << 24) // 4, device=setting.device)
    target = torch.empty_like(source)
    spent = median_ms({"copy": lambda: target.copy_(source)}, setting)["copy"]
    return 2 * source.numel() * 4 / (spent * 1e-3)


def kernels(setting: Setting) -> dict[str, Any]:
    """Time of SlotBuffer.accumulate by size and dtype; share: of what copy bandwidth allows for the bytes read."""
    bandwidth = copy_bandwidth(setting)
    buffer, rows = SlotBuffer(setting.device), []
    for megabytes in (0.25, 1, 4, 16, 64, 256) if setting.cuda else (0.25, 1):
        for name, dtype in DTYPES.items():
            n = int(megabytes * 2**20) // dtype.itemsize
            x = torch.randn(n, device=setting.device).to(dtype)
            calls: dict[str, Callable[[], object]] = {
                "accumulate": lambda x=x: buffer.accumulate(0, x), "torch.sum": lambda x=x: x.sum()
            }  # fmt: skip
            spent = median_ms(calls, setting)
            floor = 1e3 * n * dtype.itemsize / bandwidth
            rows.append({"megabytes": megabytes, "dtype": name, "ms": spent["accumulate"], "sum_ms": spent["torch.sum"],
                         "floor_ms": floor, "share_of_bandwidth": floor / spent["accumulate"]})  # fmt: skip
    return {"copy_bytes_per_s": bandwidth, "rows": rows}


class Loop:
    """A GPT in training under autocast, watched or not."""

    def __init__(self, setting: Setting, dtype: torch.dtype, every: int | None, out: Path) -> None:
        self.setting, self.dtype, self.task = setting, dtype, setting.task()
        self.model = self.task.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.scaler = torch.amp.GradScaler(setting.device.type, enabled=dtype is torch.float16)
        self.step, self.recorder = 0, None
        self.batches = [tuple(t.to(setting.device) for t in self.task.batch(i)) for i in range(4)]
        if every is not None:
            self.recorder = ps.record(self.model, out, optimizer=self.optimizer, scaler=self.scaler, every=every)
            self.recorder.__enter__()

    def loss(self) -> torch.Tensor:
        """Of the present batch."""
        return self.task.loss(self.model, self.batches[self.step % 4])

    def one_step(self) -> float:
        """Seconds of a training step, the device waited for."""
        self.setting.wait()
        start = time.perf_counter()
        with torch.autocast(self.setting.device.type, dtype=self.dtype):
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


def recorder(setting: Setting) -> dict[str, Any]:
    """Mean step time by every=, over that of unwatched steps in turn, for fp16 with a loss scale and for bf16."""
    bandwidth, found = copy_bandwidth(setting), {}
    for word in ("fp16", "bf16"):
        if word == "fp16" and not setting.cuda:
            continue  # no fp16 products on most CPUs
        for every, steps in ((1, 20), (10, 40), (100, 100)) if setting.cuda else ((1, 4),):
            with tempfile.TemporaryDirectory() as folder:
                plain = Loop(setting, DTYPES[word], None, Path(folder))
                watched = Loop(setting, DTYPES[word], every, Path(folder) / "run")
                times: dict[str, list[float]] = {"plain": [], "watched": []}
                for turn in range(steps + 5):
                    for name, loop in (("plain", plain), ("watched", watched)):
                        spent = loop.one_step()
                        if turn >= 5:
                            times[name].append(spent)
                watched.close()
                seen = ps.Profile.load(Path(folder) / "run")
                count = float(seen.table.count.sum()) / max(len(seen.steps), 1)
            base = statistics.median(times["plain"])
            found[f"{word}, every={every}"] = {
                "plain_ms": 1e3 * base,
                "ratio": statistics.fmean(times["watched"]) / statistics.fmean(times["plain"]),
                "values_per_recorded_step": count,
                "floor_ratio_of_a_recorded_step": 1 + 2 * count / bandwidth / base,  # at two bytes a value
            }
    return found


def shadow(setting: Setting) -> dict[str, Any]:
    """A shadow step, one with every op recorded, and the tracer, over plain fp32 forward and backward."""
    with tempfile.TemporaryDirectory() as folder:
        loop = Loop(setting, torch.bfloat16, 1, Path(folder) / "run")
        assert loop.recorder is not None

        def plain() -> None:
            with loop.recorder.paused():
                loop.loss().backward()
            loop.model.zero_grad()

        def ops() -> None:
            with ps.trace(loop.model):
                loop.loss().backward()
            loop.model.zero_grad()

        calls = {"fp32": plain, "shadow": lambda: loop.recorder.shadow(loop.loss), "trace": ops}
        spent = median_ms(calls, setting, rounds=5)
        loop.close()
    return {"ms": spent, "shadow_ratio": spent["shadow"] / spent["fp32"], "trace_ratio": spent["trace"] / spent["fp32"]}


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision if torch.cuda.is_available() else None
    if before is not None:
        torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        if before is not None:
            torch.backends.cuda.matmul.fp32_precision = before


def matmuls(setting: Setting) -> list[dict[str, Any]]:
    """The GPT's matrix products by format; e4m3 by torch._scaled_mm, with and without rounding the operands to it."""
    config, rows = SIZES[setting.size], []
    tokens, width = config.batch * config.context, config.width
    shapes = {"qkv": 3 * width, "proj": width, "fc1": 4 * width, "head": config.vocabulary}
    for name, columns in shapes.items():
        a = torch.randn(tokens, width, device=setting.device)
        b = torch.randn(columns, width, device=setting.device)
        calls: dict[str, Callable[[], object]] = {"fp32": lambda a=a, b=b: a @ b.T}
        for word in ("bf16", "fp16") if setting.cuda else ("bf16",):
            low = a.to(DTYPES[word]), b.to(DTYPES[word])
            calls[word] = lambda low=low: low[0] @ low[1].T
        if setting.cuda and torch.cuda.get_device_capability() >= (8, 9):
            one = torch.ones((), device=setting.device)
            low8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
            half = a.bfloat16(), b.bfloat16()

            def scaled(x: torch.Tensor, y: torch.Tensor, one: torch.Tensor = one) -> torch.Tensor:
                return torch._scaled_mm(x, y.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

            calls["e4m3"] = lambda low8=low8, scaled=scaled: scaled(*low8)
            calls["e4m3, operands rounded"] = lambda half=half, scaled=scaled: scaled(
                *(t.to(torch.float8_e4m3fn) for t in half)
            )
        with _tf32(False):
            spent = median_ms(calls, setting)
        if setting.cuda:
            with _tf32(True):
                spent["tf32"] = median_ms({"tf32": calls["fp32"]}, setting)["tf32"]
        rows.append({"product": name, "shape": [tokens, width, columns], "ms": spent})
    return rows


def advice(setting: Setting) -> dict[str, Any]:
    """Profile with measured costs, and a plan confirmed on the device; plan.json is left in OUT."""
    with tempfile.TemporaryDirectory() as folder:
        word = "fp16" if setting.cuda else "bf16"
        formats = ("fp16", "bf16", "fp32") if setting.cuda else ("bf16", "fp32")
        profile = ps.profile(
            setting.task(), out=Path(folder) / "run", steps=20, every=5, precision=word, note=lambda text: None
        )
        start = time.perf_counter()
        plan = ps.recommend(profile, formats=formats, task=setting.task())
        seconds, costs = time.perf_counter() - start, profile.cost
    plan.save(setting.out / "plan.json")
    return {
        "status": plan.status,
        "says": plan.made_from.get("says"),
        "counts": dict(plan.counts()),
        "recommend_seconds": seconds,
        "costs_ms": None if costs is None else costs.round(4).to_dict("records"),
    }


def training(setting: Setting) -> dict[str, Any]:
    """Each precision from the same start and on the same data; the plan is that of the part `advice`."""
    config, found = SIZES[setting.size], {}
    asked: dict[str, dict[str, Any]] = {"fp32": {"precision": "fp32"}, "bf16": {"precision": "bf16"}}
    if setting.cuda:
        asked |= {"tf32": {"precision": "tf32"}, "fp16": {"precision": "fp16"}}
    if (setting.out / "plan.json").exists():
        asked["plan"] = {"plan": setting.out / "plan.json"}
    for word, how in asked.items():
        result = ps.train(setting.task(), steps=setting.steps, lr=3e-4, device=setting.device, **how)
        found[word] = {
            **result.to_dict(),
            "tokens_per_second": 1e3 * config.batch * config.context / result.step_time_ms,
            "notes": list(result.notes),
        }
    return found


def tests(setting: Setting) -> dict[str, Any]:
    """The tests marked gpu, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    tail = (done.stdout + done.stderr).strip().splitlines()[-15:]
    if done.returncode not in (0, 5):  # 5: none were collected
        raise AssertionError("\n".join(tail))
    return {"summary": tail[-1] if tail else ""}


PARTS: dict[str, Callable[[Setting], Any]] = {
    "correctness": correctness, "kernels": kernels, "recorder": recorder, "shadow": shadow, "matmuls": matmuls,
    "advice": advice, "training": training, "tests": tests,
}  # fmt: skip
