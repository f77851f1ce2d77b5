"""Numbers that rules, decays and schedules are given, checked."""

from __future__ import annotations

from math import isfinite

from ..errors import ConfigError


def number(
    where: str,
    value: object,
    *,
    least: float = float("-inf"),
    most: float = float("inf"),
    above: float = float("-inf"),
    below: float = float("inf"),
    for_example: object = None,
) -> None:
    """Raise `ConfigError` unless `value` is a finite number in [least, most] and strictly between `above` and `below`.

    `where` says what was typed, up to the value: "EMA(decay", for one.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and isfinite(value) and least <= value <= most and above < value < below:  # type: ignore[arg-type, operator]
        return
    low = f"({above:g}" if above > float("-inf") else f"[{least:g}" if least > float("-inf") else "(-inf"
    high = f"{below:g})" if below < float("inf") else f"{most:g}]" if most < float("inf") else "inf)"
    example = "" if for_example is None else f", for example {for_example}"
    raise ConfigError(f"{where}={value!r}): must be a number in {low}, {high}{example}")


def whole(where: str, value: object, *, least: int) -> None:
    """Raise `ConfigError` unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{where}={value!r}): must be an integer >= {least}")
