"""A second evaluation: first the raw weights, with a prefix before the names of metrics, then the average.

Callbacks that act on metrics, checkpoints and early stopping, see the second pass only, and find the metrics of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from .patches import replaced
from .trainers import is_named


class BothPasses:
    """Stands in place of one evaluation loop's `run`."""

    def __init__(self, callback: Any, trainer: Any, original: Callable[[], Any]) -> None:
        self._callback, self._trainer, self._original = callback, trainer, original

    def __call__(self) -> Any:
        """Evaluate twice, but for the sanity check; one list of metrics."""
        if self._trainer.sanity_checking:
            return self._original()
        with self._callback.raw_pass(self._trainer), _prefixed(self._trainer, self._callback.raw_prefix):
            raw = self._original()
        averaged = self._original()
        for of_average, of_raw in zip(averaged, raw, strict=True):
            of_average.update(of_raw)
        return averaged


@contextmanager
def _prefixed(trainer: Any, prefix: str) -> Iterator[None]:
    kept = [c for c in trainer.callbacks if not is_named(c, "Checkpoint") and not is_named(c, "EarlyStopping")]
    with ExitStack() as stack:
        for owner in (trainer.lightning_module, *kept):
            if hasattr(owner, "log"):
                stack.enter_context(replaced(owner, "log", lambda log: _PrefixedLog(log, prefix)))
        callbacks, trainer.callbacks = trainer.callbacks, kept
        stack.callback(setattr, trainer, "callbacks", callbacks)
        yield


class _PrefixedLog:
    def __init__(self, log: Callable[..., Any], prefix: str) -> None:
        self._log, self._prefix = log, prefix

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return self._log(self._prefix + name, *args, **kwargs)
