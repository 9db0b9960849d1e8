"""CONTROL: an ordinary small convolutional network with batch norms, trained with Adam."""

import torch
from torch import nn
from torch.nn import functional as F

KIND, PHASE = "control", "none"
SOURCE = "made up here"
GUILTY, GUILTY_BF16 = [], []
STEPS, LR = 20, 1e-2


def build():
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 4))
    prototypes, kind = torch.randn(4, 1, 12, 12), torch.arange(48) % 4

    def batch(step):
        noise = torch.randn(48, 1, 12, 12, generator=torch.Generator().manual_seed(step))
        return prototypes[kind] + 0.5 * noise, kind

    return model, batch, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])
