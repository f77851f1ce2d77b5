"""When the weights of an engine change: whenever the optimizer that DeepSpeed wraps makes a step.

`engine.was_step_applied()` says how the last `engine.step()` went, and goes on saying it until the next; Lightning
Fabric steps DeepSpeed's optimizer itself, behind the engine's back, and then the engine says that nothing happened. The
optimizer that is wrapped knows: it is not called for a micro-batch, nor after an overflow.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

from .engine import kind, need, never_steps


class Steps:
    """Whether there was a step since the last one that counted."""

    def __init__(self, engine: Any) -> None:
        self._counted = 0
        # Calls of the wrapped optimizer, one or several a step. An average that is built after a step may take it in.
        self._made = int(need(engine, "was_step_applied")())
        if never_steps(engine):
            return
        outer = engine.optimizer
        inner = need(outer, "optimizer") if kind(outer) else outer
        # `backup_optimizer` steps what a partly offloaded stage 3 keeps on the GPU.
        for optimizer in filter(None, (inner, getattr(outer, "backup_optimizer", None))):
            hook = need(optimizer, "register_step_post_hook")(partial(_note, weakref.ref(self)))
            weakref.finalize(self, hook.remove)

    @property
    def is_new(self) -> bool:
        return self._made != self._counted

    def count(self) -> None:
        """The step is counted: until the next one, there is none."""
        self._counted = self._made


def _note(steps: weakref.ref[Steps], *step: Any) -> None:
    if (living := steps()) is not None:
        living._made += 1
