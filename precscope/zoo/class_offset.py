"""Boxes of different classes are kept apart by adding label times 4096 to their coordinates, a common trick. The sums
lose the fractions that tell boxes apart: fp16 has steps of 32 there, bf16 of 256."""

import torch
from torch import nn
from torch.nn import functional as F

KIND, PHASE = "rounding", "forward"
SOURCE = "https://github.com/MultimediaTechLab/YOLO/pull/234"
FIX = "compare boxes within each class, or the offset in fp32"
GUILTY = GUILTY_BF16 = ["match"]
STEPS, LR = 40, 5e-2
BOXES, CLASSES = 384, 12


class Match(nn.Module):
    """Index of the anchor of the same class that is nearest to each box."""

    def __init__(self):
        super().__init__()
        self.register_buffer("anchors", torch.rand(BOXES, 2) * 256)
        self.register_buffer("labels", torch.arange(BOXES) % CLASSES)

    def forward(self, centre, label):
        here = centre + 4096 * label.unsqueeze(-1).to(centre.dtype)
        there = self.anchors.to(centre.dtype) + 4096 * self.labels.unsqueeze(-1).to(centre.dtype)
        return (here.unsqueeze(1) - there).abs().sum(-1).argmin(-1)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.locate, self.match = nn.Linear(2, 2), Match()
        self.features, self.head = nn.Embedding(BOXES, 16), nn.Linear(16, 4)
        with torch.no_grad():
            self.locate.weight.copy_(256 * torch.eye(2))
            self.locate.bias.zero_()
        self.locate.requires_grad_(False)

    def forward(self, x, label):
        return self.head(self.features(self.match(self.locate(x), label)))


def build():
    model = Model()
    index = torch.randint(0, BOXES, (768,))
    x = (model.match.anchors[index] + torch.randn(768, 2)) / 256
    label, y = model.match.labels[index], torch.randn(BOXES, 4)[index]
    return model, lambda step: (x, label, y), lambda model, batch: F.mse_loss(model(*batch[:2]).float(), batch[2])
