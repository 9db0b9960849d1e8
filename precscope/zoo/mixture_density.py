"""A mixture of Gaussians that takes densities first and the logarithm of their sum afterwards: in sixteen dimensions a
density of exp(-25) is common, which is 0 in fp16, and log(0) is -inf."""

import torch
from torch import nn

KIND, PHASE = "underflow", "forward"
SOURCE = "made up here"
FIX = "add logarithms and use logsumexp, or the density in fp32"
GUILTY, GUILTY_BF16 = ["density"], []
STEPS, LR = 25, 1e-2
PARTS, WIDTH = 4, 16


class Density(nn.Module):
    def forward(self, y, means, weights):
        parts = torch.exp(-0.5 * (y.unsqueeze(1) - means).square().sum(-1))
        return (weights.softmax(-1).to(parts.dtype) * parts).sum(-1)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 32), nn.ReLU())
        self.means, self.weights, self.density = nn.Linear(32, PARTS * WIDTH), nn.Linear(32, PARTS), Density()

    def forward(self, x, y):
        h = self.body(x)
        means = self.means(h).unflatten(-1, (PARTS, WIDTH))
        return self.density(y.to(means.dtype), means, self.weights(h))


def build():
    x, y = torch.randn(64, 6), (2 * torch.randn(64, WIDTH)).clamp(-3, 3)
    return Model(), lambda step: (x, y), lambda model, batch: -model(*batch).log().mean()
