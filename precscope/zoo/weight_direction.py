"""Weight normalisation by hand: the direction is v / sqrt(sum v v), and v has become as small as 1e-5: its squares
are 0 in fp16, and the division is by 0."""

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F

KIND, PHASE = "underflow", "forward"
SOURCE = "made up here"
FIX = "normalise in fp32"
GUILTY, GUILTY_BF16 = ["hidden"], []
MODE, STEPS = "pure", 0


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.v, self.gain = nn.Parameter(1e-5 * torch.randn(16, 6)), nn.Parameter(torch.ones(16))

    def forward(self, x):
        size = (self.v * self.v).sum(1, keepdim=True).sqrt()
        return F.linear(x, self.v / size * self.gain.unsqueeze(1))


def build():
    model = nn.Sequential(OrderedDict(hidden=Normalised(), act=nn.ReLU(), head=nn.Linear(16, 2)))
    x = torch.randn(40, 6)
    return model, lambda step: (x,), lambda model, batch: model(batch[0]).float().square().mean()
