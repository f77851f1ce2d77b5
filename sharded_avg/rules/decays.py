"""Decays that change: what `EMA(decay=...)` takes beside a number. A family of small frozen values.

    WarmupTF            min(decay, (1 + t) / (factor + t))                          TensorFlow, torch_ema, d2go
    WarmupInverseGamma  1 - (1 + t / inv_gamma)^-power, in [min, max]               k-diffusion, diffusers, ema-pytorch
    WarmupExponential   decay * (1 - exp(-t / tau))                                 YOLOv5
    Cosine              from start to end over so many steps, as a cosine           DINO, BYOL
    Linear              the same, as a line
    Debiased            a zero-initialised EMA, its bias corrected                  Adam; optax, axlearn
    HalfLifeShare       2^(-1 / (share * t)): a half-life that grows with the run   torchtitan

A decay is a function of the time t since the first update: updates where an EMA counts those, optimizer steps where it
counts steps (`EMA(per="step")`). `over` is the share of an average that stays over `elapsed` units of that time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from math import cos, exp, pi
from typing import Any

from .numbers import number


class AbstractDecay(ABC):
    """A decay that depends on the time since the first update."""

    @abstractmethod
    def __call__(self, t: float) -> float:
        """The share of the average that stays in one unit of time, at time `t` > 0: in [0, 1]."""

    def over(self, t: float, elapsed: float) -> float:
        """The share that stays at an update at time `t`, which stands for `elapsed` units of time."""
        return float(self(t) ** elapsed)

    def settings(self) -> dict[str, Any]:
        """What to write into a checkpoint's manifest: JSON values only."""
        return {"kind": type(self).__name__, **asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True, kw_only=True)
class WarmupTF(AbstractDecay):
    """min(decay, (1 + t) / (factor + t)): TensorFlow's ExponentialMovingAverage; `factor` is d2go's.

    Raises `ConfigError` unless 0 <= decay <= 1 and factor >= 1.
    """

    decay: float = 0.9999
    factor: float = 10

    def __post_init__(self) -> None:
        number("WarmupTF(decay", self.decay, least=0, most=1, for_example=0.9999)
        number("WarmupTF(factor", self.factor, least=1)

    def __call__(self, t: float) -> float:
        return min(self.decay, (1 + t) / (self.factor + t))


@dataclass(frozen=True, kw_only=True)
class WarmupInverseGamma(AbstractDecay):
    """1 - (1 + t / inv_gamma)^-power, kept in [min, max]: k-diffusion's EMAWarmup.

    With inv_gamma=1, power=1 is the plain mean; 2/3 reaches 0.999 at t = 31.6 K and 0.9999 at 1 M, 3/4 at 10 K and
    215.4 K. Raises `ConfigError` unless inv_gamma > 0, power > 0 and 0 <= min <= max <= 1.
    """

    inv_gamma: float = 1.0
    power: float = 2 / 3
    min: float = 0.0
    max: float = 0.9999

    def __post_init__(self) -> None:
        number("WarmupInverseGamma(inv_gamma", self.inv_gamma, above=0)
        number("WarmupInverseGamma(power", self.power, above=0)
        number("WarmupInverseGamma(max", self.max, least=0, most=1, for_example=0.9999)
        number("WarmupInverseGamma(min", self.min, least=0, most=self.max)

    def __call__(self, t: float) -> float:
        return float(max(self.min, min(self.max, 1 - (1 + t / self.inv_gamma) ** -self.power)))


@dataclass(frozen=True, kw_only=True)
class WarmupExponential(AbstractDecay):
    """decay * (1 - exp(-t / tau)): YOLOv5's ModelEMA. Raises `ConfigError` unless 0 <= decay <= 1 and tau > 0."""

    decay: float = 0.9999
    tau: float = 2000

    def __post_init__(self) -> None:
        number("WarmupExponential(decay", self.decay, least=0, most=1, for_example=0.9999)
        number("WarmupExponential(tau", self.tau, above=0)

    def __call__(self, t: float) -> float:
        return self.decay * (1 - exp(-t / self.tau))


@dataclass(frozen=True, kw_only=True)
class _Ramp(AbstractDecay):
    start: float
    end: float
    steps: float

    def __post_init__(self) -> None:
        kind = type(self).__name__
        number(f"{kind}(start", self.start, least=0, most=1, for_example=0.992)
        number(f"{kind}(end", self.end, least=0, most=1, for_example=1.0)
        number(f"{kind}(steps", self.steps, above=0)


@dataclass(frozen=True, kw_only=True)
class Cosine(_Ramp):
    """From `start` to `end` over `steps`, end + (start - end) (1 + cos(pi t / steps)) / 2, and `end` from there on.

    The momentum of BYOL's and DINO's teachers (0.992 to 1 in DINOv3). Raises `ConfigError` unless start and end are in
    [0, 1] and steps > 0.
    """

    def __call__(self, t: float) -> float:
        return self.end + 0.5 * (self.start - self.end) * (1 + cos(pi * min(t, self.steps) / self.steps))


@dataclass(frozen=True, kw_only=True)
class Linear(_Ramp):
    """From `start` to `end` over `steps` in a line, and `end` from there on.

    Raises `ConfigError` unless start and end are in [0, 1] and steps > 0.
    """

    def __call__(self, t: float) -> float:
        return self.start + (self.end - self.start) * min(t, self.steps) / self.steps


@dataclass(frozen=True, kw_only=True)
class Debiased(AbstractDecay):
    """The EMA that begins at zero, divided by 1 - decay^n, as Adam's moments are (optax's `ema(debias=True)`).

    The same average as a lerp: its weight is (1 - decay) / (1 - decay^(n + 1)) after n updates. It begins as a plain
    mean and ends as an EMA. Raises `ConfigError` unless 0 <= decay < 1.
    """

    decay: float = 0.999

    def __post_init__(self) -> None:
        number("Debiased(decay", self.decay, least=0, below=1, for_example=0.999)

    def __call__(self, t: float) -> float:
        return self.over(t, 1)

    def over(self, t: float, elapsed: float) -> float:
        """1 - (1 - decay^elapsed) / (1 - decay^(t + elapsed)): exact under a stride, which a power of it is not."""
        return 1 - (1 - self.decay**elapsed) / (1 - self.decay ** (t + elapsed)) if elapsed else 1.0


@dataclass(frozen=True, kw_only=True)
class HalfLifeShare(AbstractDecay):
    """2^(-1 / (share * t)): the half-life is always the same share of the training so far (torchtitan, PR 3985).

    `PowerAverage.from_half_life_share` is the same rule but for the first updates, with weights of one formula.
    Raises `ConfigError` unless share > 0.
    """

    share: float = 0.05

    def __post_init__(self) -> None:
        number("HalfLifeShare(share", self.share, above=0, for_example=0.05)

    def __call__(self, t: float) -> float:
        return float(2 ** (-1 / (self.share * t))) if t else 0.0
