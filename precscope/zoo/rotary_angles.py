"""Rotary angles computed as a matrix product, which autocast takes to its format: at position 6000 neighbouring fp16
numbers are 4 apart and bf16 ones 32, so that the angles are noise. The loss stays finite."""

import torch
from torch import nn
from torch.nn import functional as F

KIND, PHASE = "rounding", "forward"
SOURCE = "https://github.com/huggingface/transformers/pull/29285"
FIX = "compute positions times frequencies in fp32, with autocast off"
GUILTY = GUILTY_BF16 = ["angles"]
STEPS = 25
WORDS, WIDTH, LENGTH, START = 12, 24, 32, 6000


class Angles(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("frequencies", 1000.0 ** (-torch.arange(WIDTH // 2) / (WIDTH // 2)))

    def forward(self, positions):
        angles = positions.float().unsqueeze(-1) @ self.frequencies.unsqueeze(0)
        return torch.polar(torch.ones_like(angles.float()), angles.float())


class Model(nn.Module):
    """One head that looks at the word before: its key is its query turned by one position."""

    def __init__(self):
        super().__init__()
        self.words, self.angles = nn.Embedding(WORDS, WIDTH), Angles()
        self.value, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WORDS)
        self.sharpness = nn.Parameter(torch.tensor(4.0))

    def forward(self, tokens, positions):
        turn = self.angles(positions)
        step = self.angles(torch.ones(1))
        score = (turn.unsqueeze(1) * (turn * step).conj().unsqueeze(0)).real.sum(-1)
        past = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(-1)
        weights = (self.sharpness * score).masked_fill(~past, -1e4).softmax(-1)
        return self.head(weights @ self.value(self.words(tokens)))


def build():
    def batch(step):
        words = torch.randint(0, WORDS, (8, LENGTH), generator=torch.Generator().manual_seed(step))
        return words, torch.arange(START, START + LENGTH)

    def loss(model, batch):
        return F.cross_entropy(model(*batch)[:, 1:].flatten(0, 1), batch[0][:, :-1].flatten())

    return Model(), batch, loss
