"""Volume rendering: the light that is left after 400 thin samples is a running product of 1 - alpha with alpha near
0.002, where bf16 knows 1 and 0.996 only."""

import torch
from torch import nn
from torch.nn import functional as F

KIND, PHASE = "rounding", "forward"
SOURCE = "made up here"
FIX = "add up densities and take one exponential, or the product in fp32"
GUILTY, GUILTY_BF16 = [], ["render"]
MODE, STEPS = "pure", 0
SAMPLES = 400


class Render(nn.Module):
    def forward(self, density, colour):
        alpha = 1 - torch.exp(-density / SAMPLES)
        left = torch.cumprod(1 - alpha, -1)
        return (left * alpha * colour).sum(-1)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.field, self.colour, self.render = nn.Linear(5, 1), nn.Linear(5, 1), Render()

    def forward(self, x):
        density = F.softplus(self.field(x)).squeeze(-1)
        return self.render(density, self.colour(x).sigmoid().squeeze(-1))


def build():
    model, x = Model(), torch.randn(32, 1, 5) + 0.3 * torch.randn(32, SAMPLES, 5)
    return model, lambda step: (x,), lambda model, batch: model(*batch).float().square().mean()
