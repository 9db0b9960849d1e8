"""CONTROL: the small per-pixel gradients of dense_gradients, with a loss scale: it carries them through fp16."""

import torch
from torch import nn
from torch.nn import functional as F

KIND, PHASE = "control", "none"
SOURCE = "counterpart of dense_gradients"
GUILTY, GUILTY_BF16 = [], []
STEPS, LR = 30, 2e-2
PIXELS = 20_000


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.reduce = nn.Linear(6, 12), nn.Linear(12, 1)

    def forward(self, pixels):
        return self.reduce(self.hidden(pixels).tanh())


def build():
    model, teacher, pixels = Model(), Model(), torch.randn(PIXELS, 6)
    with torch.no_grad():
        depth = teacher(2 * pixels)
    return model, lambda step: (pixels, depth), lambda model, batch: F.mse_loss(model(batch[0]).float(), batch[1])
