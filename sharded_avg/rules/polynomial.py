"""Weights that grow as a power of the update's number: w(n) = (eta + 1) / (n + 1 + eta)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .base import AbstractLerpRule, Moment
from .numbers import number


@dataclass(frozen=True)
class PolynomialAverage(AbstractLerpRule):
    """Polynomial-decay averaging: w(n) = (eta + 1) / (n + 1 + eta).

    Shamir and Zhang, "Stochastic Gradient Descent for Non-smooth Optimization", 2013. eta = 0 is the plain mean;
    eta = 1 gives the weights 1, 2, 3, ... (the WMA of pre-trained model averaging, arXiv 2505.12082, 2025). Raises
    `ConfigError` unless eta >= 0.
    """

    eta: float

    def __post_init__(self) -> None:
        number("PolynomialAverage(eta", self.eta, least=0, for_example=1)

    def weight(self, at: Moment) -> float:
        """w(n) = (eta + 1) / (n + 1 + eta) (Shamir and Zhang, 2013)."""
        return (self.eta + 1) / (at.num_averaged + 1 + self.eta)

    def settings(self) -> dict[str, Any]:
        """What to write into a checkpoint's manifest: the kind, and `eta`."""
        return {"kind": "PolynomialAverage", "eta": self.eta}
