"""CONTROL: Dice by means over the pixels: the same ratio as by sums, and no number above 1."""

import torch
from torch import nn

KIND, PHASE = "control", "none"
SOURCE = "counterpart of dice_overlap"
GUILTY, GUILTY_BF16 = [], []
STEPS, LR = 5, 3e-2
EDGE = 320


class Overlap(nn.Module):
    def forward(self, logits, mask):
        p = logits.sigmoid()
        mask = mask.to(p.dtype)
        return 1 - 2 * (p * mask).mean() / (p.mean() + mask.mean())


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
        self.classify, self.overlap = nn.Conv2d(4, 1, 1), Overlap()

    def forward(self, image):
        return self.classify(self.features(image))


def build():
    model, image = Model(), torch.rand(1, 1, EDGE, EDGE)
    image[..., 20:300, 20:300] += 1.0
    mask = (image > 1).float()
    return model, lambda step: (image, mask), lambda model, batch: model.overlap(model(batch[0]), batch[1])
