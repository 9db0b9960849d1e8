"""Running statistics with a momentum of 0.002 kept in bf16: each step moves them by less than half their spacing, so
that they stay where they began, and the model is wrong as soon as it is evaluated."""

import torch
from torch import nn
from torch.nn import functional as F

KIND, PHASE = "stagnation", "forward"
SOURCE = "made up here"
FIX = "running statistics in fp32"
GUILTY, GUILTY_BF16 = ["whiten"], ["whiten"]
MODE, STEPS, OPT, LR = "pure", 1200, "sgd", 0.1
ATOL = 0.15


class Whiten(nn.Module):
    """x minus its mean: of the batch while training, the running one in evaluation."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.ones(8))

    def forward(self, x):
        if not self.training:
            return x - self.mean
        batch = x.mean(0)
        self.mean.lerp_(batch.detach().to(self.mean.dtype), 0.002)
        return x - batch


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.whiten, self.head = Whiten(), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.whiten(x))


def build():
    model, x = Model(), torch.randn(64, 8) * 0.5 + 1.8
    y = (x - 1.8) @ torch.randn(8, 2)
    return model, lambda step: (x, y), lambda model, batch: F.mse_loss(model(batch[0]).float(), batch[1].float())


def evaluate(model, batch):
    model.eval()
    loss = F.mse_loss(model(batch[0]).float(), batch[1].float()).item()
    model.train()
    return loss
