"""What an average is made of: shares, horizon, profile and decay, beside weights that are tracked one by one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import nn

from sharded_avg import (
    EMA,
    SWA,
    ConfigError,
    CosineMerge,
    CustomRule,
    NotStartedError,
    PowerAverage,
    Schedule,
    ShardedAverage,
    decays,
)
from sharded_avg.averages.history import History, Stride
from sharded_avg.averages.profile import moments

RULES = [
    EMA(decay=0.9),
    EMA.from_half_life(7),
    EMA(decay=decays.Cosine(start=0.5, end=0.99, steps=30), per="step"),
    SWA(),
    PowerAverage.from_sigma_rel(0.1),
    CosineMerge(100),
]
SCHEDULES: list[Callable[[int], bool]] = [
    Schedule(),
    Schedule(every_steps=7, start_step=3),
    lambda step: step % 5 == 0 or step in (11, 12),
]
NUM_STEPS = 60


def one_hot(step: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(step), NUM_STEPS + 1).double()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["every step", "stride", "irregular"])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_shares_are_those_of_the_average(rule, schedule):
    """An average of unit vectors has, in each place, the share of that step: no arithmetic of ours is in it."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(NUM_STEPS + 1, dtype=torch.float64))])
    average = ShardedAverage(model, rule, schedule=schedule)
    before = None
    for step in range(1, NUM_STEPS + 1):
        with torch.no_grad():
            model[0].copy_(one_hot(step))
        if not average.update():
            continue
        with average.summon_full_params() as full:
            shares = full["0"]
        kept = 0.0 if before is None else (shares[:step].sum() / before.sum()).item()
        assert average.decay() == pytest.approx(kept, abs=1e-12)
        before = shares.clone()
    assert average.horizon() == pytest.approx(1 / shares.square().sum().item(), rel=1e-6)
    taken = torch.nonzero(torch.tensor([schedule(step) for step in range(1, NUM_STEPS + 1)]))[:, 0] + 1
    for stretches in (1, 4, 1000):
        told = average.profile(stretches=stretches)
        assert (told[0].first, told[-1].last) == (taken[0].item(), taken[-1].item())
        assert all(one.last + 1 == two.first for one, two in pairwise(told))
        for stretch in told:
            expected = shares[stretch.first : stretch.last + 1].sum().item()
            assert stretch.share == pytest.approx(expected, abs=2e-9)


def test_horizons_that_are_known():
    model = nn.Linear(1, 1)
    averages = ShardedAverage(model, {"mean": SWA(), "ema": EMA(decay=0.9)})
    for _ in range(300):
        averages.update()
    assert averages.horizon("mean") == pytest.approx(300)
    assert averages.horizon("ema") == pytest.approx(1.9 / 0.1)
    assert averages.decay("mean") == 1 - 1 / 300


def test_what_is_not_known_is_said():
    average = ShardedAverage(nn.Linear(1, 1), {"own": CustomRule(avg_fn=max), "mean": SWA()})
    for ask in (average.decay, average.horizon, average.profile):
        with pytest.raises(NotStartedError, match="'mean' has had no update"):
            ask("mean")
    average = ShardedAverage(nn.Linear(1, 1), CustomRule(avg_fn=max))
    average.update()
    for ask in (average.decay, average.horizon, average.profile):
        with pytest.raises(ConfigError, match=r"CustomRule.*does not say"):
            ask()


def test_moments_of_a_history_that_forgot_its_middle():
    """The first and the latest steps are right, and so is the number of updates."""
    history, steps = History(), [step for step in range(1, 4000) if step % 3 == 0 or step % 7 == 0]
    for step in steps:
        history = history.after(step)
    assert sum(stride.count for stride in history.strides) < history.n_averaged == len(steps)
    assert history.strides[0].first == steps[0]
    found = list(moments(history))
    assert len(found) == len(steps)
    assert (found[0].age, found[0].elapsed) == (steps[-1] - steps[0], steps[-1] - steps[-2])
    assert sum(moment.elapsed for moment in found[:-1]) == steps[-1] - steps[0]
    assert History.from_lists(history.as_lists(), history.n_averaged) == history


def test_moments_where_only_a_count_is_known():
    assert [(m.num_averaged, m.age, m.elapsed) for m in moments(History(n_averaged=3))] == [
        (2, 2, 1),
        (1, 1, 1),
        (0, 0, 1),
    ]
    one = History((Stride(5, 5),), 1)
    assert [m.num_averaged for m in moments(one)] == [0]
