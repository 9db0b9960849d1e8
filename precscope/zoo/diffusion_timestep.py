"""A model in bf16 whose timestep is rounded before it becomes sines: between 512 and 1024 bf16 has only multiples of 4,
so that the model is told a wrong time. It stays finite and looks almost right."""

import math

import torch
from torch import nn
from torch.nn import functional as F

KIND, PHASE = "rounding", "forward"
SOURCE = "https://github.com/modelscope/DiffSynth-Studio/issues/562"
FIX = "make the sines in fp32, cast them afterwards"
GUILTY, GUILTY_BF16 = [], ["clock"]
MODE, STEPS, CAST_BATCH = "pure", 0, False
WIDTH = 40


class Clock(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("rates", torch.logspace(0, -3, WIDTH // 2))

    def forward(self, time):
        phase = time.to(self.rates.dtype).unsqueeze(-1) * self.rates
        return torch.cat([phase.sin(), phase.cos()], -1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.shift = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x, condition):
        return x + self.mlp(self.norm(x) + self.shift(condition).unsqueeze(1))


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.clock, self.condition = nn.Linear(6, WIDTH), Clock(), nn.Linear(WIDTH, WIDTH)
        self.block1, self.block2, self.leave = Block(), Block(), nn.Linear(WIDTH, 6)

    def forward(self, x, time):
        condition = F.silu(self.condition(self.clock(time)))
        x = self.block1(self.enter(x), condition)
        return self.leave(self.block2(x, condition))


def build():
    model = Denoiser()
    with torch.no_grad():
        model.condition.weight.mul_(math.sqrt(WIDTH))  # what is learnt depends strongly on the time
    latent, time = torch.randn(4, 8, 6), torch.tensor([981.25, 754.5, 621.75, 537.5])
    return model, lambda step: (latent, time), lambda model, batch: model(*batch).float().square().mean()
