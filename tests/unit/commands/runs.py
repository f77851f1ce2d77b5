"""A run that saves its averages now and then, and what they must be, by formulas that are not ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sharded_avg import ShardedAverage
from sharded_avg.rules.base import AbstractRule


class Net(nn.Module):
    """Odd sizes, tied, a buffer, a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.norm = nn.BatchNorm1d(5)
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.out = nn.Linear(3, 7, bias=False)
        self.out.weight = self.embed.weight


def train(
    folder: Path,
    rules: Mapping[str, AbstractRule] | AbstractRule,
    steps: int,
    save_at: Sequence[int],
    *,
    schedule: Callable[[int], bool] | None = None,
    dtype: torch.dtype | None = torch.float64,
) -> dict[int, Tensor]:
    """Save to folder/step-N; the live weights of `embed` after each step, in float64."""
    net = Net()
    more = {} if schedule is None else {"schedule": schedule}
    average = ShardedAverage(net, rules, dtype=dtype, **more)
    live = {}
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        with torch.no_grad():
            net.embed.weight.add_(torch.randn(7, 3, generator=generator))
            net.norm.running_mean.fill_(float(step))
        average.update()
        live[step] = net.embed.weight.detach().double().clone()
        if step in save_at:
            average.save(folder / f"step-{step}", with_buffers=True)
    return live


def power_average(values: Sequence[Tensor], power: float) -> Tensor:
    """a <- a + (1 - (1 - 1/t)^power) (x - a), in float64 (EDM2, equation 127)."""
    average = values[0]
    for t, value in enumerate(values[1:], start=2):
        average = average + (1 - (1 - 1 / t) ** power) * (value - average)
    return average
