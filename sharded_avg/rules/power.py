"""Weights by a power of training time: w(n) = 1 - (n / (n + 1))^p."""

from __future__ import annotations

from dataclasses import dataclass
from math import log, sqrt
from typing import Any

from .base import AbstractLerpRule, Moment
from .numbers import number

_MOST_SIGMA_REL = sqrt(1 / 12)  # of equal weights


@dataclass(frozen=True)
class PowerAverage(AbstractLerpRule):
    """An average whose horizon grows with training: w(n) = 1 - (n / (n + 1))^power. One formula, four families.

    power = 1 is the plain mean (SWA); 1/2 the "1 - sqrt" merge of a decay phase, at any moment and without a window
    (`merge_1_sqrt`); gamma + 1 the power-function EMA of EDM2 (`from_sigma_rel`; arXiv 2312.02696, 2023, equation
    127); ln 2 / f a half-life that is the share f of the training so far (`from_half_life_share`). The larger the
    power, the shorter it remembers. A stride of the schedule makes no difference to these shapes.

    Time begins at the first update: to begin anew, build another average, or delay it by a schedule's start. Raises
    `ConfigError` unless power > 0.
    """

    power: float

    def __post_init__(self) -> None:
        number("PowerAverage(power", self.power, above=0, for_example=7.94)

    @classmethod
    def from_sigma_rel(cls, sigma_rel: float) -> PowerAverage:
        """By the width of the profile, relative to the length of training (EDM2, algorithm 2): 0.05 to 0.15 are common.

        power = gamma + 1, where gamma is the largest real root of
        gamma^3 + 7 gamma^2 + (16 - sigma_rel^-2) gamma + (12 - sigma_rel^-2). Raises `ConfigError` unless
        0 < sigma_rel <= 0.2886, of which the last is the plain mean.
        """
        number("PowerAverage.from_sigma_rel(sigma_rel", sigma_rel, above=0, most=_MOST_SIGMA_REL, for_example=0.1)
        low, high = 0.0, 1 / sigma_rel  # the width falls with gamma, and is below 1 / gamma
        while (middle := (low + high) / 2) not in (low, high):
            low, high = (middle, high) if _sigma_rel(middle) > sigma_rel else (low, middle)
        return cls(high + 1)

    @classmethod
    def from_half_life_share(cls, share: float) -> PowerAverage:
        """Weights lose half of their share while training grows by the share `share`: power = ln 2 / share.

        Raises `ConfigError` unless share > 0.
        """
        number("PowerAverage.from_half_life_share(share", share, above=0, for_example=0.05)
        return cls(log(2) / share)

    @classmethod
    def merge_1_sqrt(cls) -> PowerAverage:
        """The merge that stands in for a learning rate decayed by 1 - sqrt: power = 1/2.

        Tian et al., "WSM: decay-free learning rate schedule via checkpoint merging", 2025 (arXiv 2507.17634). The
        window's length cancels: it is the merge of all that was seen, at any moment.
        """
        return cls(0.5)

    @property
    def sigma_rel(self) -> float:
        """The width of the profile, relative to the length of training: what `from_sigma_rel` takes (EDM2, eq. 123)."""
        return _sigma_rel(self.power - 1)

    def weight(self, at: Moment) -> float:
        """w(n) = 1 - (n / (n + 1))^power (arXiv 2312.02696, equation 127, where power = gamma + 1)."""
        n = at.num_averaged
        return float(1 - (n / (n + 1)) ** self.power)

    def settings(self) -> dict[str, Any]:
        """What to write into a checkpoint's manifest: the kind, and `power`."""
        return {"kind": "PowerAverage", "power": self.power}


def _sigma_rel(gamma: float) -> float:
    return sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))
