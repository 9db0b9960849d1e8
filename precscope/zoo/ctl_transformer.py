"""CONTROL: nn.TransformerEncoder with dropout, its head tied to the embedding: the ordinary case."""

import torch
from torch import nn
from torch.nn import functional as F

KIND, PHASE = "control", "none"
SOURCE = "made up here"
GUILTY, GUILTY_BF16 = [], []
STEPS, LR, ATOL = 25, 3e-3, 0.15
WORDS, WIDTH, LENGTH = 20, 32, 12


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.1, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens):
        return self.head(self.layers(self.words(tokens) + self.places.weight))


def build():
    def batch(step):
        tokens = torch.randint(0, WORDS, (16, LENGTH), generator=torch.Generator().manual_seed(step))
        return tokens, (tokens + 1) % WORDS

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    return Model(), batch, loss
