"""When to update.

A schedule is a callable from the optimizer step (counted from 1) to a bool, the same on every rank. `Schedule` is the
one that people mean; schedules are joined by `|` and `&`, with each other and with any other callable.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from ..errors import ConfigError
from .numbers import number, whole

WhenFn = Callable[[int], bool]


class AbstractSchedule(ABC):
    """A schedule that can be joined: `a | b` updates where one of them does, `a & b` where both do."""

    @abstractmethod
    def __call__(self, step: int) -> bool:
        """Whether to update at `step`, which counts from 1."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What to write into a checkpoint's manifest: JSON values only."""

    def __or__(self, other: WhenFn) -> AbstractSchedule:
        return Joined(any, (self, _callable(other, "|")))

    def __ror__(self, other: WhenFn) -> AbstractSchedule:
        return Joined(any, (_callable(other, "|"), self))

    def __and__(self, other: WhenFn) -> AbstractSchedule:
        return Joined(all, (self, _callable(other, "&")))

    def __rand__(self, other: WhenFn) -> AbstractSchedule:
        return Joined(all, (_callable(other, "&"), self))


@dataclass(frozen=True, kw_only=True)
class Schedule(AbstractSchedule):
    """Update at `start_step`, and every `every_steps` steps from there, until `until_step` (that one included).

    Steps are calls of `ShardedAverage.update()` that followed a real optimizer step, counted from 1. So
    `Schedule(every_steps=10)` updates at steps 10, 20, ... and `Schedule(start_step=1000, every_steps=10)` at 1000,
    1010, ... Several stretches are joined: `Schedule(until_step=500) | Schedule(start_step=9000, every_steps=10)`.

    Raises `ConfigError` unless every_steps >= 1, start_step >= 0 and until_step, if there is one, >= start_step.
    """

    every_steps: int = 1
    start_step: int = 0
    until_step: int | None = None

    def __post_init__(self) -> None:
        whole("Schedule(every_steps", self.every_steps, least=1)
        whole("Schedule(start_step", self.start_step, least=0)
        if self.until_step is not None:
            whole("Schedule(until_step", self.until_step, least=max(1, self.start_step))

    @classmethod
    def from_share(
        cls, share: float, *, total_steps: int, every_steps: int = 1, until_share: float | None = None
    ) -> Schedule:
        """From this share of training on: at 0.75 of 10,000 steps, from step 7,500; until the share `until_share`.

        Raises `ConfigError` unless 0 <= share <= until_share <= 1 and total_steps >= 1.
        """
        number("Schedule.from_share(share", share, least=0, most=1, for_example=0.75)
        whole("Schedule.from_share(total_steps", total_steps, least=1)
        if until_share is not None:
            number("Schedule.from_share(until_share", until_share, least=share, most=1)
        until = None if until_share is None else max(1, int(until_share * total_steps))
        return cls(every_steps=every_steps, start_step=ceil(share * total_steps), until_step=until)

    def __call__(self, step: int) -> bool:
        if step < self.start_step or (self.until_step is not None and step > self.until_step):
            return False
        return (step - self.start_step) % self.every_steps == 0

    def settings(self) -> dict[str, Any]:
        """What to write into a checkpoint's manifest: the kind, and the settings that are not `None`."""
        return {"kind": "Schedule", **{name: value for name, value in asdict(self).items() if value is not None}}


@dataclass(frozen=True)
class Joined(AbstractSchedule):
    """Several schedules as one; `how` is `any` or `all`."""

    how: Callable[[Any], bool]
    parts: tuple[WhenFn, ...]

    def __call__(self, step: int) -> bool:
        # A list: a part that counts its calls is asked every time.
        return self.how([bool(part(step)) for part in self.parts])

    def settings(self) -> dict[str, Any]:
        return {"kind": self.how.__name__, "of": [schedule_settings(part) for part in self.parts]}

    def __repr__(self) -> str:
        return f"({(' | ' if self.how is any else ' & ').join(map(repr, self.parts))})"


def _callable(other: object, sign: str) -> WhenFn:
    if not callable(other):
        raise ConfigError(
            f"schedule {sign} {other!r}: join it with another schedule, or with a callable from the step to a bool"
        )
    return other


def schedule_settings(schedule: WhenFn) -> dict[str, Any]:
    """What a manifest says of a schedule: JSON values only."""
    if isinstance(schedule, AbstractSchedule):
        return schedule.settings()
    where = getattr(schedule, "__qualname__", type(schedule).__qualname__)
    return {"kind": "callable", "function": f"{getattr(schedule, '__module__', '?')}:{where}"}
