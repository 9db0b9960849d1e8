"""A byte-level GPT whose feed-forward layers are mixtures of experts, on the source of Python's standard library.

Each token goes to the two experts that its router likes best, each expert takes up to a fixed number of tokens (its
capacity, so that shapes do not depend on values) and what is over passes by on the residual stream, as in GShard
(Lepikhin et al. 2020, arXiv:2006.16668). The experts of a layer are two parameters of three dimensions, multiplied in
one batch: no nn.Linear holds them. The loss has the load-balancing term of Switch (Fedus et al. 2021,
arXiv:2101.03961, equation 4).

    task = make_task("moe")                    # 3.4 million parameters, 1.1 of them at work for each byte
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...bundled import TASKS
from ...tasks import Task
from .gpt import Attention, GPTConfig, draw, initialise, load_text

_BALANCE = 0.01  # weight of the load-balancing term, as in Switch


@dataclass(frozen=True)
class MoEConfig(GPTConfig):
    """experts: per layer; chosen: for each token; spare: capacity beyond what an even share would take."""

    width: int = 128
    experts: int = 8
    chosen: int = 2
    spare: float = 1.25


SIZES = {
    "tiny": MoEConfig(layers=2, width=32, heads=2, context=32, batch=4, experts=4),
    "small": MoEConfig(layers=3),
    "medium": MoEConfig(layers=12, width=512, heads=8, context=1024),
    "large": MoEConfig(layers=16, width=1024, heads=16, context=1024, batch=16, experts=16),
}


class Experts(nn.Module):
    """Feed-forward layers side by side. x [E, N, C] -> [E, N, C]."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(config.experts, config.width, 4 * config.width))
        self.down = nn.Parameter(torch.empty(config.experts, 4 * config.width, config.width))
        nn.init.normal_(self.up, std=0.02)
        nn.init.normal_(self.down, std=0.02 / (2 * config.layers) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(F.gelu(torch.bmm(x, self.up)), self.down)


class MixtureOfExperts(nn.Module):
    """x [B, T, C] -> ([B, T, C], load-balancing term)."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Linear(config.width, config.experts, bias=False)
        self.experts = Experts(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x.flatten(0, 1)  # [N, C]
        count, experts, chosen = len(tokens), self.config.experts, self.config.chosen
        shares = self.router(tokens).softmax(-1)  # [N, E]
        gates, numbers = shares.topk(chosen, dim=-1)  # [N, k]
        gates = gates / gates.sum(-1, keepdim=True)
        capacity = math.ceil(self.config.spare * chosen * count / experts)
        slots = _slots(numbers, experts, capacity)  # [N, k], E * capacity where there is no room
        taken = tokens.new_zeros(experts * capacity + 1, tokens.shape[1])
        taken = taken.index_copy(0, slots.flatten(), tokens.repeat_interleave(chosen, 0))[:-1]
        given = self.experts(taken.view(experts, capacity, -1)).flatten(0, 1)  # [E * capacity, C]
        given = torch.cat([given, given.new_zeros(1, given.shape[1])])[slots]  # [N, k, C]
        y = (given * gates.unsqueeze(-1)).sum(1).view_as(x)
        used = F.one_hot(numbers[:, 0], experts).to(shares.dtype).mean(0)
        return y, experts * (used * shares.mean(0)).sum()


def _slots(numbers: Tensor, experts: int, capacity: int) -> Tensor:
    """Place of each (token, choice) [N, k] among E * capacity, first choices first; E * capacity where none is left."""
    in_order = numbers.T.flatten()  # [k * N]
    wanted = F.one_hot(in_order, experts)
    place = (wanted.cumsum(0) * wanted).sum(1) - 1
    slots = torch.where(place < capacity, in_order * capacity + place, experts * capacity)
    return slots.view(numbers.shape[1], -1).T.contiguous()


class MoEBlock(nn.Module):
    """GPT's block with a mixture in the place of the feed-forward layer. x [B, T, C] -> (x, load-balancing term)."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(config.width)
        self.attn = Attention(config)
        self.ln2 = nn.LayerNorm(config.width)
        self.mlp = MixtureOfExperts(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.attn(self.ln1(x))
        y, balance = self.mlp(self.ln2(x))
        return x + y, balance


class MoEGPT(nn.Module):
    """Bytes [B, T] (int64) -> (logits of the next byte [B, T, 256], mean load-balancing term)."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocabulary, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(MoEBlock(config) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        initialise(self, config.layers)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        terms = []
        for block in self.blocks:
            x, balance = block(x)
            terms.append(balance)
        return self.head(self.ln_f(x)), torch.stack(terms).mean()


def moe(size: str = "small", *, seed: int = 0) -> Task:
    """The task: batches as gpt's. seed: of the batches; the parameters are drawn from torch's global generator.

    Raises UsageError on another size, TaskError where this Python has no source of its standard library.
    """
    config = SIZES[TASKS["moe"].check(size)]
    text, held_out = load_text()
    return Task(
        model=MoEGPT(config),
        loss=balanced_loss,
        batches=functools.partial(draw, text, config, seed),
        eval_batches=[draw(held_out, config, 2**20, step) for step in range(8)],
        forward=lambda model, batch: model(batch[0])[0],
        name=f"moe-{size}",
    )


def balanced_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy (nats per byte) of the next byte, and a hundredth of the load-balancing term (1 at best)."""
    tokens, targets = batch
    logits, balance = model(tokens)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten()) + _BALANCE * balance
