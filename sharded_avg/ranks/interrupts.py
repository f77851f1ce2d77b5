"""Ctrl-C while ranks talk to each other.

Python raises KeyboardInterrupt between any two lines, and so between an agreement and what was agreed on: the other
ranks would wait for this one. So inside of a collective method SIGINT is only noted. It is raised where all ranks learn
of it: at the beginning of the next local part, or while ranks are waited for. A second one is raised at once, for a
person who has no patience left. Only Python's main thread gets signals; elsewhere nothing is done here.

    uninterrupted    the whole of a collective method, but for local parts and the user's own code
    interruptible    those, inside of it: SIGINT does what it did before
"""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_before: Any = None  # the handler that is put back; `None` while nothing is held
_noted: int | None = None  # the signal that came meanwhile
_late: BaseException | None = None  # an error that came when the ranks had just agreed that there was none


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside, SIGINT is noted; what was noted and not raised since is raised at the end, also after an error."""
    if _before is not None or not _hold():
        yield
        return
    try:
        yield
    except KeyboardInterrupt:
        _let_go()
        _forget()  # the first one, which this one came after: nobody waits for another
        raise
    except BaseException:
        raise_noted(_let_go())  # whose context is the error
        raise
    raise_noted(_let_go())


def collective(function: Callable[P, R]) -> Callable[P, R]:
    """A function that all ranks call, or none: uninterrupted. tests/unit/test_architecture.py asks for it."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        with uninterrupted():
            return function(*args, **kwargs)

    called.is_collective = True  # type: ignore[attr-defined]
    return called


@contextmanager
def interruptible() -> Iterator[None]:
    """For what is local, or the user's: SIGINT is raised in here, and so is one that was noted."""
    if _before is None or not _in_main_thread():
        yield
        return
    handler = _let_go()
    try:
        raise_noted(handler)
        yield
    finally:
        _hold()


def note(error: BaseException) -> None:
    """Raise `error` in the next local part: it came too late for the ranks' last agreement."""
    global _late
    _late = _late or error


def raise_noted(handler: Any) -> None:
    """Raise what was noted, if anything."""
    number, error = _forget()
    if error is not None:
        raise error
    if number is not None:
        if callable(handler):
            handler(number, None)
        else:
            raise KeyboardInterrupt


def _forget() -> tuple[int | None, BaseException | None]:
    """Nothing is noted any more; what was."""
    global _noted, _late
    noted = (_noted, _late)
    _noted = _late = None
    return noted


def take_noted() -> BaseException | None:
    """What was noted, as an error, for a rank that waits for others."""
    try:
        raise_noted(_before)
    except BaseException as error:
        return error
    return None


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _hold() -> bool:
    """Note SIGINT from now on, unless it is ignored, or not Python's to handle."""
    global _before
    handler = signal.getsignal(signal.SIGINT)
    if not _in_main_thread() or not callable(handler):
        return False
    _before = handler
    signal.signal(signal.SIGINT, _note_signal)
    return True


def _let_go() -> Any:
    """What handles SIGINT from now on: what did before, or what somebody has put there meanwhile."""
    global _before
    handler, _before = _before, None
    if _in_main_thread() and signal.getsignal(signal.SIGINT) is _note_signal:
        signal.signal(signal.SIGINT, handler)
    return handler


def _note_signal(number: int, frame: Any) -> None:
    global _noted
    if _noted is None or _before is None:
        _noted = number
    else:
        _before(number, frame)
