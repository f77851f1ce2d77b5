"""One callback in several fits: the average goes on with its module, and starts anew for another one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from sharded_avg import SWA, load_averaged_state_dict
from sharded_avg.errors import UnsupportedModelError
from sharded_avg.lightning import WeightAveraging

from .modules import NUM_BATCHES
from .reference import NUM_STEPS, Weights, assert_same, plain_average, plain_loss, plain_training, with_weights
from .runs import full_weights, module, run, trainer
from .strategies import among
from .watching import Seen, counts, full_average

ANEW = "the weights were changed since the last fit"


def fit_twice(tmp_path: Path, name: str) -> dict[str, Any]:
    seen = Seen(tmp_path, name)
    seen.fit(1)
    ended = full_average(seen.callback)
    seen.trainer.test(seen.module, verbose=False)  # of the average, which is in the model
    seen.fit(2)
    return {
        "began": seen.began,
        "weights": seen.recorder.weights,
        "ended": ended,
        "average": full_average(seen.callback),
        "end": full_weights(seen.trainer),
        "counts": counts(seen.callback),
    }


@among("single", "fsdp_by_hand", "fsdp2", "deepspeed_3", further=["ddp", "deepspeed_2"])
def test_a_second_fit_goes_on(name: str, tmp_path: Path) -> None:
    """P04, L8: raw weights are back bit for bit, and average and counts go on; optimizers are Lightning's affair."""
    for seen in run(name, fit_twice, tmp_path, name=name):
        weights = seen["weights"]
        assert list(weights) == list(range(1, NUM_STEPS + 1))
        assert_same(seen["began"][1], weights[NUM_BATCHES])
        half = plain_average({step: weights[step] for step in range(1, NUM_BATCHES + 1)})
        assert not torch.equal(half["wide.weight"], weights[NUM_BATCHES]["wide.weight"])
        assert_same(seen["ended"], half)
        assert_same(seen["average"], plain_average(weights))
        assert_same(seen["end"], plain_average(weights))
        assert seen["counts"] == (NUM_STEPS, NUM_STEPS)


