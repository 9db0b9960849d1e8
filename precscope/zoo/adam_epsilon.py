"""Adam with all of its state in fp16: eps = 1e-8 is 0 there, and so is the square of a gradient below 2.4e-4. Where a
gradient is 0 or small the update is 0/0 or x/0."""

import torch
from torch import nn
from torch.nn import functional as F

KIND, PHASE = "underflow", "optimizer"
SOURCE = "https://github.com/google-deepmind/optax/issues/1754"
FIX = "fp32 master weights and state, or an eps of 1e-4"
GUILTY, GUILTY_BF16 = ["items", "tower", "rating"], []
MODE, STEPS, LR = "pure", 25, 1e-2
ITEMS, WIDTH = 40, 12


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.items, self.tower, self.rating = nn.Embedding(ITEMS, WIDTH), nn.Linear(WIDTH, 24), nn.Linear(24, 5)

    def forward(self, item):
        return self.rating(F.relu(self.tower(self.items(item))))


def build():
    item = torch.arange(0, ITEMS, 2)  # half of the items are never seen
    stars = item % 5
    return Model(), lambda step: (item, stars), lambda model, batch: F.cross_entropy(model(batch[0]).float(), batch[1])


def make_optimizer(model):
    return torch.optim.Adam(model.parameters(), lr=LR, eps=1e-8)
