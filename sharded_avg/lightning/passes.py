"""A second evaluation: first the raw weights, with a prefix before the names of metrics, then the average.

Callbacks that act on metrics, checkpoints and early stopping, see the second pass only, and find the metrics of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from .patches import replaced
from .trainers import is_named


@dataclass(eq=False, repr=False)
class BothPasses:
    """Stands in place of one evaluation loop's `run`."""

    callback: Any
    trainer: Any
    original: Callable[[], Any]

    def __call__(self) -> Any:
        """Evaluate twice, but for the sanity check; one list of metrics."""
        if self.trainer.sanity_checking:
            return self.original()
        with self.callback.raw_pass(self.trainer), _prefixed(self.trainer, self.callback.raw_prefix):
            raw = self.original()
        averaged = self.original()
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


@dataclass(eq=False, repr=False)
class _PrefixedLog:
    log: Callable[..., Any]
    prefix: str

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return self.log(self.prefix + name, *args, **kwargs)
