"""A variational encoder that returns the logarithm of the variance and takes exp of it: above 11 the variance
is inf in fp16."""

import torch
from torch import nn
from torch.nn import functional as F

KIND, PHASE = "overflow", "forward"
SOURCE = "made up here"
FIX = "clamp the logarithm, or the sampling in fp32"
GUILTY, GUILTY_BF16 = ["prior"], []
STEPS, LR = 25, 1e-2


class Prior(nn.Module):
    def forward(self, mean, log_variance):
        return (torch.exp(log_variance) + mean**2 - 1 - log_variance).mean() / 1e4


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean, self.spread, self.prior, self.decode = nn.Linear(10, 4), nn.Linear(10, 4), Prior(), nn.Linear(4, 10)
        nn.init.constant_(self.spread.bias, 11.5)

    def forward(self, x):
        mean = self.mean(x)
        return self.decode(mean), self.prior(mean, self.spread(x))


def build():
    x = torch.randn(64, 3) @ torch.randn(3, 10)

    def loss(model, batch):
        out, prior = model(batch[0])
        return F.mse_loss(out.float(), batch[0]) + prior

    return Model(), lambda step: (x,), loss
