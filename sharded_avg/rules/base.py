"""How an average takes in the weights: elementwise formulas on lists of tensors.

    AbstractRule        what the averager calls
      AbstractLerpRule  average += w(n) * (live - average): a rule is its weight w(n)
        EMA             w(n) = 1 - decay                                                        ema.py
        SWA             w(n) = 1 / (n + 1)                                                      swa.py
      CustomRule        the user's function, with the signatures of torch.optim.swa_utils       custom.py

n is the number of updates done before this one. The first update (n = 0) copies the weights, whatever the rule, so a
rule is only ever called with n >= 1. Rules see local pieces of parameters, cut anywhere and reshaped: they must be
elementwise, and then give the same bits as on the full tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class AbstractRule(ABC):
    """An elementwise update of averages from current weights."""

    @abstractmethod
    def update_(self, averaged: Sequence[Tensor], current: Sequence[Tensor], num_averaged: int) -> None:
        """Update `averaged` in place.

        `averaged[i]` and `current[i]` have the same shape, dtype and device; `num_averaged` >= 1 counts the updates
        done before this one.
        """

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What to write into a checkpoint's manifest: JSON values only."""


class AbstractLerpRule(AbstractRule):
    """average += w(n) * (live - average), computed by `torch.lerp`."""

    @abstractmethod
    def weight(self, num_averaged: int) -> float:
        """w(n), the share of the live weights in the next average."""

    def update_(self, averaged: Sequence[Tensor], current: Sequence[Tensor], num_averaged: int) -> None:
        torch._foreach_lerp_(list(averaged), list(current), self.weight(num_averaged))
