"""What a callback is given, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import SWA, AbstractRule, ConfigError, CustomRule, Snapshots
from ..integration import AverageDtype, AvgFn, MultiAvgFn, as_dtype, as_rules

_EVALUATIONS = ("average", "raw", "both", "all")


class Included:
    """The user's choice, or what requires grad; and whatever a loaded average has."""

    def __init__(self, include: Callable[[str, Tensor], bool] | None, saved: frozenset[str]) -> None:
        self._include, self._saved = include, saved

    def __call__(self, name: str, tensor: Tensor) -> bool:
        chosen = tensor.requires_grad if self._include is None else self._include(name, tensor)
        return name in self._saved or bool(chosen)


def rules_of(
    rule: AbstractRule | Mapping[str, AbstractRule] | None, avg_fn: AvgFn | None, multi_avg_fn: MultiAvgFn | None
) -> dict[str, AbstractRule]:
    """The rules that the arguments mean, by name; the equal-weight mean if there are none."""
    given = {"rule": rule, "avg_fn": avg_fn, "multi_avg_fn": multi_avg_fn}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(chosen)} were given: each says how to average, so give one of them")
    if rule is None:
        return as_rules(CustomRule(avg_fn=avg_fn, multi_avg_fn=multi_avg_fn) if chosen else SWA())
    if not isinstance(rule, (AbstractRule, Mapping)):
        raise ConfigError(f"rule={rule!r}: give a rule such as EMA(decay=0.999), or a function as avg_fn")
    rules = as_rules(rule)
    for name in rules:
        if name == "raw" or (name == "average" and len(rules) > 1):
            raise ConfigError(f"rule={{{name!r}: ...}}: {name!r} is a word of evaluate_with and end_with; take another")
    return rules


def main_of(end_with: str, rules: Mapping[str, AbstractRule]) -> str:
    """The average that is meant where one only can be."""
    if end_with in rules or end_with in ("average", "raw"):
        return end_with if end_with in rules else next(iter(rules))
    words = ["average", "raw", *(name for name in rules if name != "average")]
    raise ConfigError(f"end_with={end_with!r}: must be one of {', '.join(map(repr, words))}")


def evaluation(evaluate_with: str) -> str:
    """What an evaluation looks at."""
    if evaluate_with not in _EVALUATIONS:
        raise ConfigError(f"evaluate_with={evaluate_with!r}: must be one of {', '.join(map(repr, _EVALUATIONS))}")
    return evaluate_with


def snapshots_of(settings: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The arguments of `Snapshots`, without the average."""
    if settings is None:
        return None
    try:
        found = dict(settings)
        if isinstance(dtype := found.get("dtype"), str):
            found["dtype"] = dtype_of(dtype)
        Snapshots(None, **found)  # type: ignore[arg-type]  # looks at the settings only
    except TypeError as error:
        raise ConfigError(
            f"snapshots={settings!r}: give the arguments of sharded_avg.Snapshots but for the average, for example "
            f'{{"folder": "run/snapshots", "every_steps": 1000, "keep_last": 5}} ({error})'
        ) from error
    return found


def dtype_of(dtype: torch.dtype | str | None) -> AverageDtype:
    """A dtype by its name, "float64" or "torch.float64", as a YAML file has it; the rest as it is, checked."""
    if isinstance(dtype, str) and dtype != "auto":
        found = getattr(torch, dtype.removeprefix("torch."), None)
        return as_dtype(found if isinstance(found, torch.dtype) else dtype)  # type: ignore[arg-type]
    return as_dtype(dtype)  # type: ignore[arg-type]


def count(name: str, value: int | None) -> int | None:
    """A number of things, or `None`."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise ConfigError(f"{name}={value!r}: must be an integer >= 0, or None")
    return value
