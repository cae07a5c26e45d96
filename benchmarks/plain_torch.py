"""DiT in plain PyTorch, written from the paper's description: what `compare` runs against.

Modules are called as the library's own, so that its weights fit; attention is PyTorch's fused one.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import equidit as edt


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        heads = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*heads.unbind(0))
        return self.out(y.transpose(1, 2).reshape(batch, tokens, dim))


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """adaLN-Zero: shift, scale and gate of attention and of the MLP from the conditioning."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(dim, heads)
        self.mlp = MLP(dim, 4 * dim)
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        parts = self.modulation(F.silu(vector))[:, None].chunk(6, dim=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        x = x + gate_a * self.attention(self.norm(x) * (1 + scale_a) + shift_a)
        return x + gate_m * self.mlp(self.norm(x) * (1 + scale_m) + shift_m)


class DiT(nn.Module):
    """`forward(x, t, label)` for a batch, channels first."""

    positions: Tensor

    def __init__(self, config: edt.Config, side: int = 32):
        super().__init__()
        dim, self.patch, self.side = (
            config.hidden_size,
            config.patch_size,
            side // config.patch_size,
        )
        self.patch_embed = nn.Conv2d(config.in_channels, dim, self.patch, stride=self.patch)
        self.timestep = nn.ModuleDict({"up": nn.Linear(256, dim), "down": nn.Linear(dim, dim)})
        self.label = nn.Embedding((config.num_classes or 0) + 1, dim)
        self.blocks = nn.ModuleList(Block(dim, config.num_heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.out_channels = 2 * config.in_channels
        self.linear = nn.Linear(dim, self.patch**2 * self.out_channels)
        table = torch.tensor(edt.sincos_2d(dim, (self.side, self.side)).tolist())
        self.register_buffer("positions", table, persistent=False)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        tokens = self.patch_embed(x).flatten(2).transpose(1, 2) + self.positions
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        angle = t[:, None].float() * frequencies
        features = torch.cat([angle.cos(), angle.sin()], dim=1).to(self.label.weight.dtype)
        time = self.timestep["down"](F.silu(self.timestep["up"](features)))
        vector = time + self.label(label)
        for block in self.blocks:
            tokens = block(tokens, vector)
        shift, scale = self.modulation(F.silu(vector))[:, None].chunk(2, dim=-1)
        patches = self.linear(self.norm(tokens) * (1 + scale) + shift)
        patches = patches.view(len(x), self.side, self.side, self.patch, self.patch, -1)
        image = patches.permute(0, 5, 1, 3, 2, 4)
        return image.reshape(len(x), -1, self.side * self.patch, self.side * self.patch)


def from_diffusers(config: edt.Config, weights: dict[str, Tensor]) -> DiT:
    """With the weights of a file of diffusers' `DiTTransformer2DModel`."""
    model = DiT(config)
    first = "transformer_blocks.0.norm1.emb"
    modules = {
        "patch_embed": "pos_embed.proj",
        "timestep.up": f"{first}.timestep_embedder.linear_1",
        "timestep.down": f"{first}.timestep_embedder.linear_2",
        "modulation": "proj_out_1",
        "linear": "proj_out_2",
    }
    state: dict[str, Any] = {
        "label.weight": weights[f"{first}.class_embedder.embedding_table.weight"]
    }
    for i in range(config.depth):
        theirs = f"transformer_blocks.{i}"
        modules[f"blocks.{i}.attention.out"] = f"{theirs}.attn1.to_out.0"
        modules[f"blocks.{i}.mlp.up"] = f"{theirs}.ff.net.0.proj"
        modules[f"blocks.{i}.mlp.down"] = f"{theirs}.ff.net.2"
        modules[f"blocks.{i}.modulation"] = f"{theirs}.norm1.linear"
        for kind in ("weight", "bias"):
            parts = [weights[f"{theirs}.attn1.to_{x}.{kind}"] for x in "qkv"]
            state[f"blocks.{i}.attention.qkv.{kind}"] = torch.cat(parts)
    for ours, theirs in modules.items():
        state |= {f"{ours}.{kind}": weights[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    model.load_state_dict(state)
    return model
