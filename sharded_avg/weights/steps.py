"""When weights change: whenever an optimizer made a step.

An optimizer of torch tells itself, by a hook after `step()`: it is not called for a micro-batch, and a gradient scaler
that finds an infinity does not call it either. A fused one is called all the same and told so, in `found_inf`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch.optim import Optimizer

from ..errors import ConfigError


class StepCount:
    """Whether some of these optimizers made a step since the last one that counted; several steps count as one."""

    def __init__(self, optimizers: Iterable[Any] = (), made: int = 0) -> None:
        """`made`: steps from before this moment that have not counted yet."""
        self._made, self._counted = made, 0
        self._hooks: list[weakref.finalize[Any, Any]] = []
        self._watched: weakref.WeakSet[Any] = weakref.WeakSet()
        for optimizer in optimizers:
            self.watch(optimizer)

    def watch(self, optimizer: Any) -> None:
        """Count the steps of one more; the hook goes when this object does. Watching twice is watching once."""
        if optimizer in self._watched:
            return
        hook = optimizer.register_step_post_hook(partial(_note, weakref.ref(self)))
        self._hooks.append(weakref.finalize(self, hook.remove))
        self._watched.add(optimizer)

    def close(self) -> None:
        """Leave the optimizers as they were."""
        for hook in self._hooks:
            hook()

    @property
    def is_new(self) -> bool:
        """Whether there was a step since `count`."""
        return self._made != self._counted

    def count(self) -> None:
        """The steps so far are counted: until the next one, there is none."""
        self._counted = self._made


def _note(count: weakref.ref[StepCount], optimizer: Any, *step: Any) -> None:
    living = count()
    found_inf = getattr(optimizer, "found_inf", None)  # a scalar on the device: reading it waits for the step
    if living is not None and (found_inf is None or not bool(found_inf)):
        living._made += 1


def stepping(optimizer: Any) -> Optimizer:
    """The optimizer of torch inside what Accelerate, Fabric or Lightning wraps around it.

    Raises `ConfigError` for what is no optimizer.
    """
    inner = optimizer
    while isinstance(wrapped := getattr(inner, "optimizer", None), Optimizer):
        inner = wrapped
    if not isinstance(inner, Optimizer):
        raise ConfigError(
            f"attach() got {type(optimizer).__name__}: pass the torch.optim.Optimizer, or several of them, whose steps "
            "change the averaged weights"
        )
    return inner
