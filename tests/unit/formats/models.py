"""Small models, and averages of them, for files that go out to other tools and come in from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sharded_avg import EMA, ShardedAverage
from tests.helpers.foreign import SHAPES


class Named(nn.Module):
    """A module whose parameters have the names and shapes of the samples."""

    def __init__(self, shapes: dict[str, tuple[int, ...]] = SHAPES) -> None:
        super().__init__()
        for name, shape in shapes.items():
            *parents, last = name.split(".")
            module: nn.Module = self
            for parent in parents:
                if parent not in module._modules:
                    module.add_module(parent, nn.Module())
                module = module._modules[parent]
            module.register_parameter(last, nn.Parameter(torch.zeros(shape)))


class Net(nn.Module):
    """Tied weights, a frozen parameter, BatchNorm's buffers, a bf16 parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 5, bias=False)
        self.norm = nn.BatchNorm1d(5)
        self.frozen = nn.Linear(5, 5)
        self.low = nn.Linear(5, 3, bias=False).bfloat16()
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)


def trained(num_steps: int = 3) -> tuple[Net, ShardedAverage]:
    torch.manual_seed(0)
    net = Net()
    average = ShardedAverage(net, EMA(decay=0.5))
    for _ in range(num_steps):
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
        net.norm(torch.randn(7, 5))
        average.update()
    return net, average


def full(average: ShardedAverage) -> dict[str, Any]:
    with average.summon_full_params() as state:
        return {name: value.clone() for name, value in state.items()}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in right)
