"""A softplus written as log(1 + exp(x)): exp(x) is inf in fp16 from x = 11.1 on, and so is the result."""

import torch
from torch import nn
from torch.nn import functional as F

KIND, PHASE = "overflow", "forward"
SOURCE = "made up here"
FIX = "F.softplus, which is x itself where x is large; or this module in fp32"
GUILTY, GUILTY_BF16 = ["rate.1"], []
STEPS, LR = 25, 1e-2


class SoftPlus(nn.Module):
    def forward(self, x):
        return torch.log(1 + torch.exp(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 32), nn.ReLU())
        self.rate = nn.Sequential(nn.Linear(32, 4), SoftPlus())

    def forward(self, x):
        return self.rate(self.body(x))


def build():
    model, x = Model(), torch.randn(96, 8)
    with torch.no_grad():
        model.rate[0].weight.mul_(20.0)
        counts = torch.poisson(10 * model(x))

    def loss(model, batch):
        return F.smooth_l1_loss(model(batch[0]).float(), batch[1] / 10)

    return model, lambda step: (x, counts), loss
