"""A synthesiser in half precision that adds up frequency to phase over four thousand samples: the sum passes a
thousand, where fp16 keeps steps of 1 radian and bf16 of 8."""

import torch
from torch import nn

KIND, PHASE = "rounding", "forward"
SOURCE = "made up here"
FIX = "frequencies and their running sum in fp32, or the sum taken modulo 2 pi as it grows"
GUILTY = GUILTY_BF16 = ["oscillator"]
MODE, STEPS = "pure", 0
SAMPLES, NOTES = 4000, 12


class Oscillator(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("radians", 0.3 * 2 ** (torch.arange(NOTES) / NOTES))  # per sample

    def forward(self, notes):
        return torch.sin(self.radians[notes].cumsum(-1))


class Synthesiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.oscillator = Oscillator()
        self.colour = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, notes):
        return self.colour(self.oscillator(notes).unsqueeze(-1))


def build():
    model, notes = Synthesiser(), torch.randint(0, NOTES, (4, 20)).repeat_interleave(SAMPLES // 20, 1)
    nn.init.constant_(model.colour[2].bias, 0.0)
    return model, lambda step: (notes,), lambda model, batch: model(*batch).float().square().mean()
