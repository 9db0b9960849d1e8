"""CONTROL: two thirds of the input are exact zeros, some features are as small as 1e-9, and half of the units are never
active: nothing of it matters to the loss."""

import torch
from torch import nn
from torch.nn import functional as F

KIND, PHASE = "control", "none"
SOURCE = "made up here"
GUILTY, GUILTY_BF16 = [], []
STEPS, LR = 25, 1e-2


def build():
    model = nn.Sequential(nn.Linear(18, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3))
    x = torch.zeros(90, 18)
    kind = torch.arange(90) % 3
    x[:, :4] = torch.randn(90, 4) + 2 * torch.randn(3, 4)[kind]
    x[:, 4:6] = 1e-9 * torch.rand(90, 2)
    with torch.no_grad():
        model[0].bias[::2] = -50.0
    return model, lambda step: (x, kind), lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])
