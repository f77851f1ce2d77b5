"""The merge that stands in for a learning rate decayed as a cosine."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi
from typing import Any

from .base import AbstractLerpRule, Moment
from .numbers import number


@dataclass(frozen=True)
class CosineMerge(AbstractLerpRule):
    """Weights that merge `steps` optimizer steps as a cosine decay of the learning rate would have: for such a phase.

    With f(x) = (1 + cos(pi x)) / 2, w = (f(b) - f(a)) / (1 - f(a)), where b and a are the shares of `steps` that lie
    before and after the update (the cosine of WSM, Tian et al., 2025, arXiv 2507.17634, as an update). Time begins at
    the first update; after `steps` the average is whole and stays as it is. Raises `ConfigError` unless steps > 0.
    """

    steps: float

    def __post_init__(self) -> None:
        number("CosineMerge(steps", self.steps, above=0, for_example=10_000)

    def weight(self, at: Moment) -> float:
        """w = (f(b) - f(a)) / (1 - f(a)), as the class says (arXiv 2507.17634), and 0 after `steps`."""
        before, after = _f(at.age / self.steps), _f((at.age + at.elapsed) / self.steps)
        return (before - after) / (1 - after) if after < 1 else 0.0

    def settings(self) -> dict[str, Any]:
        """What to write into a checkpoint's manifest: the kind, and `steps`."""
        return {"kind": "CosineMerge", "steps": self.steps}


def _f(x: float) -> float:
    return 0.5 * (1 + cos(pi * min(x, 1.0)))
