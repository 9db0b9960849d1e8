"""What the processes of tests/test_engine.py run: `python ranked_training.py SCENARIO STRATEGY OUT`."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import precscope as ps
from precscope.errors import TrainingError, UsageError
from precscope.training import train

STEPS = 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc, self.out = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.out(F.gelu(self.fc(self.norm(x))))


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0, batchnorm: bool = False) -> None:
        super().__init__()
        self.stem, self.drop = nn.Linear(8, 16), nn.Dropout(dropout)
        self.blocks = nn.ModuleList([Block(), Block(), nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))])
        self.norm = nn.BatchNorm1d(16) if batchnorm else nn.Identity()
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.drop(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def batch_of(index: int):
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(8, 8, generator=generator)
    return x, x[:, :4].sin() * 3


def make(dropout: float = 0.0, batchnorm: bool = False) -> ps.Task:
    """A small regression."""
    torch.manual_seed(0)
    model = Net(dropout, batchnorm)
    return ps.Task(
        model=model, loss=lambda model, batch: F.mse_loss(model(batch[0]).float(), batch[1]), batches=batch_of,
        eval_batches=[batch_of(10_000 + i) for i in range(2)], name="net",
    )  # fmt: skip


def noisy() -> ps.Task:
    """With what differs between processes: dropout, BatchNorm."""
    return make(0.2, True)


def raising() -> ps.Task:
    """Process 1 raises in its third batch."""
    task = make()

    def batches(index: int):
        if os.environ.get("RANK") == "1" and index > 4:
            raise ZeroDivisionError("on purpose, in process 1")
        return batch_of(index)

    return ps.Task(model=task.model, loss=task.loss, batches=batches)


def endless() -> ps.Task:
    """Says who it is, for whoever wants to kill it."""
    task = make()

    def batches(index: int):
        folder = Path(os.environ["PIDS"])
        (folder / f"pid-{os.environ.get('RANK', '0')}").write_text(str(os.getpid()))
        return batch_of(index)

    return ps.Task(model=task.model, loss=task.loss, batches=batches)


def plan(kind: str) -> ps.PrecisionPlan | None:
    from precscope.plans import LayerPrecision, PrecisionPlan

    if kind == "fp32":
        return None
    if kind == "fp16":
        return PrecisionPlan(default=LayerPrecision("fp16"), modules={"head": LayerPrecision("fp32")})
    modules = {
        "head": LayerPrecision("fp32"),
        "blocks.0": LayerPrecision("bf16", policy="cast", params="fp32"),
        "blocks.0.*": LayerPrecision("bf16", policy="cast", params="fp32"),
    }
    return PrecisionPlan(default=LayerPrecision("bf16"), modules=modules)


def summary(result, model) -> dict:
    values = {name: value.double() for name, value in model.state_dict().items()}
    model(batch_of(0)[0])  # whole, and free of what trained it
    assert not any(hasattr(p, "placements") for p in model.parameters())
    return {
        "losses": result.losses if hasattr(result, "losses") else None,
        "eval": result.eval_loss, "notes": list(result.notes),
        "sums": {n: [float(v.sum()), float(v.abs().sum())] for n, v in values.items()},
    }  # fmt: skip


def run(task, out: Path, strategy: str | None, *, world: int, of_many: int = 4, steps: int = STEPS, **options) -> dict:
    options = {"accumulate": of_many // world, "lr": 1e-2, "checkpoint_every": 3, "grad_clip": 0.5, **options}
    result = train(task, steps=steps, out=out, strategy=strategy, **options)
    return summary(result, task.model)


def equal(strategy: str, out: Path, world: int, rank: int) -> None:
    """The same training as one process does."""
    for kind in ("fp32", "bf16", "fp16"):
        found = run(make(), out / kind, strategy, world=world, plan=plan(kind))
        (out / f"{kind}-{rank}.json").write_text(json.dumps(found))


def resume(strategy: str, out: Path, world: int, rank: int) -> None:
    """Stopped after 3 of 6 steps and gone on with, against not stopped; dropout and BatchNorm included."""
    for kind in ("bf16", "fp16"):
        options = {"world": world, "plan": plan(kind), "schedule": "constant", "warmup": 0}
        whole = run(noisy(), out / f"{kind}-whole", strategy, **options)
        run(noisy(), out / f"{kind}-part", strategy, steps=3, **options)
        part = run(noisy(), out / f"{kind}-part", strategy, resume=True, **options)
        (out / f"{kind}-{rank}.json").write_text(json.dumps([whole, part]))


def wrong(strategy: str, out: Path, world: int, rank: int) -> None:
    """What is refused, on all processes alike; and a run with a recorder and shadow steps."""
    from precscope.training.engine import Strategy

    def said(task, strategy) -> str:
        try:
            train(task, steps=2, strategy=strategy)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    train(make(), steps=2, out=out / "recorded", precision="bf16", shadow_every=1)
    stale, part = make(), make()
    stale.optimizer = torch.optim.SGD(stale.model.parameters(), lr=0.1)
    part = ps.Task(model=part.model, loss=lambda model, batch: model.stem(batch[0]).square().mean(), batches=batch_of)
    found = {"sync": said(noisy(), Strategy("ddp", sync_batchnorm=True))}
    for name, task, how in (("part", part, "ddp"), ("stale", stale, "fsdp")):
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)  # an error has ended the group before
        found[name] = said(task, how)
    (out / f"said-{rank}.json").write_text(json.dumps(found))


def alone(strategy: str, out: Path, world: int, rank: int) -> None:
    """One process is slow, fails or sees other files; the others wait, or are told."""
    from datetime import timedelta

    import torch.distributed as dist

    from precscope.training import checkpoint
    from precscope.training.engine import Strategy

    run(make(), out / "first", "ddp", world=world, steps=2)  # all are here
    own = checkpoint.save

    def slow(*args, **options):
        time.sleep(10.0)
        return own(*args, **options)

    checkpoint.save = slow
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=8), dist.group.WORLD)
    run(make(), out / "slow", "ddp", world=world, steps=2, checkpoint_every=2)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=60), dist.group.WORLD)
    checkpoint.save = own
    said = {"files": len(checkpoint.checkpoints(out / "slow"))}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        task = failing_in_fp32(True)
        train(task, steps=3, out=out / "shadowed", precision="bf16", shadow_every=1, schedule="none")
    said["warned"] = [str(w.message) for w in seen if "shadow" in str(w.message)]
    said["losses"] = len(train(make(), steps=4, out=out / "first", resume=True, accumulate=2, lr=1e-2,
                               grad_clip=0.5, schedule="cosine", checkpoint_every=3).losses)  # fmt: skip
    if rank:
        shutil.copytree(out / "first", out / "other")
        for path in checkpoint.checkpoints(out / "other"):
            path.unlink()
    mine = out / ("other" if rank else "first")
    try:
        train(make(), steps=5, out=mine, resume=True, strategy=Strategy("ddp"), accumulate=2)
    except UsageError as error:
        said["refused"] = str(error)
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)  # the error has ended the group
    try:
        train(failing_in_fp32(rank == 1), steps=3, out=out / "local", shadow_every=1, precision="bf16",
              strategy=Strategy("ddp", timeout_s=8.0))  # fmt: skip
    except TrainingError as error:
        said["local"] = str(error)
    (out / f"said-{rank}.json").write_text(json.dumps(said))


def failing_in_fp32(fails: bool) -> ps.Task:
    """Its loss raises outside autocast, in training, on the process that `fails`."""
    task = make()
    own = task.loss

    def loss(model, batch):
        value = own(model, batch)
        if fails and model.training and not torch.is_autocast_enabled("cpu"):
            raise ZeroDivisionError("not in fp32")
        return value

    return ps.Task(model=task.model, loss=loss, batches=task.batches)


def sharded(strategy: str, out: Path, world: int, rank: int) -> None:
    """Parameters stored low in units of FSDP2, BatchNorm among them, through phases; and a guard changes no number."""
    from precscope.plans import LayerPrecision, Phase, PrecisionPlan

    low = PrecisionPlan(default=LayerPrecision("bf16", params="bf16"), modules={"head": LayerPrecision("fp32")})
    mixed = LayerPrecision("bf16", policy="cast", params="fp32")
    switching = PrecisionPlan(
        default=mixed, phases=[Phase(from_step=1, precision="fp32"), Phase(from_step=3, precision="plan")]
    )
    found = {}
    for name, plan in (("low", low), ("switching", switching)):
        plain = run(noisy(), out / name, "fsdp", world=world, plan=plan)
        guarded = run(noisy(), out / f"{name}-guard", "fsdp", world=world, plan=plan, guard=quick_guard())
        found[name] = [plain["losses"], guarded["losses"]]
    (out / f"{rank}.json").write_text(json.dumps(found))


def quick_guard():
    from precscope.training.guard import GuardConfig

    return GuardConfig(action="warn", settle_steps=2, probe_every=2, dense_steps=0)


def main() -> None:
    scenario, strategy, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    warnings.filterwarnings("default")
    globals()[scenario](strategy, out, int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]))


if __name__ == "__main__":
    main()
