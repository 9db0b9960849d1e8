"""Attention that multiplies queries and keys before it scales them down, as GPT-NeoX's eager code does: the raw
products pass 65504, and softmax of inf is NaN."""

import torch
from torch import nn
from torch.nn import functional as F

KIND, PHASE = "overflow", "forward"
SOURCE = "https://github.com/huggingface/transformers/pull/30199"
FIX = "scale the queries before the product, use the fused kernel, or compute the product in fp32"
GUILTY, GUILTY_BF16 = ["layers.1.attention.similarity"], []
STEPS, LR, ATOL = 60, 5e-3, 0.05
WORDS, WIDTH, LENGTH = 24, 48, 20


class Similarity(nn.Module):
    def forward(self, queries, keys):
        return torch.matmul(queries, keys.mT) / WIDTH**0.5


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.value, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.similarity = Similarity()

    def forward(self, x):
        values = self.value(x)
        weights = F.softmax(self.similarity(self.query(x), self.key(x)), -1)
        return self.out(weights.to(values.dtype) @ values)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.Sequential(Layer(), Layer())
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, tokens):
        return self.head(self.layers(self.words(tokens)))


def build():
    model, tokens = Model(), torch.randint(0, WORDS, (4, LENGTH))
    attention, raw = model.layers[1].attention, []
    hook = attention.similarity.register_forward_pre_hook(lambda _m, qk: raw.append((qk[0] @ qk[1].mT).abs().max()))
    with torch.no_grad():
        model(tokens)
        for linear in (attention.query, attention.key):
            for parameter in linear.parameters():
                parameter.mul_((1.1e5 / raw[0]) ** 0.5)
                parameter.requires_grad_(False)
    hook.remove()
    wanted = (tokens * 7 + 2) % WORDS

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    return model, lambda step: (tokens, wanted), loss
