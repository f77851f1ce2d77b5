"""How saving and loading grow with the number of parameters: calls for each, counted, so that no machine decides."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sharded_avg import EMA, ShardedAverage, load_averaged_state_dict

SIZES = (300, 1200)
# (calls for each parameter of) save, load, load_averaged_state_dict; a call is 0.1 to 1 us
BOUNDS = {"save": 130, "load": 750, "without a model": 720}


def calls_of(work: Callable[[], Any]) -> int:
    """Calls of Python and C functions, those inside included."""
    seen: Counter[str] = Counter()
    sys.setprofile(lambda frame, event, arg: seen.update((event,)))
    try:
        work()
    finally:
        sys.setprofile(None)
    return seen["call"] + seen["c_call"]


def experts(count: int) -> nn.Module:
    """Small parameters of a few shapes."""
    return nn.ParameterList([nn.Parameter(torch.ones(1 + i % 7, 3)) for i in range(count)])


@pytest.mark.parametrize("buffers", [False, True], ids=["", "with buffers"])
def test_r21_work_is_linear_and_small(tmp_path: Path, buffers: bool) -> None:
    """R21: as many calls for each parameter with 1,200 of them as with 300, and not many."""
    found = []
    for size in SIZES:
        average = ShardedAverage(experts(size), EMA(decay=0.9))
        average.update()
        path = tmp_path / str(size)
        average.save(path, with_buffers=buffers)  # what is imported or made once is there
        work = {
            "save": lambda average=average, path=path: average.save(path, with_buffers=buffers),
            "load": lambda average=average, path=path: average.load(path),
            "without a model": lambda path=path: load_averaged_state_dict(path),
        }
        found.append({name: calls_of(one) / size for name, one in work.items()})
    few, many = found
    for name, bound in BOUNDS.items():
        assert many[name] <= 1.05 * few[name] + 0.1, f"{name}: {few[name]:.1f} calls, then {many[name]:.1f}"
        assert many[name] <= bound, f"{name}: {many[name]:.1f} calls for each parameter"
