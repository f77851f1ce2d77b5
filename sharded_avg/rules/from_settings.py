"""What a manifest says of a rule, as a rule again: for those that are asked about averages that were saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..errors import ConfigError
from . import decays
from .base import AbstractRule
from .cosine_merge import CosineMerge
from .decays import AbstractDecay
from .ema import EMA
from .lawa import LAWA
from .polynomial import PolynomialAverage
from .power import PowerAverage
from .swa import SWA

_RULES: dict[str, type[AbstractRule]] = {
    kind.__name__: kind for kind in (EMA, SWA, PowerAverage, PolynomialAverage, CosineMerge, LAWA)
}
_DECAYS = {
    name: kind for name, kind in vars(decays).items() if isinstance(kind, type) and issubclass(kind, AbstractDecay)
}


def rule_of(settings: Mapping[str, Any]) -> AbstractRule | None:
    """The rule that has these `settings()`; `None` for a function, another tool's, a later version's."""
    rule = _RULES.get(str(settings.get("kind")))
    try:
        return None if rule is None else rule(**{name: _value(name, value) for name, value in _given(settings)})
    except (TypeError, KeyError, ConfigError):
        return None


def _value(name: str, value: Any) -> Any:
    if name == "dtype" and isinstance(value, str):
        return getattr(torch, value, None)
    return _DECAYS[str(value.get("kind"))](**dict(_given(value))) if isinstance(value, Mapping) else value


def _given(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from ((name, value) for name, value in settings.items() if name != "kind")
