"""The models that are averaged: nothing but parameters, since no forward is timed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """How large the cases are."""

    large: tuple[int, int] = (8, 4 << 20)  # tensors, elements each; 128 MiB of fp32: more than caches hold
    small: tuple[int, int] = (2000, 1024)
    transformer: tuple[int, int] = (12, 384)  # layers, width
    many: tuple[int, ...] = (1_000, 4_000, 20_000)  # small parameters


QUICK = Sizes(large=(8, 1 << 17), small=(200, 1024), transformer=(2, 64), many=(50, 200))


def tensors(count: int, numel: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """`count` parameters of `numel` elements, each in memory of its own."""
    return nn.ParameterList([nn.Parameter(torch.randn(numel).to(dtype)) for _ in range(count)])


def transformer(num_layers: int, width: int, num_tokens: int = 8192) -> nn.Module:
    """A GPT-2 in shapes: embeddings, and per layer four matrices, four biases and two layer norms."""
    layers = [
        nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )
        for _ in range(num_layers)
    ]
    return nn.Sequential(nn.Embedding(num_tokens, width), nn.Embedding(256, width), *layers, nn.LayerNorm(width))


def numel_of(model: nn.Module) -> int:
    """Elements of all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def flat_pair(numel: int) -> tuple[Tensor, Tensor]:
    """Average and weights for the base: one flat fp32 tensor each."""
    return torch.randn(numel), torch.randn(numel)
