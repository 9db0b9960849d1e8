"""A gated feed-forward layer whose last projection leaves the range of fp16, as in T5: the norm after it turns inf into
NaN. The peaks are set to what was reported for T5: about 66 thousand where fp16 ends at 65504."""

import torch
from torch import nn
from torch.nn import functional as F

KIND, PHASE = "overflow", "forward"
SOURCE = "https://github.com/huggingface/transformers/issues/5651"
FIX = "keep the last projection of the feed-forward layer in fp32, or train in bf16"
GUILTY, GUILTY_BF16 = ["layers.1.ff.down"], []
STEPS, LR = 16, 5e-3
WORDS, WIDTH = 24, 48


class ScaleNorm(nn.Module):
    """Root mean square norm that computes in fp32, as T5's does."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        wide = x.float()
        return self.gain * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)


class GatedFeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.down = nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return self.down(F.gelu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.ff = ScaleNorm(), GatedFeedForward()

    def forward(self, x):
        return x + self.ff(self.norm(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.norm, self.head = ScaleNorm(), nn.Linear(WIDTH, WORDS)

    def forward(self, tokens):
        x = self.words(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def build():
    model, tokens = Model(), torch.arange(WORDS)
    ff = model.layers[1].ff
    with torch.no_grad():
        for linear, peak in ((ff.gate, 80.0), (ff.up, 80.0), (ff.down, 9e4)):
            seen = []
            hook = linear.register_forward_hook(lambda _m, _x, y, seen=seen: seen.append(y.abs().max()))
            model(tokens)
            hook.remove()
            linear.weight.mul_(peak / seen[0])
    wanted = (tokens * 7 + 2) % WORDS
    return model, lambda step: (tokens, wanted), lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])
