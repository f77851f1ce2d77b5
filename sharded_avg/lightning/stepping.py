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

from ..integration import StepCount, steps_taken
from .trainers import is_named


class StepWatch:
    """Watches the optimizers of one trainer; several steps between two looks, of one or several, count as one."""

    def __init__(self, trainer: Any, optimizers: Sequence[Any]) -> None:
        watched = [optimizer for optimizer in optimizers if isinstance(optimizer, Optimizer)]
        self._steps = StepCount(watched)
        self._trainer = trainer
        self._by_count = len(watched) < len(optimizers) or not optimizers
        self._seen_steps = self._count()

    def _count(self) -> int:
        if is_named(self._trainer.strategy, "DeepSpeedStrategy"):
            return steps_taken(self._trainer.strategy.model)
        return int(self._trainer.global_step)

    def stepped(self) -> bool:
        """Whether there was a step since the last call."""
        steps = self._count()
        stepped = self._steps.is_new or (self._by_count and steps > self._seen_steps)
        self._steps.count()
        self._seen_steps = steps
        return stepped

    def close(self) -> None:
        """Leave the optimizers as they were."""
        self._steps.close()
