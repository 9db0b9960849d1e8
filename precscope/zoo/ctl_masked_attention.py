"""CONTROL: attention with a mask of -6e4, which is a huge number but a number in fp16, and rows that are masked but for
one place."""

import torch
from torch import nn
from torch.nn import functional as F

KIND, PHASE = "control", "none"
SOURCE = "made up here"
GUILTY, GUILTY_BF16 = [], []
STEPS, LR = 25, 5e-3
WORDS, WIDTH, LENGTH = 16, 32, 12


class Mask(nn.Module):
    def forward(self, logits):
        return logits.masked_fill(torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), -6e4)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.qkv, self.mask, self.head = nn.Linear(WIDTH, 3 * WIDTH), Mask(), nn.Linear(WIDTH, WORDS)

    def forward(self, tokens):
        x = self.words(tokens) + self.places.weight
        queries, keys, values = self.qkv(x).chunk(3, -1)
        weights = self.mask(queries @ keys.mT / WIDTH**0.5).softmax(-1)
        return self.head(x + weights.to(values.dtype) @ values)


def build():
    tokens = torch.randint(0, WORDS, (8, LENGTH))
    wanted = tokens.cumsum(1) % WORDS

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    return Model(), lambda step: (tokens, wanted), loss
