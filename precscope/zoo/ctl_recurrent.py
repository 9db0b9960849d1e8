"""CONTROL: a GRU over sixty steps: gates between 0 and 1, nothing that grows."""

import torch
from torch import nn
from torch.nn import functional as F

KIND, PHASE = "control", "none"
SOURCE = "made up here"
GUILTY, GUILTY_BF16 = [], []
STEPS, LR, ATOL = 20, 1e-2, 0.05


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.gru, self.leave = nn.Linear(3, 12), nn.GRU(12, 24, batch_first=True), nn.Linear(24, 2)

    def forward(self, x):
        return self.leave(self.gru(self.enter(x))[0].mean(1))


def build():
    x = torch.randn(24, 60, 3)
    kind = (x[..., 0].mean(1) > 0).long()
    return Model(), lambda step: (x, kind), lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])
