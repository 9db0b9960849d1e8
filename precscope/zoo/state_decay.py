"""A state-space layer that forgets a two-thousandth of its state per step: bf16 has no number between 0.996 and 1, the
decay becomes exactly 1, and the state forgets nothing."""

import torch
from torch import nn

KIND, PHASE = "rounding", "forward"
SOURCE = "made up here"
FIX = "keep the decay and the scan in fp32, or store 1 - decay"
GUILTY, GUILTY_BF16 = [], ["scan"]
MODE, STEPS = "pure", 0
WIDTH, LENGTH = 12, 1500


class Scan(nn.Module):
    """state[t] = decay state[t-1] + x[t], as the sum over the past that long convolutions compute."""

    def __init__(self):
        super().__init__()
        self.register_buffer("decay", torch.full((WIDTH,), 0.9995))

    def forward(self, x):
        age = torch.arange(LENGTH - 1, -1, -1, device=x.device).float()
        weight = torch.exp(age.unsqueeze(-1) * self.decay.float().log())
        return torch.einsum("btc,tc->bc", x.float(), weight).to(x.dtype)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.scan, self.leave = nn.Linear(4, WIDTH), Scan(), nn.Linear(WIDTH, 4)

    def forward(self, x):
        return self.leave(self.scan(self.enter(x)) / LENGTH)


def build():
    model, x = Model(), torch.randn(6, LENGTH, 4).cumsum(1) / 30
    return model, lambda step: (x,), lambda model, batch: model(batch[0]).float().square().mean()
