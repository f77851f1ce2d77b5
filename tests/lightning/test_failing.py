"""What is left after an error or Ctrl-C: raw weights, each copy saved under its name, and no rank that hangs."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as lightning
import pytest
import torch
from lightning import __version__ as lightning_version
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.callbacks import WeightAveraging as TheirWeightAveraging
from torch import Tensor

from sharded_avg import EMA, load_averaged_state_dict
from sharded_avg.errors import ConfigError, EngineVersionError, PeerError
from sharded_avg.lightning import EMAWeightAveraging, WeightAveraging, saving, trainers
from sharded_avg.ranks import bounds
from sharded_avg.shard import take

from .modules import NUM_BATCHES, Tiny
from .reference import DECAY, NUM_STEPS, Weights, assert_same, plain_average, plain_training
from .runs import Recorder, full_weights, module, run, trainer
from .strategies import STRATEGIES, among
from .watching import At, full_average, stopping

MESSAGE = "by design"
PLACES = ("training_step", "on_validation_start", "validation_step", "on_validation_epoch_end", "on_validation_end")


class Failing(Tiny):
    """Raises in one of its hooks, once, in the second epoch."""

    def __init__(self, place: str, error: type[BaseException], **options: Any) -> None:
        super().__init__(**options)
        self.place, self.error, self.failed = place, error, False

    def reach(self, place: str) -> None:
        if place == self.place and self.trainer.current_epoch == 1 and not self.failed:
            self.failed = True
            raise self.error(MESSAGE)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.reach("training_step")
        return super().training_step(batch, batch_idx)

    def on_validation_start(self) -> None:
        self.reach("on_validation_start")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.reach("validation_step")
        super().validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self.reach("on_validation_epoch_end")

    def on_validation_end(self) -> None:
        self.reach("on_validation_end")


class FailingCallback(lightning.Callback):
    """Raises where the module says, at the moments of callbacks."""

    def __init__(self, order: str) -> None:
        self.order = order

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.reach(f"on_validation_start of a callback {self.order}")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.reach(f"on_validation_end of a callback {self.order}")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.is_last_batch:
            pl_module.reach(f"on_train_batch_end of a callback {self.order}")


def fit_failing(tmp_path: Path, name: str, places: list[str], error: type[BaseException]) -> list[dict[str, Any]]:
    """For each place, an error on all ranks: what is left, what was saved, and how fit goes on, here and resumed."""
    return [_fit_failing(tmp_path / str(number), name, place, error) for number, place in enumerate(places)]


def _fit_failing(folder: Path, name: str, place: str, error: type[BaseException]) -> dict[str, Any]:
    ours, recorder = EMAWeightAveraging(decay=DECAY), Recorder()
    saver = ModelCheckpoint(folder, "exception", save_on_exception=True, save_top_k=0)
    callbacks = [recorder, FailingCallback("before"), ours, FailingCallback("after")]
    can_save = not (name == "fsdp_sharded" and place.endswith("_step"))  # FSDP1 collects nothing inside its forward
    fitted, model = (
        trainer(folder, name, [*callbacks, saver][: 4 + can_save]),
        module(name, Failing, place=place, error=error),
    )
    with stopping(error):
        fitted.fit(model)
    found: dict[str, Any] = {"step": fitted.global_step, "model": full_weights(fitted), "average": full_average(ours)}
    path = folder / "exception.ckpt"
    if not can_save:
        return found
    if not STRATEGIES[name].writes_folder:
        found["file"] = torch.load(path, weights_only=True)
    if STRATEGIES[name].runs_again:
        model.train()  # Lightning leaves it in evaluation mode
        fitted.fit(model)
        found["again"] = full_average(ours)
        found["steps"] = recorder.weights
    resumed_ours, raw = EMAWeightAveraging(decay=DECAY), []
    look = At("on_train_start", lambda t: raw.append(full_weights(t)))
    saver = ModelCheckpoint(folder, "exception", save_on_exception=True, save_top_k=0)
    resumed = trainer(folder, name, [resumed_ours, look, saver], max_epochs=3)
    resumed.fit(module(name), ckpt_path=path)
    found |= {"resumed raw": raw[0], "resumed": full_average(resumed_ours), "last": resumed.global_step}
    return found


EVERYWHERE = [
    *PLACES,
    *(
        f"{moment} of a callback {order}"
        for moment in ("on_train_batch_end", "on_validation_start", "on_validation_end")
        for order in ("before", "after")
    ),
]
CASES = [
    ("single", EVERYWHERE, ValueError),
    ("single", EVERYWHERE, KeyboardInterrupt),
    ("ddp", [*PLACES[:3:2]], ValueError),
    ("fsdp_sharded", [PLACES[1], PLACES[3]], KeyboardInterrupt),
    ("fsdp_sharded", [PLACES[2]], ValueError),
    ("fsdp2", [*PLACES[:3:2]], KeyboardInterrupt),
    ("deepspeed_2", [*PLACES[:3:2]], ValueError),
]


@pytest.mark.own_processes
@pytest.mark.parametrize(("name", "places", "error"), CASES, ids=[f"{name}-{e.__name__}" for name, _, e in CASES])
def test_error_on_all_ranks(name: str, places: list[str], error: type[BaseException], tmp_path: Path) -> None:
    """L6, P18: raw weights in the model; each copy under its right name; and training goes on, here and resumed."""
    _, weights = plain_training(4 * NUM_BATCHES)

    def averaged(last: int) -> Weights:
        return plain_average({step: weights[step] for step in range(1, last + 1)}) | {"calls": weights[last]["calls"]}

    for rank in run(name, fit_failing, tmp_path, name=name, places=places, error=error):
        for place, found in zip(places, rank, strict=True):
            step = NUM_BATCHES if place == "training_step" else NUM_STEPS
            average = averaged(step)  # also where a callback before ours failed after the step
            assert found["step"] == step
            assert_same(found["model"], weights[step])
            assert_same(found["average"], average)
            if "file" in found:
                assert_same(found["file"]["current_model_state"], weights[step])
                assert_same(found["file"]["state_dict"], average)
            if "again" in found:  # the epoch that did not end is trained once more
                assert {*found["steps"]} - {0} == {*range(1, step + NUM_BATCHES + 1)}
                seen = {at: found["steps"][at] for at in range(1, step + NUM_BATCHES + 1)}
                assert_same(found["again"], plain_average(seen))
            if "resumed" in found:
                assert_same(found["resumed raw"], weights[step])
                assert_same(found["resumed"], averaged(3 * NUM_BATCHES))


# -- an error on one rank ----------------------------------------------------------------------------------------------

GRACE_S = 1.0


class FailingAlone(Tiny):
    """The last rank fails in the second validation. The others notice later: as if by the time-out of a collective."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.sanity_checking or self.trainer.current_epoch == 0:
            return
        if self.trainer.global_rank == self.trainer.world_size - 1:
            raise ValueError(MESSAGE)
        time.sleep(1.5 * GRACE_S)
        raise TimeoutError(MESSAGE)


