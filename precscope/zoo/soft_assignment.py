"""Soft assignment to cluster centres by exp(-distance / temperature): with a temperature of 0.02 every exponent lies
near -25, exp is 0 in fp16, and the row is 0/0."""

import torch
from torch import nn
from torch.nn import functional as F

KIND, PHASE = "underflow", "forward"
SOURCE = "made up here"
FIX = "softmax, which subtracts the largest exponent first; or this module in fp32"
GUILTY, GUILTY_BF16 = ["assign"], []
STEPS, LR = 30, 2e-2
CENTRES, WIDTH = 8, 3


class Assign(nn.Module):
    temperature = 0.02

    def __init__(self):
        super().__init__()
        self.register_buffer("centres", torch.randn(CENTRES, WIDTH))

    def forward(self, x):
        distance = (x.unsqueeze(1) - self.centres.to(x.dtype)).square().sum(-1)
        weight = torch.exp(-distance / self.temperature)
        return weight / weight.sum(-1, keepdim=True)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.assign, self.values = nn.Linear(WIDTH, WIDTH), Assign(), nn.Linear(CENTRES, 5)
        with torch.no_grad():
            self.enter.weight.copy_(torch.eye(WIDTH))
            self.enter.bias.zero_()
        self.enter.requires_grad_(False)

    def forward(self, x):
        return self.values(self.assign(self.enter(x)))


def build():
    model = Model()
    label = torch.randint(0, CENTRES, (256,))
    x = model.assign.centres[label] + 0.7 * F.normalize(torch.randn(256, WIDTH), dim=-1)
    with torch.no_grad():
        y = model.assign(x) @ torch.randn(CENTRES, 5)
    return model, lambda step: (x, y), lambda model, batch: F.mse_loss(model(batch[0]).float(), batch[1])
