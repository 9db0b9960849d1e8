"""A decorrelation penalty that computes covariances as mean(x x') - mean(x) mean(x)': features with mean 24 and spread
0.5 leave the difference of two numbers near 576, which is mostly rounding."""

import torch
from torch import nn
from torch.nn import functional as F

KIND, PHASE = "cancellation", "forward"
SOURCE = "made up here"
FIX = "subtract the mean first, or the penalty in fp32"
GUILTY = GUILTY_BF16 = ["covariance"]
STEPS, LR, ATOL = 40, 1e-2, 0.05
WIDTH = 8


class Covariance(nn.Module):
    def forward(self, x):
        mean = x.mean(0)
        return (x.mT @ x) / len(x) - mean.unsqueeze(0) * mean.unsqueeze(1)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.covariance, self.head = nn.Linear(12, WIDTH), Covariance(), nn.Linear(WIDTH * WIDTH, 3)
        with torch.no_grad():
            self.encode.weight.mul_(2.0)
            self.encode.bias.fill_(24.0)
        self.encode.requires_grad_(False)

    def forward(self, x):
        spread = torch.stack([self.covariance(self.encode(bag)) for bag in x])
        return self.head(spread.flatten(1))


def build():
    model, kind = Model(), torch.arange(24) % 3
    mixing = torch.randn(3, 12, 12) * 0.15

    def batch(step):
        noise = torch.randn(24, 64, 12, generator=torch.Generator().manual_seed(step))
        return torch.einsum("btc,bcd->btd", noise, mixing[kind]), kind

    return model, batch, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])