def fail_alone(tmp_path: Path, name: str, saving_grace_s: float | None) -> dict[str, Any]:
    """The last rank fails at once; all save on their way out, if there is a time that they wait for each other."""
    ours, path, callbacks = EMAWeightAveraging(decay=DECAY), tmp_path / "exception.ckpt", []
    if saving_grace_s is not None:
        callbacks.append(ModelCheckpoint(tmp_path, "exception", save_on_exception=True, save_top_k=0))
    fitted, raised = trainer(tmp_path, name, [ours, *callbacks]), None
    with (
        mock.patch.object(bounds, "LEAVING_GRACE_S", GRACE_S),
        mock.patch.object(saving, "RENDEZVOUS_GRACE_S", saving_grace_s),
    ):
        start = time.monotonic()
        try:
            fitted.fit(module(name, FailingAlone))
        except Exception as error:
            raised = error
    found: dict[str, Any] = {"took_s": time.monotonic() - start, "raised": type(raised)}
    found["cause"] = type(raised.__context__)
    found["own"] = {shard.name: (shard.region, shard.tensor.clone()) for shard in ours.average._state.members.averaged}
    found["average"] = full_average(ours)
    found["saved"] = path.exists()
    if path.is_file():
        found["file"] = torch.load(path, weights_only=True)
    return found


