"""A module that counts its calls in a buffer, and hands over from a teacher's hint to its own answer as the count
grows: in bf16, 256 + 1 is 256, so that it never lets go of the hint."""

import torch
from torch import nn
from torch.nn import functional as F

KIND, PHASE = "stagnation", "forward"
SOURCE = "made up here"
FIX = "counters in integers or fp32"
GUILTY, GUILTY_BF16 = [], ["handover"]
MODE, STEPS, OPT, LR = "pure", 600, "sgd", 0.1
ATOL = 0.1


class Handover(nn.Module):
    """(1 - share) hint + share answer, where share is the number of calls over 500, at most 1."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, answer, hint):
        if self.training:
            self.calls += 1
        share = (self.calls / 500).clamp(max=1)
        return (1 - share) * hint + share * answer


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.handover = nn.Linear(6, 3), Handover()

    def forward(self, x, hint):
        return self.handover(self.body(x), hint)


def build():
    model, x = Model(), torch.randn(32, 6)
    y = x @ torch.randn(6, 3)
    hint = y + 1.0  # helps at first, and is off by one

    def loss(model, batch):
        return F.mse_loss(model(batch[0], batch[2]).float(), batch[1].float())

    return model, lambda step: (x, y, hint), loss


def evaluate(model, batch):
    return F.mse_loss(model.body(batch[0]).float(), batch[1].float()).item()  # nobody hints later
