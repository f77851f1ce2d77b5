"""Schedules: which steps update."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import nn

from sharded_avg import SWA, ConfigError, Schedule, ShardedAverage
from sharded_avg.rules.schedule import schedule_settings


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


def test_until():
    assert updating_steps(Schedule(until_step=3)) == [1, 2, 3]
    assert updating_steps(Schedule(start_step=5, every_steps=4, until_step=13)) == [5, 9, 13]


def test_shares_of_training():
    assert updating_steps(Schedule.from_share(0.9, total_steps=30)) == [27, 28, 29, 30]
    assert updating_steps(Schedule.from_share(0.5, total_steps=30, every_steps=5, until_share=0.75)) == [15, 20]
    assert updating_steps(Schedule.from_share(0, total_steps=3)) == list(range(1, 31))
    assert updating_steps(Schedule.from_share(1, total_steps=30)) == [30]


def test_several_stretches():
    joined = Schedule(until_step=2) | Schedule(start_step=10, until_step=11) | Schedule(start_step=28, every_steps=2)
    assert updating_steps(joined) == [1, 2, 10, 11, 28, 30]


def test_intersections_and_callables():
    assert updating_steps(Schedule(every_steps=3) & Schedule(every_steps=4)) == [12, 24]
    assert updating_steps((lambda step: step in (3, 5)) | Schedule(start_step=29)) == [3, 5, 29, 30]
    assert updating_steps((lambda step: step % 7 == 0) & Schedule(until_step=15)) == [7, 14]
    both = (Schedule(every_steps=3) | Schedule(every_steps=5)) & Schedule(start_step=9, until_step=21)
    assert updating_steps(both) == [9, 10, 12, 15, 18, 20, 21]
    assert pickle.loads(pickle.dumps(both)) == both


def test_joined_schedules_ask_each_part_at_every_step():
    asked = []
    joined = Schedule() | (lambda step: bool(asked.append(step)))
    assert updating_steps(joined, 3) == asked == [1, 2, 3]


def test_settings_of_schedules():
    either = Schedule(every_steps=2) | Schedule(start_step=5, until_step=8)
    assert schedule_settings(either) == {
        "kind": "any",
        "of": [
            {"kind": "Schedule", "every_steps": 2, "start_step": 0},  # as older packages wrote it
            {"kind": "Schedule", "every_steps": 1, "start_step": 5, "until_step": 8},
        ],
    }
    assert schedule_settings(Schedule() & math.isnan)["of"][1] == {"kind": "callable", "function": "math:isnan"}


@pytest.mark.parametrize("other", [3, None, "x"])
def test_only_callables_can_be_joined(other):
    with pytest.raises(ConfigError, match=rf"schedule \| {other!r}"):
        Schedule() | other
    with pytest.raises(ConfigError, match="schedule &"):
        other & Schedule()


@pytest.mark.parametrize(
    ("share", "more", "says"),
    [
        (1.5, {}, "share=1.5"),
        (0.5, {"until_share": 0.4}, "until_share=0.4"),
        (0.5, {"total_steps": 0}, "total_steps=0"),
    ],
)
def test_shares_that_cannot_be(share, more, says):
    with pytest.raises(ConfigError, match=says):
        Schedule.from_share(share, **{"total_steps": 10, **more})


@pytest.mark.parametrize(
    "settings",
    [
        {"until_step": 0},
        {"every_steps": 0},
        {"every_steps": 1.5},
        {"every_steps": True},
        {"start_step": -1},
        {"start_step": None},
    ],
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
