"""Lightning's Trainer, recorded by a callback, then trained with the plan that the recording leads to.

    python examples/lightning_trainer.py --steps 120

A LightningModule as it is: trained under precision="bf16-mixed" with RecordCallback, asked what fp16 would do, and
trained again with PlanPrecision in place of precision=: fp16 but for the module whose products pass 65504, with a loss
scale, on the CPU, too. Needs `pip install "precscope[lightning]"`. Seconds on two CPU cores.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

import precscope as ps
from precscope.integrations.lightning import PlanPrecision, RecordCallback


class Areas(nn.Module):
    """Products of all pairs of lengths, [batch, 4] -> [batch, 16]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x.unsqueeze(2), x.unsqueeze(1)).flatten(1)


class Classifier(LightningModule):
    """Which of two areas is larger."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.areas = Areas()
        self.head = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 2))
        self.right, self.seen = 0, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.log(self.areas(x)))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.right += int((self(batch[0]).argmax(1) == batch[1]).sum())
        self.seen += len(batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def batches(count: int, first: int) -> DataLoader:
    made = []
    for index in range(first, first + count):
        x = 20 * torch.exp(2 * torch.randn(64, 4, generator=torch.Generator().manual_seed(index)))
        made.append((x, (x[:, 0] * x[:, 1] > x[:, 2] * x[:, 3]).long()))
    return DataLoader(made, batch_size=None)


def train(steps: int, **settings) -> float:
    """Share of right answers on held-out batches. settings: of the Trainer."""
    model = Classifier()
    trainer = Trainer(
        max_epochs=1, accumulate_grad_batches=2, gradient_clip_val=1.0, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        **settings,
    )  # fmt: skip
    trainer.fit(model, batches(2 * steps, 0), batches(16, 10**6))
    return model.right / model.seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    steps = parser.parse_args().steps
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    with tempfile.TemporaryDirectory() as name:
        right = train(steps, precision="bf16-mixed", callbacks=[RecordCallback(f"{name}/run", every=10)])
        print(f"bf16-mixed, recorded    {right:.1%} right")
        profile = ps.Profile.load(f"{name}/run")
        worst = profile.ask("fp16", roles=["output"]).sort_values("amax").iloc[-1]
        print(f"asked for fp16          {worst.module!r} reaches {worst.amax:.3g}, {worst.overflow_lo:.2%} overflow")
        plan = ps.recommend(profile, formats=("fp16", "fp32"))
        names = [name for name, module in Classifier().named_modules() if name and not list(module.children())]
        print(f"the plan                {', '.join(f'{n}: {plan[n].compute}' for n in names)}")
    print(f"with PlanPrecision      {train(steps, plugins=[PlanPrecision(plan)]):.1%} right")
    half = ps.PrecisionPlan(default="fp16")
    print(f"all of it in fp16       {train(steps, plugins=[PlanPrecision(half)]):.1%} right")


if __name__ == "__main__":
    main()
