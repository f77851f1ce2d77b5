"""Exponential moving averages: w(n) = 1 - decay."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..errors import ConfigError
from .base import AbstractLerpRule


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
