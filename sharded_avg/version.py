"""The package's version, and the versions of others that it works with: one list, which errors and `doctor` quote.

CHANGELOG.md is checked against `__version__`; pyproject.toml, constraints.txt and the README against WORKS_WITH.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

from .errors import EngineVersionError

__version__ = "0.1.0"


class Span(NamedTuple):
    """The oldest release that is asked for, and the newest that the tests were run with; a newer one may work."""

    oldest: str
    newest: str


WORKS_WITH = {
    "torch": Span("2.8", "2.15.0"),
    "lightning": Span("2.6", "2.6.6"),
    "deepspeed": Span("0.16.9", "0.19.8"),
}


def requirement(package: str) -> str:
    """What to ask an installer for, as an error quotes it: `lightning>=2.6,<=2.6.6`."""
    oldest, newest = WORKS_WITH[package]
    return f"{package}>={oldest},<={newest}"


def is_too_old(package: str, version: str) -> bool:
    """Whether `version` comes before the oldest that this package works with; local parts (`+cpu`) do not count."""
    return _release(version) < _release(WORKS_WITH[package].oldest)


def require(package: str, version: str) -> None:
    """Raise `EngineVersionError` if `version` is too old, before something that it lacks is missed."""
    if is_too_old(package, version):
        raise EngineVersionError(
            f"{package} {version} is older than what sharded_avg {__version__} works with; "
            f"pip install '{requirement(package)}'"
        )


def _release(version: str) -> tuple[int, ...]:
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


require("torch", torch.__version__)
