"""CONTROL: running statistics like those of slow_statistics with a momentum of 0.2: 16 bits follow."""

import torch
from torch import nn
from torch.nn import functional as F

KIND, PHASE = "control", "none"
SOURCE = "counterpart of slow_statistics"
GUILTY, GUILTY_BF16 = [], []
MODE, STEPS, OPT, LR = "pure", 60, "sgd", 0.2


class Whiten(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.ones(8))

    def forward(self, x):
        if not self.training:
            return x - self.mean
        batch = x.mean(0)
        self.mean.lerp_(batch.detach().to(self.mean.dtype), 0.2)
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
