"""A norm that squares in the format of its input: beyond 256 the square is inf in fp16, x / inf is 0, and the layer
quietly outputs zeros. No NaN anywhere."""

import torch
from torch import nn
from torch.nn import functional as F

KIND, PHASE = "overflow, silent", "forward"
SOURCE = "https://github.com/pytorch/pytorch/pull/133085"
FIX = "compute the mean square in fp32"
GUILTY, GUILTY_BF16 = ["stages.1.norm"], []
STEPS, LR = 30, 3e-3
CLASSES, WIDTH = 16, 40


class RootMeanSquare(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        size = torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)
        return x / size * self.gain


class Stage(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.norm, self.out = nn.Linear(WIDTH, WIDTH), RootMeanSquare(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.out(F.silu(self.norm(self.mix(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(CLASSES, WIDTH)
        self.stages, self.head = nn.Sequential(Stage(), Stage(), Stage()), nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens):
        return self.head(self.stages(self.words(tokens)))


def build():
    model, tokens = Model(), torch.arange(CLASSES)
    with torch.no_grad():
        for parameter in model.stages[1].mix.parameters():
            parameter.mul_(4e3)  # deep layers of language models reach such activations
    wanted = (tokens * 3 + 1) % CLASSES
    return model, lambda step: (tokens, wanted), lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])
