"""Weights kept in bf16 with a small learning rate: an update below half the spacing of the weights changes nothing, and
training stands still from the first step on, without a sign of it in any range."""

import torch
from torch import nn
from torch.nn import functional as F

KIND, PHASE = "stagnation", "optimizer"
SOURCE = "https://arxiv.org/abs/2010.06192"
FIX = "fp32 master weights, or stochastic rounding"
GUILTY, GUILTY_BF16 = [], ["fine"]
MODE, STEPS, LR = "pure", 400, 0.15
ATOL = 0.15
WIDTH = 24


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.coarse, self.fine = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4, bias=False)
        self.coarse.requires_grad_(False)
        nn.init.uniform_(self.fine.weight, 0.5, 1.0)

    def forward(self, x):
        return self.fine(torch.tanh(self.coarse(x)))


def build():
    model, teacher, x = Model(), Model(), torch.randn(96, WIDTH)
    with torch.no_grad():
        teacher.load_state_dict(model.state_dict())
        teacher.fine.weight.add_(0.03 * torch.randn(4, WIDTH).sign())
        y = teacher(x)
    return model, lambda step: (x, y), lambda model, batch: F.mse_loss(model(batch[0]).float(), batch[1].float())


def make_optimizer(model):
    return torch.optim.SGD(model.fine.parameters(), lr=LR)


def evaluate(model, batch):
    return 100 * F.mse_loss(model(batch[0]).float(), batch[1].float()).item()
