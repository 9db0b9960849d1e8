"""Architectures outside transformers, tiny: plain PyTorch, diffusers, torch_geometric, timm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from architectures import BATCH, IMAGE, LABELS, LENGTH, VOCABULARY, Architecture, generator, pixels
from torch import Tensor, nn

WIDTH = 32


class Recurrent(nn.Module):
    """Token ids -> a recurrent network of two layers, both directions -> a class for each token."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.rnn = kind(WIDTH, WIDTH, num_layers=2, batch_first=True, bidirectional=True, dropout=0.1)
        self.head = nn.Linear(2 * WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(ids))[0])


class Cells(nn.Module):
    """The same step by step with a cell, as people write decoders: one module called once per token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.cell = nn.Embedding(VOCABULARY, WIDTH), nn.GRUCell(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x, state, states = self.embedding(ids), None, []
        for t in range(ids.shape[1]):
            state = self.cell(x[:, t], state)
            states.append(state)
        return self.head(torch.stack(states, 1))


class Attending(nn.Module):
    """torch's own encoder and decoder of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.body = nn.Transformer(WIDTH, 4, 1, 1, 48, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(self.body(x, x, tgt_mask=mask, tgt_is_causal=True))


class Nested(nn.Module):
    """Modules in lists in dicts in modules, each handing a dict to the next; a bare parameter beside them."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict(
                {
                    "paths": nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2)),
                    "norm": nn.LayerNorm(WIDTH),
                }
            )
            self.gate = nn.Parameter(torch.zeros(2))

        def forward(self, state: dict[str, Any]) -> dict[str, Any]:
            x = state["x"]
            gates = self.gate.softmax(0)
            for gate, path in zip(gates, self.parts["paths"], strict=True):
                x = x + gate * path(x)
            return {"x": self.parts["norm"](x), "depth": state["depth"] + 1, "history": [*state["history"], x]}

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(self.Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        state = {"x": self.embedding(ids), "depth": 0, "history": []}
        for block in self.blocks:
            state = block(state)
        return self.head(state["x"] + sum(state["history"]))


class Shared(nn.Module):
    """One block under two names and called three times; the head's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.first = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH))
        self.second = self.first
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.first(self.embedding(ids)))))


class Graphs(nn.Module):
    """Two graph convolutions -> a class for each node."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        import torch_geometric.nn as gnn

        layer = getattr(gnn, kind)
        self.first, self.act, self.second = layer(8, 16), nn.ELU(), layer(16, LABELS)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.second(self.act(self.first(x, edges)), edges)


def _tokens(model: nn.Module, step: int) -> tuple[Tensor, Tensor]:
    """Token ids [B, L], and the next ones."""
    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=generator(step))
    return ids[:, :-1], ids[:, 1:]


def _token_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def _graph(model: nn.Module, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features of 12 nodes [12, 8], 30 edges [2, 30], a class for each node."""
    g = generator(step)
    edges = torch.randint(0, 12, (2, 30), generator=g)
    return torch.randn(12, 8, generator=g), edges, torch.randint(0, LABELS, (12,), generator=g)


def _graph_loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0], batch[1]), batch[2])


def _labelled(model: nn.Module, step: int, size: int = IMAGE) -> tuple[Tensor, Tensor]:
    """Images [B, 3, H, W] and their labels."""
    g = generator(step)
    return pixels(g, size), torch.randint(0, LABELS, (BATCH,), generator=g)


def _label_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _unet() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=IMAGE, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"), attention_head_dim=8,
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def _noise_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The noise is to be told from the noisy image."""
    x, labels = batch
    noise = x.roll(1, 0)
    return F.mse_loss(model(x + noise, labels * 100).sample, noise)


def _conditional_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=WIDTH,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=8,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def _latents(model: nn.Module, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [B, 4, 8, 8], time steps, and a text's embedding [B, L, WIDTH]."""
    g = generator(step)
    times = torch.randint(0, 1000, (BATCH,), generator=g)
    return torch.randn(BATCH, 4, 8, 8, generator=g), times, torch.randn(BATCH, LENGTH, WIDTH, generator=g)


def _latent_loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    x, times, text = batch
    return F.mse_loss(model(x, times, encoder_hidden_states=text).sample, x.roll(1, 0))


def _vae() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, sample_size=IMAGE,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def _vae_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """As training scripts do: encode and decode are called past the model's forward."""
    latent = model.encode(batch[0]).latent_dist
    return F.mse_loss(model.decode(latent.sample()).sample, batch[0]) + 1e-3 * latent.kl().mean()


def _dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, num_layers=2, sample_size=IMAGE, patch_size=4,
        num_embeds_ada_norm=1000, norm_num_groups=4,
    )  # fmt: skip


def _dit_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, labels = batch
    return F.mse_loss(model(x, timestep=labels * 100, class_labels=labels).sample, x.roll(1, 0))


def _timm(name: str, cls: str, size: int = 32, **options: Any) -> Architecture:
    def build() -> nn.Module:
        import timm

        return timm.create_model(cls, num_classes=LABELS, **options)

    return Architecture(name, "timm", build, lambda model, step: _labelled(model, step, size), _label_loss)


OTHERS = [
    Architecture("RNN", "torch", lambda: Recurrent(nn.RNN), _tokens, _token_loss),
    Architecture("LSTM", "torch", lambda: Recurrent(nn.LSTM), _tokens, _token_loss, fast=True, lacking=("fp16",)),
    Architecture("GRU", "torch", lambda: Recurrent(nn.GRU), _tokens, _token_loss),
    Architecture("GRU cell", "torch", Cells, _tokens, _token_loss),
    Architecture("nn.Transformer", "torch", Attending, _tokens, _token_loss),
    Architecture("nested modules", "torch", Nested, _tokens, _token_loss, fast=True),
    Architecture("shared modules", "torch", Shared, _tokens, _token_loss, fast=True),
    Architecture("UNet", "diffusers", _unet, _labelled, _noise_loss),
    Architecture("UNet, text condition", "diffusers", _conditional_unet, _latents, _latent_loss),
    Architecture("VAE", "diffusers", _vae, _labelled, _vae_loss),
    Architecture("DiT", "diffusers", _dit, _labelled, _dit_loss),
    Architecture("GCN", "torch_geometric", lambda: Graphs("GCNConv"), _graph, _graph_loss),
    Architecture("GAT", "torch_geometric", lambda: Graphs("GATConv"), _graph, _graph_loss),
    Architecture("GraphSAGE", "torch_geometric", lambda: Graphs("SAGEConv"), _graph, _graph_loss),
    _timm("timm ResNet", "resnet18"),
    _timm("timm EfficientNet", "efficientnet_b0", size=64),
    _timm("timm MLP-Mixer", "mixer_s32_224", size=64, img_size=64),
    _timm("timm ViT", "vit_tiny_patch16_224", size=32, img_size=32),
]
