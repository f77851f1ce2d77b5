"""What tests look at while a Trainer runs, and do to it.

At         a callback that does something at one moment of every epoch; SaveAtEnd saves at the last one
Looks      a callback that keeps the raw weights and the metrics after every validation
Seen       two fits of one module by one Trainer
averaging  our callback, with the decay of plain_average; full_average and counts are what it holds
said       our warnings in a block; stopping: how Lightning leaves one after an error
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from torch import Tensor

from sharded_avg.lightning import EMAWeightAveraging

from .reference import DECAY, Weights
from .runs import Recorder, full_weights, module, trainer


def full_average(callback: Any) -> dict[str, Tensor]:
    with callback.average.summon_full_params(rank0_only=False) as full:
        return {name: value.clone() for name, value in full.items()}


def counts(callback: Any) -> tuple[int, int]:
    return callback.average.n_averaged, callback.average.num_steps


class At(lightning.Callback):
    """Does something at one moment of every epoch of a fit."""

    def __init__(self, moment: str, act: Any) -> None:
        setattr(self, moment, lambda trainer, *_: None if trainer.sanity_checking else act(trainer))


class SaveAtEnd(lightning.Callback):
    """A checkpoint of the end of training, made by the ranks that train."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint(self.path)


class Looks(lightning.Callback):
    """Metrics and raw weights after each validation."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.weights: list[Weights] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
            self.weights.append(full_weights(trainer))


class Seen:
    """What two fits of one module by one trainer did."""

    def __init__(self, tmp_path: Path, name: str) -> None:
        self.callback, self.recorder = EMAWeightAveraging(decay=DECAY), Recorder()
        self.began: list[dict[str, Tensor]] = []
        look = At("on_train_start", lambda t: self.began.append(full_weights(t)))
        self.trainer = trainer(tmp_path, name, [self.callback, look, self.recorder], max_epochs=1)
        self.module = module(name)

    def fit(self, max_epochs: int, **arguments: Any) -> None:
        self.trainer.fit_loop.max_epochs = max_epochs
        self.trainer.fit(self.module, **arguments)


@contextmanager
def stopping(error: type[BaseException]) -> Iterator[None]:
    """Lightning exits after Ctrl-C, and listens to no further one."""
    listening = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
            yield
    finally:
        signal.signal(signal.SIGINT, listening)


def averaging(**settings: Any) -> EMAWeightAveraging:
    return EMAWeightAveraging(decay=DECAY, **settings)


@contextmanager
def said(*messages: str) -> Iterator[None]:
    """Our warnings inside are these, in this order."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    ours = [str(warning.message) for warning in caught if "sharded_avg" in str(warning.message)]
    assert len(ours) == len(messages), ours
    for text, message in zip(ours, messages, strict=True):
        assert message in text


def other_weights(model: Any, value: float = 7.0) -> None:
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(value)
