"""What an average is made of, told from its rule and its history: nothing is looked at, and nothing communicated.

    moments  when each update came, latest first
    shares   what each update has of the average, latest first; a rule knows (`AbstractRule.shares`)

Horizon, profile and decay in force are read off these. Of a long average with an irregular schedule, the steps of
updates in the middle are forgotten: they are taken to lie evenly between those that are known.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..errors import NotStartedError
from ..rules.base import AbstractRule, Moment
from .history import History


class Stretch(NamedTuple):
    """The share that updates at the steps `first` to `last` have of an average."""

    first: int
    last: int
    share: float


def moments(history: History) -> Iterator[Moment]:
    """When each update came, latest first; the last one is the first update, which copies."""
    steps = _steps(history)
    later, first = next(steps), history.strides[0].first if history.strides else 1
    for n, step in zip(range(history.n_averaged - 1, 0, -1), steps, strict=True):
        yield Moment(n, later - first, later - step)
        later = step
    yield Moment(0, 0, 1)


def _steps(history: History) -> Iterator[int]:
    """The step of each update, latest first."""
    if not history.strides:  # taken over from a file that had a count only
        yield from range(history.n_averaged, 0, -1)
        return
    first, *later = history.strides
    forgotten = history.n_averaged - sum(stride.count for stride in history.strides)
    for stride in reversed(later):
        yield from range(stride.last, stride.first - 1, -stride.every)
    end = later[0].first if later else first.last
    yield from (end - (end - first.last) * i // (forgotten + 1) for i in range(1, forgotten + 1))
    yield from range(first.last, first.first - 1, -first.every)


def decay(rule: AbstractRule, history: History, name: str) -> float:
    """The share of the average of before that stayed at the latest update: 0 at the first one."""
    return 1 - next(rule.shares(moments(_begun(history, name))))


def horizon(rule: AbstractRule, history: History, name: str) -> float:
    """The effective number of updates in the average: 1 / the sum of squares of their shares."""
    return 1 / sum(share * share for share in rule.shares(moments(_begun(history, name))))


def profile(rule: AbstractRule, history: History, name: str, stretches: int) -> list[Stretch]:
    """Which share each of so many equal stretches of the steps has, earliest first."""
    last, *_ = steps = list(_steps(_begun(history, name)))
    first = steps[-1]
    count = max(1, min(stretches, last - first + 1))
    found = [0.0] * count
    for step, share in zip(steps, rule.shares(moments(history)), strict=False):  # rules leave out what is negligible
        found[min(count - 1, (step - first) * count // (last - first + 1))] += share
    bounds = [first + -(-i * (last - first + 1) // count) for i in range(count + 1)]
    return [Stretch(a, b - 1, share) for a, b, share in zip(bounds[:-1], bounds[1:], found, strict=True)]


def _begun(history: History, name: str) -> History:
    if not history.n_averaged:
        raise NotStartedError(
            f"the average {name!r} has had no update yet, so it is made of nothing. Call update() after optimizer steps"
        )
    return history
