"""Equal weights for all that was seen: w(n) = 1 / (n + 1). The template for a new rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .base import AbstractLerpRule, Moment


@dataclass(frozen=True, kw_only=True)
class SWA(AbstractLerpRule):
    """Stochastic weight averaging: the equal-weight mean of all weights seen, a <- a + (x - a) / (n + 1).

    Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", 2018, section 3.
    """

    def weight(self, at: Moment) -> float:
        """w(n) = 1 / (n + 1) (Izmailov et al., 2018, section 3)."""
        return 1 / (at.num_averaged + 1)

    def settings(self) -> dict[str, Any]:
        """What to write into a checkpoint's manifest: the kind."""
        return {"kind": "SWA"}
