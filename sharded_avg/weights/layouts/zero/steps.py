"""When the weights of an engine change: whenever the optimizer that DeepSpeed wraps makes a step.

`engine.was_step_applied()` says how the last `engine.step()` went, and goes on saying it until the next; Lightning
Fabric steps DeepSpeed's optimizer itself, behind the engine's back, and then the engine says that nothing happened. The
optimizer that is wrapped knows: it is not called for a micro-batch, nor after an overflow.
"""

from __future__ import annotations

from typing import Any

from ...steps import StepCount
from .engine import kind, need, never_steps


def steps_of(engine: Any) -> StepCount:
    """The steps of an engine; an average that is built after one may take that in."""
    # Calls of the wrapped optimizer, one or several a step.
    count = StepCount(made=int(need(engine, "was_step_applied")()))
    if never_steps(engine):
        return count
    outer = engine.optimizer
    inner = need(outer, "optimizer") if kind(outer) else outer
    # `backup_optimizer` steps what a partly offloaded stage 3 keeps on the GPU.
    for optimizer in filter(None, (inner, getattr(outer, "backup_optimizer", None))):
        need(optimizer, "register_step_post_hook")
        count.watch(optimizer)
    return count
