"""What share each moment of training has of a power average, and which mixture of saved ones has another's shares.

    PowerProfile   the shares of one average: a density over training time
    Mixture        coefficients for saved averages, and how near their sum comes to what was wanted
    gamma_of       sigma_rel -> gamma
    gamma_of_rule  a rule's settings -> gamma

Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2), 2023, arXiv 2312.02696,
section 3 and appendix C. Time is counted in updates; nothing here knows of tensors, files or ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum, isfinite, sqrt
from typing import Any

import torch

from ..errors import ConfigError
from .power import PowerAverage

LEAST_GAMMA = -0.5  # of a profile with a finite norm; not included
_DEPENDENT = 1e-9  # of the largest singular value: what is below is rounding, and adds to no fit
_NEGLIGIBLE = 1e-12  # what rounding leaves of a coefficient that is 0


@dataclass(frozen=True, slots=True)
class PowerProfile:
    """p(tau) = (gamma + 1) tau^gamma / length^(gamma + 1) for 0 < tau <= length, else 0 (EDM2, equation 3).

    `length` is the number of updates that the average has taken in. Raises `ConfigError` unless gamma > -1/2 (below,
    the profile has no finite norm) and length > 0.
    """

    gamma: float
    length: float

    def __post_init__(self) -> None:
        if not LEAST_GAMMA < self.gamma < float("inf") or not 0 < self.length < float("inf"):
            raise ConfigError(
                f"PowerProfile(gamma={self.gamma!r}, length={self.length!r}): must be more than {LEAST_GAMMA} and 0"
            )

    def at(self, tau: float) -> float:
        """The density at one moment."""
        if not 0 < tau <= self.length:
            return 0.0
        return float((self.gamma + 1) * (tau / self.length) ** self.gamma / self.length)

    def dot(self, other: PowerProfile) -> float:
        """The integral of the product (EDM2, algorithm 3)."""
        a, b = self, other
        exponent = b.gamma if a.length < b.length else -a.gamma
        shared = (a.length / b.length) ** exponent / max(a.length, b.length)
        return float((a.gamma + 1) * (b.gamma + 1) * shared / (a.gamma + b.gamma + 1))


@dataclass(frozen=True, slots=True)
class Mixture:
    """sum of coefficients[i] * profiles[i], which stands in for `target`. The coefficients' sum is 1."""

    target: PowerProfile
    profiles: tuple[PowerProfile, ...]
    coefficients: tuple[float, ...]

    def at(self, tau: float) -> float:
        """The density that is reached at one moment; it may be below 0."""
        return fsum(c * profile.at(tau) for c, profile in zip(self.coefficients, self.profiles, strict=True))

    @property
    def error(self) -> float:
        """The distance from the target, as a share of the target's norm: 0 is exact, 1 is nothing in common."""
        terms = [(1.0, self.target), *((-c, p) for c, p in zip(self.coefficients, self.profiles, strict=True))]
        square = fsum(c * d * p.dot(q) for c, p in terms for d, q in terms)
        return sqrt(max(square, 0.0) / self.target.dot(self.target))

    @property
    def amplification(self) -> float:
        """By how much rounding of the saved averages may grow: 1 if no coefficient is below 0."""
        return fsum(map(abs, self.coefficients))

    @classmethod
    def of(cls, profiles: Sequence[PowerProfile], target: PowerProfile) -> Mixture:
        """The least-squares solution (EDM2, algorithm 3), divided by its sum as there.

        Raises `ConfigError` without profiles, for one that goes on after the target ends, and where the solution has
        no sum to divide by.
        """
        if not profiles:
            raise ConfigError("no saved averages to mix: give at least one profile")
        late = [profile for profile in profiles if profile.length > target.length]
        if late:
            raise ConfigError(f"{late[0]} goes on after {target} ends: leave out what was saved later")
        solution = _solved(profiles, target)
        total = fsum(solution)
        if not isfinite(total) or abs(total) < 1e-6:
            raise ConfigError(f"the profiles of {len(profiles)} saved averages have nothing in common with {target}")
        kept = [x if abs(x) > _NEGLIGIBLE * abs(total) else 0.0 for x in solution]
        return cls(target, tuple(profiles), tuple(x / fsum(kept) for x in kept))


def _solved(profiles: Sequence[PowerProfile], target: PowerProfile) -> list[float]:
    """X of A X = B, in float64.

    Profiles are brought to norm 1 first, and what is dependent within rounding (neighbours in a long run, one saved
    twice) is shared out, which a plain solve would turn into huge numbers of opposite sign.
    """
    norms = [sqrt(profile.dot(profile)) for profile in profiles]
    pairs = list(zip(profiles, norms, strict=True))
    gram = [[p.dot(q) / (n * m) for q, m in pairs] for p, n in pairs]
    wanted = [p.dot(target) / n for p, n in pairs]
    a, b = torch.tensor(gram, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64).unsqueeze(1)
    found: list[float] = torch.linalg.lstsq(a, b, rcond=_DEPENDENT, driver="gelsd").solution.squeeze(1).tolist()
    return [x / norm for x, norm in zip(found, norms, strict=True)]


def gamma_of(sigma_rel: float) -> float:
    """The gamma of a profile whose standard deviation is `sigma_rel` of its length (PowerAverage.from_sigma_rel)."""
    return PowerAverage.from_sigma_rel(sigma_rel).power - 1


def sigma_rel_of(gamma: float) -> float:
    """The standard deviation of a profile, relative to its length."""
    return PowerAverage(gamma + 1).sigma_rel


def gamma_of_rule(settings: Mapping[str, Any]) -> float | None:
    """The gamma of a saved rule (a manifest's "rule"); `None` if its shares are no power of time, or have no norm.

    PolynomialAverage(eta) has the weights of gamma = eta but for the first few updates, and exactly at eta = 0.
    """
    of_kind = {"PowerAverage": ("power", -1), "PolynomialAverage": ("eta", 0)}
    if settings.get("kind") == "SWA":
        return 0.0
    name, shift = of_kind.get(str(settings.get("kind")), ("", 0))
    value = settings.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not isfinite(value):
        return None
    return value + shift if value + shift > LEAST_GAMMA else None
