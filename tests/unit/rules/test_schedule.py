"""Schedules: which steps update."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sharded_avg import SWA, ConfigError, Schedule, ShardedAverage


def updating_steps(schedule, num_steps: int = 30) -> list[int]:
    average = ShardedAverage(nn.Linear(2, 2), SWA(), schedule=schedule)
    steps = [step for step in range(1, num_steps + 1) if average.update()]
    assert average.n_averaged == len(steps)
    return steps


def test_every_step_by_default():
    assert updating_steps(None, 5) == [1, 2, 3, 4, 5]
    assert updating_steps(Schedule(), 5) == [1, 2, 3, 4, 5]


def test_every_n_steps():
    """P46: what is counted are the updates that were applied; `updating_steps` compares."""
    assert updating_steps(Schedule(every_steps=10)) == [10, 20, 30]


def test_start():
    assert updating_steps(Schedule(start_step=28)) == [28, 29, 30]
    assert updating_steps(Schedule(start_step=8, every_steps=10)) == [8, 18, 28]


def test_own_callable():
    assert updating_steps(lambda step: step in (3, 4), 6) == [3, 4]


@pytest.mark.parametrize(
    "settings",
    [{"every_steps": 0}, {"every_steps": 1.5}, {"every_steps": True}, {"start_step": -1}, {"start_step": None}],
)
def test_settings_that_cannot_be(settings):
    (name, value), *_ = settings.items()
    with pytest.raises(ConfigError, match=rf"{name}={value!r}"):
        Schedule(**settings)


def test_unknown_settings_are_refused():
    """P14: a schedule argument that nothing reads cannot be given."""
    with pytest.raises(TypeError, match="update_every"):
        Schedule(update_every=2)


def test_late_start_costs_nothing_before_it():
    """P89, P108: no memory before the first update."""
    average = ShardedAverage(nn.Linear(30, 30), SWA(), schedule=Schedule(start_step=3))
    sizes = []
    for _ in range(4):
        average.update()
        sizes.append(average.nbytes)
    assert sizes == [0, 0, 930 * 4, 930 * 4]


def test_count_is_a_python_int():
    """P42: no counter on the device."""
    average = ShardedAverage(nn.Linear(2, 2), SWA())
    average.update()
    assert type(average.n_averaged) is int
    assert not any(isinstance(value, torch.Tensor) for value in vars(average).values())
