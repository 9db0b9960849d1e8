"""A mixture of experts whose router has drifted to logits near 100, where bf16 has a number every 0.5 and fp16 every
0.06: several experts tie, and tokens go to the wrong one."""

import torch
from torch import nn
from torch.nn import functional as F

KIND, PHASE = "rounding", "forward"
SOURCE = "https://arxiv.org/abs/2101.03961"
FIX = "the router in fp32"
GUILTY = GUILTY_BF16 = ["router"]
STEPS, LR = 50, 3e-2
EXPERTS, WIDTH, TOKENS = 6, 12, 600


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, 3) for _ in range(EXPERTS))
        with torch.no_grad():
            nn.init.orthogonal_(self.router.weight, gain=0.15)
            self.router.bias.fill_(100.0)
        self.router.requires_grad_(False)

    def forward(self, x):
        chosen = self.router(x).argmax(-1, keepdim=True)
        answers = torch.stack([expert(x) for expert in self.experts], 1)
        return torch.take_along_dim(answers, chosen.unsqueeze(-1), 1).squeeze(1)


def build():
    model, teacher, x = Model(), Model(), torch.randn(TOKENS, WIDTH)
    with torch.no_grad():
        teacher.router.load_state_dict(model.router.state_dict())
        for expert in teacher.experts:
            expert.weight.mul_(3.0)
        y = teacher(x)
    return model, lambda step: (x, y), lambda model, batch: F.mse_loss(model(batch[0]).float(), batch[1])
