"""A mean over many pixels, small weights behind it, and no loss scale: every gradient of a pixel is below 2^-25, which
is 0 in fp16, so the layers before it learn nothing. All layers on the way share the failure."""

import torch
from torch import nn
from torch.nn import functional as F

KIND, PHASE = "underflow", "backward"
SOURCE = "https://arxiv.org/abs/1710.03740"
FIX = "scale the loss; fp32 helps only where all layers between the loss and the weights have it"
GUILTY, GUILTY_BF16 = ["hidden", "reduce"], []
LOSS_SCALING = False
STEPS, LR = 30, 2e-2
PIXELS = 40_000


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.reduce = nn.Linear(6, 12), nn.Linear(12, 1)
        for parameter in self.reduce.parameters():  # the head came with the checkpoint, and stays
            parameter.requires_grad_(False)
            parameter.mul_(0.1)

    def forward(self, pixels):
        return self.reduce(self.hidden(pixels).tanh())


def build():
    model, teacher, pixels = Model(), Model(), torch.randn(PIXELS, 6)
    with torch.no_grad():
        teacher.reduce.load_state_dict(model.reduce.state_dict())
        teacher.hidden.weight.mul_(3.0)
        depth = teacher(pixels)
    return model, lambda step: (pixels, depth), lambda model, batch: 0.2 * F.mse_loss(model(batch[0]).float(), batch[1])


def evaluate(model, batch):
    return 1e3 * F.mse_loss(model(batch[0]).float(), batch[1]).item()
