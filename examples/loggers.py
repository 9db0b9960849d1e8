"""A loop of one's own, recorded, and told to whatever loggers are installed: TensorBoard, W&B (offline), MLflow.

The log is entered before the recorder, so that it hears of the last flush. It reads what the recorder has written to
the run directory anyway: no hook, no wait for the device, and the losses are those of an unwatched run.

    python examples/loggers.py [--steps 40]     # or: precscope train gpt --record-every 10 --wandb PROJECT --mlflow URI
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch

import precscope as ps
from precscope.integrations.loggers import MlflowLogger, RunLog, TensorBoardLogger, WandbLogger
from precscope.training.tasks.gpt import gpt


def available(folder: Path) -> list:
    """The loggers whose packages are installed, writing below `folder`."""
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow's own word for "a folder will do"
    os.environ.setdefault("WANDB_SILENT", "true")
    makers = {
        "tensorboard": lambda: TensorBoardLogger(folder / "boards"),
        "wandb": lambda: WandbLogger("precscope", name="own-loop", mode="offline", dir=str(folder)),
        "mlflow": lambda: MlflowLogger(folder / "mlruns", name="own-loop"),
    }
    found = []
    for name, make in makers.items():
        try:
            found.append(make())
        except ps.UsageError as error:
            print(f"without {name}: {error}")
    return found


def train(steps: int, run: Path | None, loggers: list) -> list[float]:
    """bf16 autocast, AdamW; recorded and told where `run` is given."""
    torch.manual_seed(0)
    task = gpt("tiny")
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=3e-3)
    found = []

    def one_step(step: int) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = task.loss(task.model, task.batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())

    if run is None:
        for step in range(steps):
            one_step(step)
        return found
    with (
        RunLog(run, *loggers, precision="bf16") as log,
        ps.record(task.model, run, optimizer=optimizer, every=5, flush_every=2) as rec,
    ):
        for step in range(steps):
            one_step(step)
            rec.step()
            log.scalars(step, loss=found[-1])
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="one loop, three loggers")
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_known_args()[0].steps
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loggers = available(folder)
        told = train(steps, folder / "run", loggers)
        print(f"told {len(loggers)} loggers of {steps} steps, last loss {told[-1]:.4f}")
        for path in sorted(folder.iterdir()):
            size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file() and not p.is_symlink())
            print(f"  {path.name:<10} {size / 1000:8.1f} kB")
        print(f"losses equal those of an unwatched run: {told == train(steps, None, [])}")
