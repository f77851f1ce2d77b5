"""What holds under every strategy: the average is that of the plain formula, bit for bit, wherever it lives and whatever happens."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from torch import Tensor

from sharded_avg.lightning import EMAWeightAveraging

from .modules import NUM_BATCHES, Tiny
from .runs import full_weights, module, run, trainer
from .strategies import STRATEGIES
from .test_harness import NUM_STEPS, assert_same, over, plain_loss, plain_training

DECAY = 0.75


def plain_average(weights: dict[int, dict[str, Tensor]], decay: float = DECAY) -> dict[str, Tensor]:
    """The average of the weights after each step, floating-point buffers included, by the formula."""
    first, *others = [weights[step] for step in sorted(weights)]
    average = {name: value.clone() for name, value in first.items()}
    for live in others:
        for name, value in live.items():
            if value.is_floating_point():
                average[name].lerp_(value, 1 - decay)
            else:
                average[name] = value.clone()
    return average


def with_weights(weights: dict[str, Tensor]) -> Tiny:
    model = Tiny()
    model.load_state_dict(weights)
    return model


class Seen(lightning.Callback):
    """What other callbacks, and the user, see of the model on the way."""

    def __init__(self) -> None:
        self.in_validation: list[dict[str, Tensor]] = []
        self.after_validation: list[dict[str, Tensor]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.after_validation.append(full_weights(trainer))


def full_average(callback: Any) -> dict[str, Tensor]:
    with callback.average.summon_full_params(rank0_only=False) as full:
        return {name: value.clone() for name, value in full.items()}


def fit_averaged(tmp_path: Path, name: str) -> dict[str, Any]:
    callback, seen = EMAWeightAveraging(decay=DECAY), Seen()
    fitted = trainer(tmp_path, name, [callback, seen])
    assert callback.average is None
    fitted.fit(module(name))
    return {
        "raw": seen.after_validation,
        "average": full_average(callback),
        "end": {key: value for key, value in full_weights(fitted).items()},
        "val_loss": float(fitted.callback_metrics["val_loss"]),
        "n_averaged": callback.average.n_averaged,
    }


@over(lambda row: row.where != "fresh")
def test_average(name: str, tmp_path: Path) -> None:
    _, weights = plain_training(NUM_STEPS)
    exact = STRATEGIES[name].exact
    expected = plain_average(weights)
    for seen in run(name, fit_averaged, tmp_path, name=name):
        assert seen["n_averaged"] == NUM_STEPS
        assert_same(seen["raw"][0], weights[NUM_BATCHES], exact=exact)
        assert_same(seen["raw"][1], weights[NUM_STEPS], exact=exact)
        assert_same(seen["average"], expected, exact=exact)
        assert_same(seen["end"], expected, exact=exact)
        assert seen["val_loss"] == pytest.approx(plain_loss(with_weights(expected), first=100), rel=1e-6)


class SaveDuring(lightning.Callback):
    def __init__(self, path: Path, hook: str) -> None:
        self.path, self.hook = path, hook
        setattr(self, hook, self._save)

    def _save(self, trainer: Any, *args: Any) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)


def fit_in_two(tmp_path: Path, name: str, hook: str, first: bool) -> dict[str, Any]:
    path = tmp_path / f"{hook}-{first}.ckpt"
    callback, saver = EMAWeightAveraging(decay=DECAY), SaveDuring(path, hook)
    callbacks = [callback, saver] if first else [saver, callback]
    trainer(tmp_path, name, callbacks, max_epochs=1).fit(module(name))
    assert path.exists()
    callback = EMAWeightAveraging(decay=DECAY)
    resumed = trainer(tmp_path, name, [callback], max_epochs=2)
    resumed.fit(module(name), ckpt_path=path)
    return {"average": full_average(callback), "n_averaged": callback.average.n_averaged, "step": resumed.global_step}


HOOKS = ("on_validation_end", "on_train_epoch_end", "on_train_end", "on_validation_epoch_end")


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("hook", HOOKS)
@over(lambda row: row.where != "fresh")
def test_resume(name: str, hook: str, first: bool, tmp_path: Path) -> None:
    _, weights = plain_training(NUM_STEPS)
    expected = plain_average(weights)
    for seen in run(name, fit_in_two, tmp_path, name=name, hook=hook, first=first):
        assert seen["step"] == NUM_STEPS
        assert seen["n_averaged"] == NUM_STEPS
        assert_same(seen["average"], expected, exact=STRATEGIES[name].exact)
