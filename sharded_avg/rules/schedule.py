"""When to update.

A schedule is a callable from the optimizer step (counted from 1) to a bool. `Schedule` is the one that people mean;
any other callable with that signature works too, provided that it answers alike on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import ConfigError

WhenFn = Callable[[int], bool]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Update at `start_step`, and every `every_steps` steps from there.

    Steps are calls of `ShardedAverage.update()` that followed a real optimizer step, counted from 1. So
    `Schedule(every_steps=10)` updates at steps 10, 20, ... and `Schedule(start_step=1000, every_steps=10)` at 1000,
    1010, ... Raises `ConfigError` unless every_steps >= 1 and start_step >= 0.
    """

    every_steps: int = 1
    start_step: int = 0

    def __post_init__(self) -> None:
        for name, least in (("every_steps", 1), ("start_step", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"Schedule({name}={value!r}): must be an integer >= {least}")

    def __call__(self, step: int) -> bool:
        return step >= self.start_step and (step - self.start_step) % self.every_steps == 0


def schedule_settings(schedule: WhenFn) -> dict[str, Any]:
    """What a manifest says of a schedule: JSON values only."""
    if isinstance(schedule, Schedule):
        return {"kind": "Schedule", **asdict(schedule)}
    where = getattr(schedule, "__qualname__", type(schedule).__qualname__)
    return {"kind": "callable", "function": f"{getattr(schedule, '__module__', '?')}:{where}"}
