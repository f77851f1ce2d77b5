"""Whose weights: what belongs to another module, or came from elsewhere, is not mixed into an average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder

from .modules import NUM_BATCHES, Tunable
from .reference import NUM_STEPS, assert_same, average_after, plain_average, plain_loss, raw_after, with_weights
from .runs import Recorder, module, trainer
from .watching import At, Seen, averaging, counts, full_average, other_weights, said


@pytest.mark.own_processes
def test_another_module_is_saved_without_an_average(tmp_path: Path) -> None:
    """One trainer trains a module and tests another: a save then is of the other one, which has no average."""
    ours, trained, other = averaging(), module("single"), module("single")
    fitted = trainer(tmp_path, "single", [ours], max_epochs=1)
    fitted.fit(trained)
    other_weights(other)
    expected = plain_loss(other, first=200)
    (tested,) = fitted.test(other, verbose=False)
    assert tested["test_loss"] == pytest.approx(expected, rel=1e-6)
    fitted.save_checkpoint(tmp_path / "other.ckpt")
    saved = torch.load(tmp_path / "other.ckpt", weights_only=True)
    assert "current_model_state" not in saved
    assert_same(saved["state_dict"], dict(other.state_dict()))
    assert_same(dict(trained.state_dict()), average_after(NUM_BATCHES))


@pytest.mark.own_processes
def test_one_callback_of_two_trainers(tmp_path: Path) -> None:
    """The average went on to the second module. A save of the first trainer is of the weights that the first holds."""
    ours, models = averaging(), [module("single"), module("single")]
    other_weights(models[1], 0.25)
    fitted = [trainer(tmp_path, "single", [ours], max_epochs=1) for _ in models]
    for one, model in zip(fitted, models, strict=True):
        one.fit(model)
    fitted[0].save_checkpoint(tmp_path / "first.ckpt")
    saved = torch.load(tmp_path / "first.ckpt", weights_only=True)
    assert_same(saved["state_dict"], average_after(NUM_BATCHES))
    assert "current_model_state" not in saved
    fitted[1].save_checkpoint(tmp_path / "second.ckpt")
    saved = torch.load(tmp_path / "second.ckpt", weights_only=True)
    assert_same(saved["state_dict"], full_average(ours))
    assert not torch.equal(saved["current_model_state"]["head.bias"], saved["state_dict"]["head.bias"])


@pytest.mark.own_processes
def test_a_learning_rate_search_of_the_next_module(tmp_path: Path) -> None:
    """What it saves and brings back before the second module trains has nothing of the first one's average."""
    ours, recorder = averaging(), Recorder()
    trainer(tmp_path, "single", [ours], max_epochs=1).fit(module("single", Tunable))
    model = module("single", Tunable)
    other_weights(model, 0.25)
    finder = LearningRateFinder(num_training_steps=3, early_stop_threshold=None, update_attr=False)
    trainer(tmp_path, "single", [finder, ours, recorder], max_epochs=1).fit(model)
    assert counts(ours) == (NUM_BATCHES, NUM_BATCHES)
    assert_same(full_average(ours), plain_average(recorder.weights))


@pytest.mark.own_processes
def test_a_test_of_another_module_between_two_fits(tmp_path: Path) -> None:
    """From a file, with the same trainer: the module that was trained goes on as if there had been no test."""
    seen = Seen(tmp_path, "single")
    seen.fit(1)
    seen.trainer.save_checkpoint(tmp_path / "half.ckpt")
    (tested,) = seen.trainer.test(module("single"), ckpt_path=tmp_path / "half.ckpt", verbose=False)
    expected = plain_loss(with_weights(average_after(NUM_BATCHES)), first=200)
    assert tested["test_loss"] == pytest.approx(expected, rel=1e-6)
    assert_same(dict(seen.module.state_dict()), average_after(NUM_BATCHES))
    seen.fit(2)
    assert_same(seen.began[1], raw_after(NUM_BATCHES))
    assert_same(full_average(seen.callback), plain_average(seen.recorder.weights))
    assert counts(seen.callback) == (NUM_STEPS, NUM_STEPS)


@pytest.mark.own_processes
def test_weights_that_were_replaced_after_fit_are_saved_alone(tmp_path: Path) -> None:
    fitted, model = trainer(tmp_path, "single", [averaging()], max_epochs=1), module("single")
    fitted.fit(model)
    other_weights(model)
    with said("the model was given other weights since the training"):
        fitted.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert "current_model_state" not in saved
    assert "averaging_state" not in saved
    assert_same(saved["state_dict"], dict(model.state_dict()))
    assert float(model.head.bias[0].detach()) == 7.0


@pytest.mark.own_processes
def test_a_nan_in_the_average_does_not_cost_the_raw_weights(tmp_path: Path) -> None:
    """It is in the average for good, but the raw weights can leave it behind: a file has them, the next fit begins."""
    seen = Seen(tmp_path, "single")
    steps = iter(range(1, NUM_STEPS + 1))

    def spoil(fitted: Any) -> None:
        step, bias = next(steps), fitted.lightning_module.head.bias
        with torch.no_grad():
            if step == 2:
                bias[0] = float("nan")

    def mend(fitted: Any) -> None:
        with torch.no_grad():
            for value in fitted.lightning_module.parameters():
                value.nan_to_num_(0.125)
        for state in fitted.optimizers[0].state.values():
            state["momentum_buffer"].nan_to_num_(0.0)

    seen.trainer.callbacks[:0] = [At("on_train_batch_end", spoil)]
    seen.trainer.callbacks.append(At("on_train_batch_end", mend))
    seen.fit(1)
    seen.trainer.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert saved["state_dict"]["head.bias"][0].isnan()
    assert saved["current_model_state"]["head.bias"].isfinite().all()
    seen.fit(2)
    assert_same(seen.began[1], saved["current_model_state"])
    assert counts(seen.callback) == (NUM_STEPS, NUM_STEPS)
