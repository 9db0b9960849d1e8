"""Cosine similarity of vectors of size 1e-4: their squares are below the smallest fp16 number, so that lengths are 0
and the similarity is 0/0."""

import torch
from torch import nn
from torch.nn import functional as F

KIND, PHASE = "underflow", "forward"
SOURCE = "made up here"
FIX = "scale the vectors before they are squared, or compute lengths in fp32"
GUILTY, GUILTY_BF16 = ["cosine"], []
STEPS, LR = 25, 1e-2
WIDTH = 24


class Cosine(nn.Module):
    def forward(self, one, two):
        lengths = torch.sqrt((one * one).sum(-1) * (two * two).sum(-1))
        return (one * two).sum(-1) / lengths


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.offer = nn.Linear(10, WIDTH), nn.Linear(14, WIDTH)
        self.cosine, self.calibrate = Cosine(), nn.Linear(1, 1)
        with torch.no_grad():
            for linear in (self.query, self.offer):  # what a strong weight decay leaves
                linear.weight.mul_(1e-3)
                linear.bias.mul_(1e-3)
        self.query.requires_grad_(False)
        self.offer.requires_grad_(False)

    def forward(self, one, two):
        return self.calibrate(self.cosine(self.query(one), self.offer(two)).unsqueeze(-1)).squeeze(-1)


def build():
    model, one, two = Model(), torch.randn(128, 10), torch.randn(128, 14)
    with torch.no_grad():
        y = 3 * F.cosine_similarity(1e4 * model.query(one), 1e4 * model.offer(two)) - 1
    return model, lambda step: (one, two, y), lambda model, batch: F.mse_loss(model(*batch[:2]).float(), batch[2])
