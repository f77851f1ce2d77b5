"""Methods of one object replaced: while something lasts, or for good. Picklable where the replacement is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Inside, `owner.name` is `make(owner.name)`; classes and other instances are left alone."""
    own = vars(owner)
    before = own.get(name)
    setattr(owner, name, make(getattr(owner, name)))
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def stand_in(callback: Any, trainer: Any, owner: Any, name: str, hook: Any) -> None:
    """Put a `hook(callback, trainer, original)` in place of `owner.name`, or make the one there this callback's."""
    present = vars(owner).get(name)
    if isinstance(present, hook):
        present.callback = callback
    else:
        setattr(owner, name, hook(callback, trainer, getattr(owner, name)))