def fit_other_weights(tmp_path: Path, name: str) -> dict[str, Any]:
    seen = Seen(tmp_path, name)
    seen.fit(1)
    with torch.no_grad():
        for param in seen.module.parameters():
            param.mul_(0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen.fit(2)
    return {
        "began": seen.began[1]["wide.weight"],
        "weights": {step: seen.recorder.weights[step] for step in range(NUM_BATCHES + 1, NUM_STEPS + 1)},
        "ended": plain_average({step: seen.recorder.weights[step] for step in range(1, NUM_BATCHES + 1)}),
        "average": full_average(seen.callback),
        "counts": counts(seen.callback),
        "warned": sum(ANEW in str(warning.message) for warning in caught),
    }


@among("single", "ddp", "fsdp_by_hand", "fsdp2", "deepspeed_2")
def test_other_weights_in_between_start_another_average(name: str, tmp_path: Path) -> None:
    """They are what training goes on from, and rank 0 says so once."""
    ranks = run(name, fit_other_weights, tmp_path, name=name)
    assert [seen["warned"] for seen in ranks] == [1] + [0] * (len(ranks) - 1)
    for seen in ranks:
        torch.testing.assert_close(seen["began"], seen["ended"]["wide.weight"] * 0.5, rtol=0, atol=0)
        assert_same(seen["average"], plain_average(seen["weights"]))
        assert seen["counts"] == (NUM_BATCHES, NUM_BATCHES)


class EachEpoch(WeightAveraging):
    """The mean of the weights at the end of each epoch."""

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return epoch_idx is not None


def test_one_callback_for_two_modules_in_turn(tmp_path: Path) -> None:
    """As in k-fold validation: nothing is left of the first module, neither values nor counts of steps and epochs."""
    _, weights = plain_training(NUM_STEPS)
    expected = {name: value.float() for name, value in weights[NUM_BATCHES].items()}
    for name, value in weights[NUM_STEPS].items():
        expected[name] = expected[name].lerp(value.float(), 0.5) if value.is_floating_point() else value
    callback = EachEpoch(rule=SWA())
    for fold in range(2):
        model = module("single")
        with torch.no_grad():
            model.wide.weight.mul_(1 - fold)  # the second fold is another model, then the same again
        trainer(tmp_path, "single", [callback]).fit(model)
        assert counts(callback) == (2, NUM_STEPS)
        if fold == 0:
            assert_same(full_average(callback), expected)
        assert callback.state_dict()["latest_update_epoch"] == 1
    model = module("single")
    trainer(tmp_path, "single", [callback]).fit(model)
    assert_same(full_average(callback), expected)
    assert_same(dict(model.state_dict()), expected)


@pytest.mark.parametrize("same_trainer", [True, False])
def test_another_module_in_the_same_trainer_and_the_same_in_another(same_trainer: bool, tmp_path: Path) -> None:
    """The average belongs to the module: it goes on in another trainer, and starts anew for another module."""
    seen = Seen(tmp_path, "single")
    seen.fit(1)
    if same_trainer:
        seen.module = module("single")
        seen.fit(2)
    else:
        trainer(tmp_path, "single", [seen.callback], max_epochs=1).fit(seen.module)
    steps = NUM_BATCHES if same_trainer else NUM_STEPS
    assert counts(seen.callback) == (steps, steps)


def test_a_checkpoint_wins_over_what_was_there(tmp_path: Path) -> None:
    """A second fit from a checkpoint is what the checkpoint says, whatever the callback did before."""
    seen, path = Seen(tmp_path, "single"), tmp_path / "half.ckpt"
    seen.fit(1)
    seen.trainer.save_checkpoint(path)
    seen.fit(2)
    again = trainer(tmp_path, "single", [seen.callback])
    again.fit(seen.module, ckpt_path=path)
    _, weights = plain_training(NUM_STEPS)
    assert_same(full_average(seen.callback), plain_average(weights))
    assert counts(seen.callback) == (NUM_STEPS, NUM_STEPS)


# -- DeepSpeed evaluates with another engine than it trains ------------------------------------------------------------


def fit_save_validate_fit(tmp_path: Path, name: str) -> dict[str, dict[str, Any]]:
    return {end_with: _fit_save_validate_fit(tmp_path / end_with, name, end_with) for end_with in ("average", "raw")}


def _fit_save_validate_fit(folder: Path, name: str, end_with: str) -> dict[str, Any]:
    seen, refused = Seen(folder, name), None
    seen.callback.end_with = end_with
    seen.fit(1)
    seen.trainer.save_checkpoint(folder / "before.ckpt")
    (validated,) = seen.trainer.validate(seen.module, verbose=False)
    try:
        seen.trainer.save_checkpoint(folder / "between.ckpt")
    except UnsupportedModelError as error:
        refused = str(error)
    seen.fit(2)
    seen.trainer.save_checkpoint(folder / "end.ckpt")
    return {
        "refused": refused,
        "val_loss": validated["val_loss"],
        "began": seen.began[1],
        "weights": seen.recorder.weights,
        "average": full_average(seen.callback),
        "end": full_weights(seen.trainer),
        "counts": counts(seen.callback),
    }


@among("deepspeed_2", "deepspeed_3")
def test_saved_and_validated_between_two_fits(name: str, tmp_path: Path) -> None:
    """Under ZeRO 3 DeepSpeed cannot save then: all ranks say so. The second fit goes on from the raw weights."""
    for ranks in run(name, fit_save_validate_fit, tmp_path, name=name):
        for end_with, seen in ranks.items():
            assert (seen["refused"] is None) == (name == "deepspeed_2")
            assert name == "deepspeed_2" or "Save before you call validate" in seen["refused"]
            weights = seen["weights"]
            assert_same(seen["began"], weights[NUM_BATCHES])
            assert_same(seen["average"], plain_average(weights))
            assert_same(seen["end"], plain_average(weights) if end_with == "average" else weights[NUM_STEPS])
            assert seen["counts"] == (NUM_STEPS, NUM_STEPS)
            half = plain_average({step: weights[step] for step in range(1, NUM_BATCHES + 1)})
            assert seen["val_loss"] == pytest.approx(plain_loss(with_weights(half), first=100), rel=1e-6)
            saved = {"before": half, "end": plain_average(weights)}
            saved |= {"between": half} if name == "deepspeed_2" else {}
            for when, average in saved.items():
                loaded = load_averaged_state_dict(tmp_path / end_with / f"{when}.ckpt" / "average")
                assert_same({key: loaded[key] for key in average if key != "calls"}, _without_calls(average))


def _without_calls(state: Weights) -> Weights:
    return {key: value for key, value in state.items() if key != "calls"}
