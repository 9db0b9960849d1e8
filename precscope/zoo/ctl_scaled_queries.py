"""CONTROL: attention with the same large queries and keys as attention_logits, scaled before they are multiplied: its
logits reach some thousands, and softmax does not mind."""

import torch
from torch import nn
from torch.nn import functional as F

KIND, PHASE = "control", "none"
SOURCE = "counterpart of attention_logits"
GUILTY, GUILTY_BF16 = [], []
STEPS, LR, ATOL = 30, 5e-3, 0.05
WORDS, WIDTH, LENGTH = 24, 48, 20


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        queries, keys, values = self.qkv(x).chunk(3, -1)
        logits = (queries / WIDTH) @ keys.mT
        return self.out(logits.softmax(-1).to(values.dtype) @ values)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.norm, self.attention = nn.Embedding(WORDS, WIDTH), nn.LayerNorm(WIDTH), Attention()
        self.head = nn.Linear(WIDTH, WORDS)
        with torch.no_grad():
            self.attention.qkv.weight[: 2 * WIDTH].mul_(8.0)

    def forward(self, tokens):
        x = self.words(tokens)
        return self.head(x + self.attention(self.norm(x)))


def build():
    model, tokens = Model(), torch.randint(0, WORDS, (4, LENGTH))
    wanted = (tokens * 7 + 2) % WORDS

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    return model, lambda step: (tokens, wanted), loss
