"""Dice loss that sums over all pixels: a mask of 320 by 320 has more pixels in it than fp16 can count, the sums are inf
and their ratio is NaN."""

import torch
from torch import nn

KIND, PHASE = "overflow", "forward"
SOURCE = "https://github.com/qubvel-org/segmentation_models.pytorch/issues/463"
FIX = "compute the loss in fp32, or take means in place of sums"
GUILTY, GUILTY_BF16 = ["overlap"], []
STEPS, LR = 5, 3e-2
EDGE = 320


class Overlap(nn.Module):
    def forward(self, logits, mask):
        p = logits.sigmoid()
        mask = mask.to(p.dtype)
        return 1 - (2 * (p * mask).sum() + 1) / (p.sum() + mask.sum() + 1)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
        self.classify, self.overlap = nn.Conv2d(4, 1, 1), Overlap()

    def forward(self, image):
        return self.classify(self.features(image))


def build():
    model, image = Model(), torch.rand(1, 1, EDGE, EDGE)
    image[..., 20:300, 20:300] += 1.0  # 78,400 pixels belong to the object
    mask = (image > 1).float()
    return model, lambda step: (image, mask), lambda model, batch: model.overlap(model(batch[0]), batch[1])
