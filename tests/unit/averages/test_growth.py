"""How the work grows with the number of parameters: Python calls for each, counted, so that no machine decides."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sharded_avg import EMA, ShardedAverage

SIZES = (500, 4000)


def linears(count: int) -> nn.Module:
    return nn.ModuleList([nn.Linear(3, 2) for _ in range(count // 2)])


def experts(count: int) -> nn.Module:
    """Lists of small parameters, half of them views of one memory."""
    flat = torch.zeros(count // 2, 3)
    lists = [nn.ParameterList(list(rows)) for rows in flat.split(50)]
    return nn.ModuleList(lists + [nn.ParameterList([torch.zeros(3) for _ in range(50)]) for _ in lists])


def norms(count: int) -> nn.Module:
    """As many buffers as parameters, and most of them averaged."""
    return nn.ModuleList([nn.BatchNorm1d(3) for _ in range(count // 2)])


def calls_of(work: Callable[[], Any]) -> int:
    """Calls of Python and C functions, those inside included."""
    seen: Counter[str] = Counter()
    sys.setprofile(lambda frame, event, arg: seen.update((event,)))
    try:
        work()
    finally:
        sys.setprofile(None)
    return seen["call"] + seen["c_call"]


def built(make: Callable[[int], nn.Module], count: int) -> list[int]:
    """Calls of construction, of the first update, of another one, and of one after the model was moved."""
    model, held = make(count), []

    def build() -> None:
        held.append(ShardedAverage(model, EMA(decay=0.9), buffers="average"))

    calls = [calls_of(build)]
    calls += [calls_of(held[0].update) for _ in range(2)]
    for parameter in model.parameters():
        parameter.data = parameter.detach().clone()
    return [*calls, calls_of(held[0].update)]


@pytest.mark.parametrize("make", [linears, experts, norms])
def test_work_is_linear_and_small(make: Callable[[int], nn.Module]) -> None:
    """R21: as many calls for each parameter with 4,000 of them as with 500, and not many."""
    few, many = ([calls / size for calls in built(make, size)] for size in SIZES)
    bounds = (200, 100, 2, 250)
    for name, small, large, bound in zip(("build", "first update", "update", "move"), few, many, bounds, strict=True):
        assert large <= 1.05 * small + 0.1, f"{name}: {small:.1f} calls for each of 500, {large:.1f} for each of 4,000"
        assert large <= bound, f"{name}: {large:.1f} calls for each parameter"


def test_the_collector_is_as_it_was() -> None:
    """R21: it rests while many small objects are made that stay, and goes on, after an error, too."""
    ShardedAverage(linears(4), EMA(decay=0.9)).update()
    assert gc.isenabled()
    with pytest.raises(ValueError, match="nothing to average"):
        ShardedAverage(linears(4).requires_grad_(False), EMA(decay=0.9))
    assert gc.isenabled()
    gc.disable()
    try:
        ShardedAverage(linears(4), EMA(decay=0.9)).update()
        assert not gc.isenabled()
    finally:
        gc.enable()
