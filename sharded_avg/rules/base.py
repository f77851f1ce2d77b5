"""How an average takes in the weights: elementwise formulas on lists of tensors.

    AbstractRule        what the averager calls
      AbstractLerpRule  average += w(n) * (live - average): a rule is its weight w(n)
        EMA             w(n) = 1 - decay
        SWA             w(n) = 1 / (n + 1)
      CustomRule        the user's `avg_fn` or `multi_avg_fn`, with the signatures of torch.optim.swa_utils

n is the number of updates done before this one. The first update (n = 0) copies the weights, whatever the rule, so a
rule is only ever called with n >= 1. Rules see local pieces of parameters, cut anywhere and reshaped: they must be
elementwise, and then give the same bits as on the full tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError

AvgFn = Callable[[Tensor, Tensor, int], Tensor]
MultiAvgFn = Callable[[list[Tensor], list[Tensor], int], None]


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


@dataclass(frozen=True, kw_only=True)
class EMA(AbstractLerpRule):
    """Exponential moving average: a <- decay * a + (1 - decay) * x (torch.optim.swa_utils).

    With `warmup`, decay is min(decay, (1 + n) / (10 + n)) after n updates (TensorFlow's ExponentialMovingAverage),
    so that the first weights are forgotten quickly. The decay is per update: with a schedule of every N steps,
    decay ** N keeps the horizon, which `from_half_life(..., every_steps=N)` accounts for.

    Raises `ConfigError` unless 0 <= decay <= 1.
    """

    decay: float = 0.999
    warmup: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.decay, bool) or not isinstance(self.decay, (int, float)) or not 0.0 <= self.decay <= 1.0:
            raise ConfigError(f"EMA(decay={self.decay!r}): decay must be a number in [0, 1], for example 0.999")
        if not isinstance(self.warmup, bool):
            raise ConfigError(f"EMA(warmup={self.warmup!r}): warmup must be True or False")

    @classmethod
    def from_half_life(cls, steps: float, *, every_steps: int = 1, warmup: bool = False) -> EMA:
        """The EMA in which a weight's share halves every `steps` optimizer steps: decay = 2^(-every_steps / steps).

        `every_steps` is the schedule's stride, so that the half-life is in optimizer steps whatever the stride.
        """
        if isinstance(steps, bool) or not isinstance(steps, (int, float)) or not 0.0 < steps < float("inf"):
            raise ConfigError(f"EMA.from_half_life({steps!r}): the half-life must be a positive number of steps")
        if isinstance(every_steps, bool) or not isinstance(every_steps, int) or every_steps < 1:
            raise ConfigError(f"EMA.from_half_life(every_steps={every_steps!r}): must be an integer >= 1")
        return cls(decay=2.0 ** (-every_steps / steps), warmup=warmup)

    def weight(self, num_averaged: int) -> float:
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + num_averaged) / (10 + num_averaged))
        return 1 - decay

    def settings(self) -> dict[str, Any]:
        return {"kind": "EMA", **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class SWA(AbstractLerpRule):
    """Stochastic weight averaging: the equal-weight mean of all weights seen, a <- a + (x - a) / (n + 1).

    Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", 2018, section 3.
    """

    def weight(self, num_averaged: int) -> float:
        return 1 / (num_averaged + 1)

    def settings(self) -> dict[str, Any]:
        return {"kind": "SWA"}


@dataclass(frozen=True, kw_only=True)
class CustomRule(AbstractRule):
    """The user's own elementwise function, with the signatures of torch.optim.swa_utils; give exactly one.

    avg_fn(averaged, current, num_averaged) -> new average, one piece at a time;
    multi_avg_fn(averaged_list, current_list, num_averaged) -> None, in place.

    `current` arrives in the average's dtype. Pass a function that can be imported (not a lambda or a closure) where
    the rule has to be pickled. Raises `ConfigError` if neither or both are given.
    """

    avg_fn: AvgFn | None = None
    multi_avg_fn: MultiAvgFn | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("avg_fn", "multi_avg_fn") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(f"CustomRule needs exactly one of avg_fn and multi_avg_fn; got {given or 'neither'}")
        if not callable(getattr(self, given[0])):
            raise ConfigError(f"CustomRule({given[0]}={getattr(self, given[0])!r}): must be callable")

    def update_(self, averaged: Sequence[Tensor], current: Sequence[Tensor], num_averaged: int) -> None:
        if self.multi_avg_fn is not None:
            self.multi_avg_fn(list(averaged), list(current), num_averaged)
        elif self.avg_fn is not None:
            for average, live in zip(averaged, current, strict=True):
                average.copy_(self._checked(self.avg_fn(average, live, num_averaged), average))

    @staticmethod
    def _checked(result: object, average: Tensor) -> Tensor:
        if not isinstance(result, Tensor) or result.shape != average.shape:
            what = f"a tensor of shape {tuple(result.shape)}" if isinstance(result, Tensor) else repr(result)
            raise ConfigError(
                f"avg_fn returned {what} for a piece of shape {tuple(average.shape)}; it must return the new average "
                "of that piece, elementwise"
            )
        return result

    def settings(self) -> dict[str, Any]:
        fn = self.avg_fn if self.avg_fn is not None else self.multi_avg_fn
        where = f"{getattr(fn, '__module__', '?')}:{getattr(fn, '__qualname__', type(fn).__qualname__)}"
        return {"kind": "CustomRule", "function": where}
