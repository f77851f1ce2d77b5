"""Several evaluations in place of one: each looks at one copy of the weights, and names its metrics after it.

    raw            the raw weights, with the user's prefix before the names of metrics
    NAME           one of several averages, with "NAME/" before them
    the average    last, under the names that the module gives; if it is one of several, under "NAME/" as well

Callbacks that act on metrics, checkpoints and early stopping, see the last pass only, and find the metrics of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from .patches import replaced
from .trainers import is_named


@dataclass(eq=False, repr=False)
class Passes:
    """Stands in place of one evaluation loop's `run`."""

    callback: Any
    trainer: Any
    original: Callable[[], Any]

    def __call__(self) -> Any:
        """Evaluate each copy, but for the sanity check; one list of metrics."""
        if self.trainer.sanity_checking:
            return self.original()
        earlier = []
        for what, prefix in self.callback.earlier_passes:
            looking = self.callback.looking_at(self.trainer, what)
            with looking, _held_back(self.trainer), _logged_as(self.trainer, [prefix]):
                earlier.append(self.original())
        with _logged_as(self.trainer, ["", *self.callback.other_prefixes]):
            last = self.original()
        for other in earlier:
            for of_last, of_other in zip(last, other, strict=True):
                of_last.update(of_other)
        return last


@contextmanager
def _held_back(trainer: Any) -> Iterator[None]:
    """Nothing acts on metrics inside."""
    kept = [c for c in trainer.callbacks if not is_named(c, "Checkpoint") and not is_named(c, "EarlyStopping")]
    callbacks, trainer.callbacks = trainer.callbacks, kept
    try:
        yield
    finally:
        trainer.callbacks = callbacks


@contextmanager
def _logged_as(trainer: Any, prefixes: Sequence[str]) -> Iterator[None]:
    """What is logged inside is logged under each of these prefixes."""
    with ExitStack() as stack:
        for owner in (trainer.lightning_module, *trainer.callbacks) if list(prefixes) != [""] else ():
            if hasattr(owner, "log"):
                stack.enter_context(replaced(owner, "log", lambda log: _PrefixedLog(log, prefixes)))
        yield


@dataclass(eq=False, repr=False)
class _PrefixedLog:
    log: Callable[..., Any]
    prefixes: Sequence[str]

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Any:
        for prefix in self.prefixes:
            self.log(prefix + name, *args, **kwargs)
