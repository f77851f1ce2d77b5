"""How one call ended on every rank, of which one may have failed, and what may be expected of that.

End      of one call on one rank: what it raised or returned, when, and what is not as it was before
ended    runs a call, collectively, and tells all ranks the Ends of all
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from .calls import Request, Subject

SOON_S = 10.0  # on a machine that others load, too; it takes milliseconds. To hang is minutes


@dataclass(frozen=True)
class End:
    """Of one call on one rank."""

    at: float
    error: str = ""  # the class that was raised
    classes: tuple[str, ...] = ()  # it, and its bases
    text: str = ""
    returned: str = ""
    changed: list[str] = field(default_factory=list)


def ended(
    subject: Subject,
    kept: Any,
    run: Callable[[Request], Any],
    request: Request,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[End]:
    """Collective. One call, and how it ended on every rank; `around` is entered on this rank for the call alone."""
    error, value = None, None
    try:
        with around():
            value = run(request)
    except BaseException as failure:
        error = failure
    at = time.monotonic()
    if error is None:
        end = End(at, returned=repr(value))
    else:
        classes = tuple(kind.__name__ for kind in type(error).__mro__)
        end = End(at, classes[0], classes, "".join(traceback.format_exception(error)))
        error = None
    ends: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ends, (end, subject.changed_since(kept)))
    return [End(**{**vars(one), "changed": changed}) for one, changed in ends]


def told(ends: list[End]) -> str:
    """For a failed assertion."""
    lines = []
    for rank, end in enumerate(ends):
        lines.append(f"rank {rank}: {_last_frames(end.text) or 'returned ' + end.returned}")
        if end.changed:
            lines.append(f"  CHANGED: {end.changed}")
    return "\n".join(lines)


def _last_frames(text: str) -> str:
    lines = text.splitlines()
    return "\n".join(["...", *lines[-12:]] if len(lines) > 12 else lines)
