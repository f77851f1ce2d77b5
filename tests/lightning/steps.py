"""Which steps an average took in, seen from values.

A Steps callback keeps the weights after each batch that changed them, whatever Lightning counts, and `taken_in`
computes their average by the formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch

from sharded_avg.lightning import EMAWeightAveraging, WeightAveraging

from .modules import Tiny
from .reference import DECAY, NUM_STEPS, Weights, plain_average
from .runs import full_weights, module, trainer
from .watching import full_average

ENGINES = ("single", "ddp", "fsdp2", "deepspeed_2")  # one of each way to keep an average
BUFFERS = ("shift", "calls")


class Steps(lightning.Callback):
    """The full raw weights before training, and after each batch that changed some of them."""

    def __init__(self) -> None:
        self.weights: list[Weights] = []
        self.batches: list[int] = []  # which batches these were, from 1 in the first epoch
        self._num_batches = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.weights.append(full_weights(trainer))

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self._num_batches += 1
        before, now = self.weights[-1], full_weights(trainer)
        if any(not torch.equal(before[name], value) for name, value in now.items() if name not in BUFFERS):
            self.weights.append(now)
            self.batches.append(self._num_batches)


class Asked(EMAWeightAveraging):
    """Keeps the step indices that it was asked about."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.asked: list[int] = []

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        if step_idx is not None:
            self.asked.append(step_idx)
        return super().should_update(step_idx, epoch_idx)


class EachEpoch(WeightAveraging):
    """The override that Lightning's documentation shows."""

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return epoch_idx is not None


def taken_in(steps: Sequence[int], weights: Sequence[Weights], *, decay: float = DECAY) -> Weights:
    """The average of the weights after these steps, from 1; what is never averaged is that of the last."""
    average = plain_average({index: weights[step] for index, step in enumerate(steps)}, decay)
    return average | {"calls": weights[-1]["calls"]}


def live_calls(seen: dict[str, Any]) -> Weights:
    """Buffers that count batches are live, and batches may come after the last step."""
    assert seen["average"]["calls"] == NUM_STEPS
    return {"calls": seen["average"]["calls"]}


def fit_and_look(
    tmp_path: Path,
    name: str,
    kind_of_module: type[Tiny] = Tiny,
    callback: Any = None,
    module_options: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """One fit, seen from outside."""
    callback, steps = callback or Asked(decay=DECAY), Steps()
    fitted = trainer(tmp_path, name, [steps, callback], **settings)
    fitted.fit(module(name, kind_of_module, **(module_options or {})))
    return {
        "counts": (callback.average.n_averaged, callback.average.num_steps),
        "asked": getattr(callback, "asked", None),
        "average": full_average(callback),
        "weights": steps.weights,
        "batches": steps.batches,
    }
