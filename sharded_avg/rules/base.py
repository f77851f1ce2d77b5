"""How an average takes in the weights: elementwise formulas on lists of tensors.

    Moment              when an update comes: how many came before, and how many optimizer steps lie between
    AbstractRule        what the averager calls
      AbstractLerpRule  average += w(n) * (live - average): a rule is its weight w(n)
        EMA             w(n) = 1 - decay                                                        ema.py, decays.py
        SWA             w(n) = 1 / (n + 1)                                                      swa.py
        PowerAverage    w(n) = 1 - (n / (n + 1))^p                                              power.py
        PolynomialAverage  w(n) = (eta + 1) / (n + 1 + eta)                                     polynomial.py
        CosineMerge     weights in the shape of a cosine's slope, over so many steps            cosine_merge.py
      LAWA              the mean of the latest snapshots, which are kept beside the average          lawa.py
      CustomRule        the user's function, with the signatures of torch.optim.swa_utils       custom.py

n is the number of updates done before this one. The first update (n = 0) copies the weights, whatever the rule, so a
rule is only ever called with n >= 1. Rules see local pieces of parameters, cut anywhere and reshaped: they must be
elementwise, and then give the same bits as on the full tensor.

Whatever is called steps in a rule is optimizer steps, and no rule is told the schedule: a Moment, which State makes
from the history of each average, says how many steps an update stands for. So a half-life is the same under any stride.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError

_NEGLIGIBLE = 1e-9  # share of an average, of all updates before one together


@dataclass(frozen=True, slots=True)
class Moment:
    """When an update comes.

    `num_averaged` updates were done before it, the first `age` optimizer steps ago, and the latest `elapsed` ago.
    By default the updates were one at every step.
    """

    num_averaged: int
    age: int = -1
    elapsed: int = 1

    def __post_init__(self) -> None:
        if self.age < 0:
            object.__setattr__(self, "age", self.num_averaged)


class AbstractRule(ABC):
    """An elementwise update of averages from current weights."""

    @abstractmethod
    def update_(self, averaged: Sequence[Tensor], current: Sequence[Tensor], at: Moment) -> None:
        """Update `averaged` in place.

        `averaged[i]` and `current[i]` have the same shape, dtype and device; `at.num_averaged` >= 1 counts the updates
        done before this one.
        """

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What to write into a checkpoint's manifest: JSON values only."""

    def snapshots(self) -> tuple[int, torch.dtype | None]:
        """How many snapshots are kept beside the average, and in which dtype; `None` is the average's own."""
        return 0, None

    def takes(self, step: int, latest: int) -> bool:
        """Whether to update at `step`, one that the schedule chose; `latest` is the step of the latest update, or 0."""
        return True

    def shares(self, moments: Iterable[Moment]) -> Iterator[float]:
        """What each of these updates, latest first, has of the average; the rest may be left out when it is negligible.

        Raises `ConfigError` if this kind of rule does not know.
        """
        raise ConfigError(
            f"{self!r} does not say which share each update has of its average, so it has no profile and no horizon; "
            "rules that are a weight w(n) have (AbstractLerpRule)"
        )


class AbstractLerpRule(AbstractRule):
    """average += w(n) * (live - average), computed by `torch.lerp`."""

    @abstractmethod
    def weight(self, at: Moment) -> float:
        """w(n), the share of the live weights in the next average."""

    def update_(self, averaged: Sequence[Tensor], current: Sequence[Tensor], at: Moment) -> None:
        torch._foreach_lerp_(list(averaged), list(current), self.weight(at))

    def shares(self, moments: Iterable[Moment]) -> Iterator[float]:
        """What each of these updates, latest first, has of the average."""
        left = 1.0
        for at in moments:
            weight = self.weight(at) if at.num_averaged else 1.0
            yield left * weight
            left *= 1 - weight
            if left < _NEGLIGIBLE:
                return
