"""Finding: one thing that was looked at."""

from __future__ import annotations

from dataclasses import dataclass

OK, ABSENT, FAILS = "ok", "absent", "fails"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `advice` says what to do, "" where nothing need be done."""

    about: str
    state: str  # OK, ABSENT or FAILS
    found: str
    advice: str = ""
