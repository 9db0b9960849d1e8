"""CONTROL: a residual stream that reaches some ten thousands, as massive activations do, in front of nn.LayerNorm,
whose kernel adds up in fp32: large, but in the range."""

import torch
from torch import nn
from torch.nn import functional as F

KIND, PHASE = "control", "none"
SOURCE = "counterpart of feed_forward_peak and squared_norm"
GUILTY, GUILTY_BF16 = [], []
STEPS, LR = 25, 2e-3
WORDS, WIDTH = 24, 48


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(WIDTH), nn.Sequential(nn.Linear(WIDTH, 96), nn.GELU(), nn.Linear(96, WIDTH))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.blocks = nn.Embedding(WORDS, WIDTH), nn.Sequential(Block(), Block(), Block())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, tokens):
        return self.head(self.norm(self.blocks(self.words(tokens))))


def build():
    model, tokens = Model(), torch.arange(WORDS)
    with torch.no_grad():
        model.words.weight[:, 7] = 1.2e4 * torch.randn(WORDS).clamp(-1.5, 1.5)
    wanted = (tokens * 7 + 2) % WORDS
    return model, lambda step: (tokens, wanted), lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])
