"""What a callback is given, checked."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import SWA, AbstractRule, ConfigError, CustomRule
from ..integration import AverageDtype, AvgFn, MultiAvgFn, as_dtype

_SETTINGS = {"evaluate_with": ("average", "raw", "both"), "end_with": ("average", "raw")}


class Included:
    """The user's choice, or what requires grad; and whatever a loaded average has."""

    def __init__(self, include: Callable[[str, Tensor], bool] | None, saved: frozenset[str]) -> None:
        self._include, self._saved = include, saved

    def __call__(self, name: str, tensor: Tensor) -> bool:
        chosen = tensor.requires_grad if self._include is None else self._include(name, tensor)
        return name in self._saved or bool(chosen)


def one_rule(rule: AbstractRule | None, avg_fn: AvgFn | None, multi_avg_fn: MultiAvgFn | None) -> AbstractRule:
    """The rule that the arguments mean; the equal-weight mean if there are none."""
    given = {"rule": rule, "avg_fn": avg_fn, "multi_avg_fn": multi_avg_fn}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(chosen)} were given: each says how to average, so give one of them")
    if rule is not None and not isinstance(rule, AbstractRule):
        raise ConfigError(f"rule={rule!r}: give a rule such as EMA(decay=0.999), or a function as avg_fn")
    if rule is not None:
        return rule
    return CustomRule(avg_fn=avg_fn, multi_avg_fn=multi_avg_fn) if chosen else SWA()


def dtype_of(dtype: torch.dtype | str | None) -> AverageDtype:
    """A dtype by its name, "float64" or "torch.float64", as a YAML file has it; the rest as it is, checked."""
    if isinstance(dtype, str) and dtype != "auto":
        found = getattr(torch, dtype.removeprefix("torch."), None)
        return as_dtype(found if isinstance(found, torch.dtype) else dtype)  # type: ignore[arg-type]
    return as_dtype(dtype)  # type: ignore[arg-type]


def one_of(name: str, value: str) -> str:
    """The value of a setting that has a list of them."""
    if value not in _SETTINGS[name]:
        raise ConfigError(f"{name}={value!r}: must be one of {', '.join(map(repr, _SETTINGS[name]))}")
    return value


def count(name: str, value: int | None) -> int | None:
    """A number of things, or `None`."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise ConfigError(f"{name}={value!r}: must be an integer >= 0, or None")
    return value
