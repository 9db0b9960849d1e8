"""A contrastive loss that takes exponentials of similarities over a small temperature itself: exp(1 / 0.05) is 4.9e8,
inf in fp16, and inf / inf is NaN."""

import torch
from torch import nn
from torch.nn import functional as F

KIND, PHASE = "overflow", "forward"
SOURCE = "made up here"
FIX = "F.cross_entropy on the similarities, which subtracts the largest first; or this module in fp32"
GUILTY, GUILTY_BF16 = ["contrast"], []
STEPS, LR = 25, 1e-2
PAIRS, WIDTH = 24, 16


class Contrast(nn.Module):
    temperature = 0.05

    def forward(self, one, two):
        weights = torch.exp(one @ two.mT / self.temperature)
        return -(weights.diagonal() / weights.sum(-1)).log().mean()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, WIDTH))
        self.text = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, WIDTH))
        self.contrast = Contrast()

    def forward(self, image, text):
        return F.normalize(self.image(image), dim=-1), F.normalize(self.text(text), dim=-1)


def build():
    image, text = torch.randn(PAIRS, 20), torch.randn(PAIRS, 10)
    return Model(), lambda step: (image, text), lambda model, batch: model.contrast(*model(*batch))