@pytest.mark.each_value
@among("ddp", "fsdp2", "deepspeed_2")
@pytest.mark.parametrize("saving_grace_s", [None, 60.0, 0.1], ids=["nothing saved", "met again", "gave up again"])
def test_error_on_one_rank(name: str, saving_grace_s: float | None, tmp_path: Path) -> None:
    """L6: what a rank owns is raw again; it waits for others as long as they may come, and no longer.

    What is saved has raw weights under their name, or is not saved. The error that Lightning shows is, or comes from,
    the rank's own.
    """
    _, weights = plain_training(NUM_STEPS)
    average = plain_average(weights)
    ranks = run(name, fail_alone, tmp_path, name=name, saving_grace_s=saving_grace_s)
    for found, own in zip(ranks, [TimeoutError, ValueError], strict=True):
        assert found["took_s"] < 20 * GRACE_S  # the whole fit, on a busy machine; without giving up it would be minutes
        assert_same(found["average"], average)
        for key, (region, live) in found["own"].items():
            assert torch.equal(live.flatten(), take(weights[NUM_STEPS][key], region).flatten()), key
        if saving_grace_s == 0.1:
            assert (found["raised"], found["cause"]) == (PeerError, own)
        else:
            assert found["raised"] is own
        assert found["saved"] == (saving_grace_s == 60.0)
        assert ("file" in found) == (found["saved"] and name == "ddp")
        if "file" in found:
            assert_same(found["file"]["current_model_state"], weights[NUM_STEPS])
            assert_same(found["file"]["state_dict"], average)
    if saving_grace_s == 60.0 and name != "ddp":
        saved = load_averaged_state_dict(tmp_path / "exception.ckpt" / "average")
        assert_same(
            {key: average[key] for key in saved if key != "calls"}, {k: saved[k] for k in saved if k != "calls"}
        )


# -- what cannot be ----------------------------------------------------------------------------------------------------

BAD_ARGUMENTS: list[tuple[type[WeightAveraging], dict[str, Any], str]] = [
    (EMAWeightAveraging, {"decay": 1.5}, r"decay=1\.5"),
    (EMAWeightAveraging, {"update_every_n_steps": -1}, "update_every_n_steps=-1: must be an integer >= 0"),
    (EMAWeightAveraging, {"update_every_n_steps": 1.5}, r"update_every_n_steps=1\.5"),
    (EMAWeightAveraging, {"update_starting_at_step": True}, "update_starting_at_step=True"),
    (EMAWeightAveraging, {"update_starting_at_epoch": -2}, "update_starting_at_epoch=-2"),
    (EMAWeightAveraging, {"rule": EMA()}, "EMAWeightAveraging averages by decay=0.999"),
    (WeightAveraging, {"rule": 0.9}, r"rule=0\.9: give a rule such as EMA"),
    (WeightAveraging, {"rule": EMA(), "avg_fn": torch.lerp}, "rule and avg_fn were given"),
    (WeightAveraging, {"evaluate_with": "ema"}, "evaluate_with='ema': must be one of 'average', 'raw', 'both'"),
    (WeightAveraging, {"end_with": "both"}, "end_with='both': must be one of 'average', 'raw'"),
    (WeightAveraging, {"log_every_n_updates": -1}, "log_every_n_updates=-1"),
]


@pytest.mark.own_processes
@pytest.mark.parametrize(("kind", "arguments", "message"), BAD_ARGUMENTS, ids=lambda value: str(value)[:40])
def test_bad_arguments(kind: type[WeightAveraging], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**arguments)


@pytest.mark.own_processes
@pytest.mark.parametrize("other", [WeightAveraging, TheirWeightAveraging])
def test_two_averages(other: Any, tmp_path: Path) -> None:
    """A checkpoint has room for one, be it ours or Lightning's."""
    with pytest.raises(ConfigError, match="two averaging callbacks, EMAWeightAveraging and WeightAveraging"):
        trainer(tmp_path, "single", [EMAWeightAveraging(), other()]).fit(module("single"))


@pytest.mark.own_processes
def test_another_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """P15: what is relied on and gone is named before training begins, with the version that is installed."""
    fitted = trainer(tmp_path, "single", [EMAWeightAveraging()])
    monkeypatch.delattr(lightning.Trainer, "interrupted")
    message = rf"lightning\.pytorch {re.escape(lightning_version)}.* has no Trainer\.interrupted, .*install lightning>="
    with pytest.raises(EngineVersionError, match=message):
        fitted.fit(module("single"))
    assert fitted.global_step == 0


@pytest.mark.own_processes
@pytest.mark.parametrize(("name", "gone"), [("FSDPStrategy", "_state_dict_type"), ("ModelParallelStrategy", "_save_")])
def test_another_strategy(name: str, gone: str) -> None:
    """P15: the same of what strategies have."""
    strategy = type(name, (), {})()
    with pytest.raises(EngineVersionError, match=f"has no {name}.{gone}"):
        trainers.writes_folder(strategy)
