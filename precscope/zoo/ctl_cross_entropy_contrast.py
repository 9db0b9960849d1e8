"""CONTROL: the contrastive loss with the same temperature as contrast_exponential, by cross_entropy."""

import torch
from torch import nn
from torch.nn import functional as F

KIND, PHASE = "control", "none"
SOURCE = "counterpart of contrast_exponential"
GUILTY, GUILTY_BF16 = [], []
STEPS, LR = 25, 1e-2
PAIRS, WIDTH = 24, 16


class Contrast(nn.Module):
    def forward(self, one, two):
        return F.cross_entropy(one @ two.mT / 0.05, torch.arange(PAIRS))


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
