"""A focal loss written with probabilities, and a detector that begins by seeing objects everywhere: its p rounds to 1.
In fp16 the 1e-8 that should save log(1 - p) is 0 and the loss is inf; in bf16 the gradient of a p of 1 is 0, and the
detector never changes its mind."""

import torch
from torch import nn

KIND, PHASE = "underflow", "forward"
SOURCE = "made up here"
FIX = "compute from the logits (logsigmoid), or the loss in fp32"
GUILTY = GUILTY_BF16 = ["criterion"]
STEPS, LR = 60, 1e-2


class Focal(nn.Module):
    def forward(self, logits, target):
        p = logits.sigmoid()
        hit = (1 - p) ** 2 * torch.log(p + 1e-8)
        miss = p**2 * torch.log(1 - p + 1e-8)
        return -torch.where(target, hit, miss).mean()


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(12, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh())
        self.score, self.criterion = nn.Linear(48, 6), Focal()

    def forward(self, x):
        return self.score(self.trunk(x))


def build():
    model, x = Detector(), torch.randn(80, 12)
    with torch.no_grad():
        model.score.bias.fill_(10.0)  # sees an object everywhere
    target = x @ torch.randn(12, 6) > 2
    return model, lambda step: (x, target), lambda model, batch: model.criterion(model(batch[0]), batch[1])
