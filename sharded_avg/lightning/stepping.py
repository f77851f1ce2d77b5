"""Whether an optimizer stepped since the last look.

Lightning counts calls of `optimizer.step`; a gradient scaler that finds an infinity makes the call and no step. So the
optimizers themselves tell. Those of DeepSpeed cannot (they are none of torch's): there the engine counts, which
accumulates gradients across the ends of epochs where Lightning's count begins anew, and says whether it skipped the
step, which `ShardedAverage.update` asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from ..integration import steps_taken
from .trainers import is_named


class StepWatch:
    """Watches the optimizers of one trainer; several steps between two looks, of one or several, count as one."""

    def __init__(self, trainer: Any, optimizers: Sequence[Any]) -> None:
        watched = [optimizer for optimizer in optimizers if isinstance(optimizer, Optimizer)]
        self._handles = [optimizer.register_step_post_hook(self._after_step) for optimizer in watched]
        self._trainer = trainer
        self._by_count = len(watched) < len(optimizers) or not optimizers
        self._seen_steps = self._count()
        self._stepped = False

    def _count(self) -> int:
        if is_named(self._trainer.strategy, "DeepSpeedStrategy"):
            return steps_taken(self._trainer.strategy.model)
        return int(self._trainer.global_step)

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        # A fused optimizer is called all the same, and told that its gradients are infinite: a scalar on the device.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not bool(found_inf):
            self._stepped = True

    def stepped(self) -> bool:
        """Whether there was a step since the last call."""
        steps = self._count()
        stepped = self._stepped or (self._by_count and steps > self._seen_steps)
        self._stepped, self._seen_steps = False, steps
        return stepped

    def close(self) -> None:
        """Leave the optimizers as they were."""
        for handle in self._handles:
            handle.remove()
