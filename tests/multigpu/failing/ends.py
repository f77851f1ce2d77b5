"""How one call ended on every rank, of which one was made to fail, and what is to be said of that.

End      of one call on one rank: what it raised or returned, when, and what is not as it was before
ended    runs a call, collectively, and tells all ranks the Ends of all
Outcome  a verdict on the Ends of one call, in one word

    right        all raised within seconds, the failed rank its own error and the others one of the package's; all is as
                 it was before, and the same call made rightly succeeds then
    said         as right, but something is left undone, and the others' errors have the words that say so
    late         the others had no part in it any more: they returned, and so they should
    hung         some rank took longer than SOON_S, or for ever
    silent       no rank raised
    alone        some raised, and others returned
    wrong error  a rank raised something that is not its own, nor the package's
    changed      something is not as it was before, and nothing says so
    no retry     the same call, made rightly, fails afterwards
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch.distributed as dist

from .calls import Call, Request, Subject

SOON_S = 10.0  # on a machine that others load, too; it takes milliseconds. To hang is minutes
FINE = ("right", "said", "late")
HARM = ("hung", "silent", "alone", "changed", "wrong error", "no retry")


@dataclass(frozen=True)
class End:
    """Of one call on one rank."""

    at: float
    error: str = ""  # the class that was raised
    classes: tuple[str, ...] = ()  # it, and its bases
    text: str = ""
    returned: str = ""
    changed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """Of one call that was made to fail on one rank. `took_s`: until the last rank had its error."""

    call: str
    way: str  # in which it failed, and where
    fails: int  # the rank
    verdict: str
    took_s: float = 0.0
    told: str = ""  # how each rank ended


@dataclass(frozen=True)
class Expected:
    """Of one way to fail. `own`: what the failed rank raises; "" if any error will do.

    `said`: a part of the words of the others' errors where something is left undone, and "" where nothing may be.
    """

    own: str = ""
    said: str = ""
    may_be_late: bool = False
    may_change_it: bool = False  # what went wrong is itself a change, on the rank that fails


def judged(ends: list[End], fails: int, took_s: float, expected: Expected) -> str:
    """The verdict, but for the retry."""
    others = [end for rank, end in enumerate(ends) if rank != fails]
    mine = ends[fails]
    if took_s >= SOON_S:
        return "hung"
    if expected.may_be_late and mine.error in (expected.own, "") and not any(end.error for end in others):
        return "late"
    if not any(end.error for end in ends):
        return "silent"
    if not all(end.error for end in ends):
        return "alone"
    # What goes wrong while writing is told by all ranks alike, with its cause.
    is_own = expected.own in ("", mine.error) or ("ShardedAvgError" in mine.classes and expected.own in mine.text)
    if not is_own or not all("ShardedAvgError" in end.classes for end in others):
        return "wrong error"
    if not any(end.changed for end in (others if expected.may_change_it else ends)):
        return "right"
    return "said" if expected.said and any(expected.said in end.text for end in others) else "changed"


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


def once_more(outcome: Outcome, subject: Subject, call: Call, request: Request, kept: Any) -> Outcome:
    """Collective. The same call, made rightly after one that failed as it should; all is put back then."""
    if outcome.verdict not in FINE:
        return outcome
    again = ended(subject, kept, call.run, call.request(subject) if "save" in outcome.call else request)
    subject.put_back(kept)
    if any(end.error for end in again):
        outcome = replace(outcome, verdict="no retry", told=f"{outcome.told}\nonce more:\n{told(again)}")
    return outcome


def require_fine(outcomes: Sequence[Outcome]) -> None:
    """Fail with all that are not."""
    bad = [outcome for outcome in outcomes if outcome.verdict not in FINE]
    shown = [f"{bad.call}, {bad.way}, on rank {bad.fails}: {bad.verdict}\n{bad.told}" for bad in bad]
    assert not bad, f"{len(bad)} of {len(outcomes)}:\n" + "\n\n".join(shown)


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
