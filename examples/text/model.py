"""A small GPT-style decoder in plain PyTorch. It knows nothing of sharding or averaging."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import VOCABULARY_SIZE


@dataclass(frozen=True)
class Shape:
    """What it takes to build the same model again."""

    context: int = 64  # bytes
    width: int = 128
    num_layers: int = 3
    num_heads: int = 4


class Block(nn.Module):
    """Attention to what came before, then a two-layer perceptron; both added to their input."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.num_heads = shape.num_heads
        self.norm1 = nn.LayerNorm(shape.width)
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.out = nn.Linear(shape.width, shape.width)
        self.norm2 = nn.LayerNorm(shape.width)
        self.up = nn.Linear(shape.width, 4 * shape.width)
        self.down = nn.Linear(4 * shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:  # (batch, time, width)
        x = x + self.out(self.attend(self.qkv(self.norm1(x))))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def attend(self, qkv: Tensor) -> Tensor:  # (batch, time, 3 * width) -> (batch, time, width)
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)  # (batch, heads, time, width / heads)
        return mixed.transpose(1, 2).flatten(2)


class GPT(nn.Module):
    """Predicts the next byte; `forward` returns the mean loss over a batch, in nats per byte."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.bytes = nn.Embedding(VOCABULARY_SIZE, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, VOCABULARY_SIZE, bias=False)
        self.apply(_initialise)
        self.head.weight = self.bytes.weight  # tied: one parameter under two names

    def forward(self, windows: Tensor) -> Tensor:  # (batch, context + 1) -> ()
        inputs, targets = windows[:, :-1], windows[:, 1:]
        x = self.bytes(inputs) + self.positions(torch.arange(inputs.shape[1]))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
