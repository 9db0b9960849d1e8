"""Runs to report of, from known numbers through the real writers: a GPT whose one layer grows beyond fp16, its shadow
steps, a plan made from them, and training runs over seeds, some of them under a guard."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from precscope.events import Event, EventLog
from precscope.histogram import BINS, EXP_LO
from precscope.plans import PrecisionPlan
from precscope.profiles import Profile
from precscope.sites import Role, Site
from precscope.stats import StatsTable
from precscope.store import StatsWriter, prepare_directory, write_json

SEEDS = (0, 1, 2)


def row_of(values, source="fp32") -> dict:
    """The columns of a StatsTable for one tensor."""
    x = np.asarray(values, np.float64).ravel()
    finite = np.isfinite(x)
    a = np.abs(x[finite & (x != 0)])
    counts = np.bincount(np.clip(np.frexp(a)[1] - 1 - EXP_LO, 0, BINS - 1), minlength=BINS)
    return {
        "counts": counts.astype(np.int64), "zeros": int((x == 0).sum()), "pos_inf": int((x == np.inf).sum()),
        "neg_inf": int((x == -np.inf).sum()), "nan": int(np.isnan(x).sum()), "amax": float(a.max()) if len(a) else 0.0,
        "amin_nonzero": float(a.min()) if len(a) else np.inf, "sum": float(x[finite].sum()),
        "sumsq": float((x[finite] ** 2).sum()), "source": source,
    }  # fmt: skip


def table_of(rows: list[dict]) -> StatsTable:
    return StatsTable(**{name: np.array([r[name] for r in rows]) for name in rows[0]})


def modules_of(layers: int) -> list[tuple[str, str, int, int, bool]]:
    """(name, type, own parameters, FLOPs, whether a leaf) of a GPT."""
    found = [("", "GPT", 0, 0, False), ("tok", "Embedding", 65536, 0, True)]
    for i in range(layers):
        found += [
            (f"blocks.{i}.ln", "LayerNorm", 512, 1000, True), (f"blocks.{i}.attn.qkv", "Linear", 196608, 400_000, True),
            (f"blocks.{i}.mlp.fc1", "Linear", 262144, 530_000, True),
            (f"blocks.{i}.mlp.fc2", "Linear", 262144, 530_000, True),
        ]  # fmt: skip
    return [*found, ("head", "Linear", 65536, 130_000, True)]


def recorded_run(
    path: Path, *, layers: int = 3, steps: int = 8, n: int = 300, growing: str = "blocks.1.mlp.fc2"
) -> Path:
    """A run directory with shadow steps. The output of `growing` doubles from step to step, up to 2^17."""
    rng = np.random.default_rng(3)
    prepare_directory(path, exist="overwrite")
    modules = modules_of(layers)
    writer, shadow = StatsWriter(path), StatsWriter(path, kind="shadow")
    for step in range(0, 10 * steps, 10):
        sites, rows, scales = [], [], []
        for name, _, parameters, _, _ in modules:
            size = 2.0 ** (17 - steps + step / 10) if name == growing else 1.0
            gradient = rng.normal(0, 2.0**-19, n)
            items = [("input", rng.normal(0, 1, n)), ("output", np.clip(rng.normal(0, 0.3, n), -1, 1) * size),
                     ("grad_output", gradient)]  # fmt: skip
            if parameters:
                items += [("weight", rng.normal(0, 0.02, n)), ("grad_weight", gradient * 8)]
            for role, values in items:
                sites.append(Site(name, Role(role)))
                rows.append(row_of(values.astype(np.float32)))
                scales.append(65536.0 if role.startswith("grad") else 1.0)
        writer.write(np.full(len(sites), step), sites, table_of(rows), np.array(scales), {})
        if step % 40 == 0:
            priced = [i for i, s in enumerate(sites) if s.role in (Role.OUTPUT, Role.WEIGHT) and s.module]
            table = table_of([rows[i] for i in priced])
            table.weights = np.where(table.counts > 0, 10.0 ** rng.uniform(-7, -4, table.counts.shape), 0.0)
            shadow.write(np.full(len(priced), step), [sites[i] for i in priced], table, np.ones(len(priced)), {})
    _log(np.arange(10 * steps), seed=0).to_parquet(path / "train.parquet")
    write_json(path / "run.json", {
        "schema": 1, "status": "done", "task": "gpt", "model": "GPT", "parameters": 3_290_000, "precision": "bf16",
        "seed": 0, "torch": "2.13.0", "device": "cpu", "command": "precscope demo", "every": 10, "pid": 1,
        "train": {"steps": 10 * steps, "lr": 1e-3}, "optimizers": [{"class": "AdamW", "groups": [
            {"lr": 1e-3, "betas": [0.9, 0.95], "parameters": [f"{name}.weight" for name, *_ in modules[1:]]}]}],
    })  # fmt: skip
    _write_graph(path, modules)
    return path


def _write_graph(path: Path, modules) -> None:
    described = [
        {"name": a, "type": b, "parent": a.rpartition(".")[0], "params": c, "own_params": c, "flops": d, "calls": 1,
         "elements": 32_768, "leaf": leaf} for a, b, c, d, leaf in modules
    ]  # fmt: skip
    parameters = [
        {"name": f"{a}.weight", "shape": [c // 256, 256], "dtype": "float32", "requires_grad": True, "buffer": False,
         "owners": [a]} for a, _, c, _, _ in modules if c
    ]  # fmt: skip
    names = [name for name, *_ in modules if name]
    edges = [{"producer": a, "consumer": b, "elements": 32_768 + i} for i, (a, b) in enumerate(pairwise(names))]
    write_json(path / "graph.json", {"schema": 1, "modules": described, "parameters": parameters, "edges": edges})


def made_plan(run: Path) -> PrecisionPlan:
    """The plan that precscope makes of the run."""
    from precscope.advice import recommend

    return recommend(Profile.load(run), formats=("fp16", "fp32"))


def _log(step: np.ndarray, *, seed: int, end: float = 2.0, ms: float = 400.0, skipped=(), nonfinite=(), scale=1.0):
    rng = np.random.default_rng([seed, round(1000 * end), round(ms)])
    shared = np.random.default_rng(seed).normal(0, 0.1, len(step))  # the batches, equal for all runs of a seed
    scales = np.full(len(step), scale)
    for t in skipped:
        scales[step > t] /= 2
    held_out = np.where(step % 20 == 19, end + 0.01 * rng.normal(size=len(step)), np.nan)
    return pd.DataFrame({
        "step": step, "loss": end + 3 * np.exp(-step / 8.0) + shared + rng.normal(0, 0.01, len(step)), "lr": 1e-3,
        "scale": scales, "skipped": np.isin(step, skipped), "nonfinite": np.isin(step, nonfinite), "grad_norm": 1.0,
        "time_ms": ms * rng.lognormal(0, 0.05, len(step)), "memory_bytes": 10**9, "eval_loss": held_out,
    })  # fmt: skip


def training_run(path: Path, *, seeds=SEEDS, end: float = 2.0, ms: float = 400.0, events=(), **log) -> Path:
    """A training run of 80 steps and its twins under other seeds; `events` are those of its guard."""
    for seed in seeds:
        folder = path if seed == seeds[0] else path / "seeds" / f"{seed:04d}"
        prepare_directory(folder, exist="overwrite")
        step = np.arange(80)
        rows = _log(step, seed=seed, end=end, ms=ms, **log)
        rows.to_parquet(folder / "train.parquet")
        content = {
            "schema": 1, "status": "done", "precision": path.name, "model": "GPT", "parameters": 3_290_000,
            "seed": seed,
            "task_ref": "gpt", "train": {"steps": 80, "seed": seed}, "eval_loss": float(rows.eval_loss.iloc[-1]),
            "peak_memory_bytes": 2 * 10**9, "command": f"precscope train gpt --seed {seed}", "torch": "2.13.0",
        }  # fmt: skip
        write_json(folder / "run.json", content)
        if seed == seeds[0] and events:
            log_of = EventLog(folder / "events.jsonl")
            for event in events:
                log_of.write(event)
    return path


def training_runs(base: Path) -> list[Path]:
    """fp32, bf16, an fp16 that skips and spikes, and one with the plan under a guard; three seeds each."""
    events = [
        Event(0, "scale", "none", "the first loss scale was too large", numbers={"scale": 65536.0}),
        Event(41, "overflow", "promote", "blocks.1.mlp.fc2 reached 7.1e4, beyond 65504: it goes on in fp32",
              module="blocks.1.mlp.fc2", op="addmm", plan="plan-000041.json"),
        Event(60, "spike", "rollback", "the loss jumped to 9.1; back to step 40"),
    ]  # fmt: skip
    return [
        training_run(base / "fp32"), training_run(base / "bf16", end=2.004, ms=265.0),
        training_run(base / "fp16", end=2.2, ms=300.0, scale=65536.0, skipped=(0, 1, 40, 55), nonfinite=(40, 41)),
        training_run(base / "plan", end=2.003, ms=250.0, scale=16384.0, skipped=(41,), events=events),
    ]  # fmt: skip
