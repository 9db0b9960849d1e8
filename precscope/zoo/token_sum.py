"""A loss that is added up over all tokens instead of averaged: 30,000 times 3 is beyond fp16."""

import torch
from torch import nn

KIND, PHASE = "overflow", "forward"
SOURCE = "made up here"
FIX = "the mean, or the sum in fp32"
GUILTY, GUILTY_BF16 = ["total"], []
STEPS, LR = 10, 1e-2


class Total(nn.Module):
    def forward(self, prediction, target):
        return (prediction - target.to(prediction.dtype)).abs().sum() / 1000


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head, self.total = nn.Sequential(nn.Linear(4, 16), nn.Tanh()), nn.Linear(16, 1), Total()

    def forward(self, x):
        return self.head(self.body(x)).squeeze(-1)


def build():
    x = torch.randn(30_000, 4)
    y = 5 * x[:, 0] + 2
    return Model(), lambda step: (x, y), lambda model, batch: model.total(model(batch[0]), batch[1])
