"""What a saved average is made of, as far as its rule and the steps of its updates tell (averages/profile.py)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from math import fsum
from typing import Any

from ...averages.history import History
from ...averages.profile import moments, profile
from ...errors import ConfigError
from ...rules.from_settings import rule_of

_MOST_UPDATES = 1_000_000  # that are looked at: a file may claim any number


def told_by(record: Mapping[str, Any], stretches: int = 0) -> dict[str, Any]:
    """Of a manifest's record of one average: "decay", "horizon", and "profile" of so many `stretches`, if any.

    "decay" is the share that stayed at the latest update, "horizon" the effective number of updates, "profile" lists
    [first step, last step, share], earliest first. What is not known, or would take for ever, is left out.
    """
    settings, n_averaged = record.get("rule"), record.get("n_averaged")
    rule = rule_of(settings) if isinstance(settings, Mapping) else None
    if rule is None or not isinstance(n_averaged, int) or n_averaged < 1:
        return {}
    told: dict[str, Any] = {}
    try:
        history = History.from_lists(record.get("updates") or (), n_averaged)
        shares = rule.shares(moments(history))
        first = next(shares)
        told["decay"] = 1 - first
        squares = fsum(share * share for share in (first, *islice(shares, _MOST_UPDATES)))
        if next(shares, None) is None:
            told["horizon"] = 1 / squares
        if stretches and n_averaged <= _MOST_UPDATES:
            told["profile"] = [list(stretch) for stretch in profile(rule, history, "", stretches)]
    except (ArithmeticError, TypeError, ValueError, ConfigError):  # of a file that anyone might have made
        pass
    return told
