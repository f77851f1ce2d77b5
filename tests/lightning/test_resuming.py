"""What a resumed run goes on from: weights, average and counts of one step, or an error that says what to do.

A run in several parts must be the one long run, bit for bit: its weights, its average, and the metrics of each
validation. The long run is a plain loop and a formula.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import sharded_avg
from sharded_avg import CheckpointError, ShardedAverage
from sharded_avg.lightning import EMAWeightAveraging
from sharded_avg.lightning import callback as building

from .modules import NUM_BATCHES, Tiny
from .reference import (
    DECAY,
    NUM_STEPS,
    assert_same,
    average_after,
    plain_average,
    plain_loss,
    plain_training,
    raw_after,
    with_weights,
)
from .runs import Recorder, full_weights, module, run, trainer
from .saved_files import FOLDERS, assert_average_in, fail_and_save, inspected
from .strategies import STRATEGIES, among
from .watching import At, full_average

ALL_STEPS = 3 * NUM_BATCHES


def new(**settings: Any) -> EMAWeightAveraging:
    return EMAWeightAveraging(decay=DECAY, **settings)


def state_of(callback: Any, trainer: Any) -> dict[str, Any]:
    """Copies of what a run holds."""
    average = callback.average
    return {
        "raw": full_weights(trainer),
        "average": full_average(callback) if average.n_averaged else None,
        "counts": (average.n_averaged, average.num_steps),
        "step": trainer.global_step,
    }


def saved_by(tmp_path: Path, name: str, path: Path, *, max_epochs: int = 1, **settings: Any) -> Any:
    """A run that saves at the end of each epoch, into the same place; the callback of that run."""
    callback, own = new(**settings), At("on_train_epoch_end", lambda t: t.save_checkpoint(path))
    trainer(tmp_path, name, [callback, own], max_epochs=max_epochs).fit(module(name))
    return callback


def restored(tmp_path: Path, name: str, path: Path, **settings: Any) -> dict[str, Any]:
    """What a run holds that begins with this checkpoint, before its first step."""
    callback, seen = new(**settings), []

    def look(trainer: Any) -> None:
        seen.append(state_of(callback, trainer))
        trainer.should_stop = True

    trainer(tmp_path, name, [callback, At("on_train_start", look)], max_epochs=9).fit(module(name), ckpt_path=path)
    return seen[0]


# -- in parts, as in one run -------------------------------------------------------------------------------------------


def fit_in_parts(tmp_path: Path, name: str, ends: list[int], options: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    """A run to each of the epochs in `ends`, each from the final checkpoint of the one before."""
    losses: list[float] = []
    path: Path | None = None
    for end in ends:
        callback, last = new(), tmp_path / f"{kwargs}{end}.ckpt"
        ended: list[dict[str, Any]] = []
        looks = [
            At("on_validation_end", lambda t: losses.append(float(t.callback_metrics["val_loss"]))),
            At("on_train_epoch_end", lambda t, c=callback, ended=ended: ended.append(state_of(c, t))),
            At("on_train_end", lambda t, last=last: t.save_checkpoint(last)),
        ]
        part = trainer(tmp_path, name, [callback, *looks], max_epochs=end, **kwargs)
        part.fit(module(name, **options), ckpt_path=path)
        path = last
    return {"losses": losses, **ended[-1]}


def fit_with_sanity_checks(tmp_path: Path, name: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    return [fit_in_parts(tmp_path, name, [1, 3], options, num_sanity_val_steps=steps) for steps in (0, 2)]


@among("single", "ddp", "fsdp2", "deepspeed_2")
def test_an_extended_run_is_one_long_run(name: str, tmp_path: Path) -> None:
    """P04, P19, P27, P92, P93: Adam, from the final checkpoint of a finished run, with sanity checks and without.

    Raw weights, average, counts, and the metrics of every validation.
    """
    _, weights = plain_training(ALL_STEPS, optimizer="adam")
    averages = [plain_average({step: weights[step] for step in range(1, end + 1)}) for end in (4, 8, 12)]
    losses = [plain_loss(with_weights(average), first=100) for average in averages]
    for parts in run(name, fit_with_sanity_checks, tmp_path, name=name, options={"optimizer": "adam"}):
        for seen in parts:
            assert (seen["counts"], seen["step"]) == ((ALL_STEPS, ALL_STEPS), ALL_STEPS)
            assert_same(seen["raw"], weights[ALL_STEPS])
            assert_same(seen["average"], averages[-1])
            assert seen["losses"] == pytest.approx(losses, rel=1e-6)


LATE = {"update_starting_at_step": 6, "update_every_n_steps": 2}  # after the steps 7, 9, 11 if the first is 1


def resume_late(tmp_path: Path, name: str) -> dict[str, Any]:
    """From before the first update, and from after it."""
    ends = {}
    for epochs in (1, 2):
        path = tmp_path / f"{epochs}.ckpt"
        before = saved_by(tmp_path, name, path, max_epochs=epochs, **LATE)
        callback, held = new(**LATE), []
        look = At("on_train_epoch_end", lambda t, c=callback, held=held: held.append(state_of(c, t)))
        trainer(tmp_path, name, [callback, look], max_epochs=3).fit(module(name), ckpt_path=path)
        ends[before.average.n_averaged] = held[-1]
    return ends


@among("single", "fsdp2", "deepspeed_2", further=["ddp", "fsdp_full", "fsdp_sharded"])
def test_late_start(name: str, tmp_path: Path) -> None:
    """P10, P24, P94: what waits for its step goes on waiting, every second step stays every second, one long run."""
    updates = [7, 9, 11]
    expected = plain_average({step: raw_after(step) for step in updates})
    expected["calls"] = raw_after(ALL_STEPS)["calls"]
    for ends in run(name, resume_late, tmp_path, name=name):
        assert ends.keys() == {0, 1}
        for seen in ends.values():
            assert seen["counts"] == (len(updates), ALL_STEPS)
            assert_same(seen["raw"], raw_after(ALL_STEPS))
            assert_same(seen["average"], expected)


@pytest.mark.own_processes
def test_from_the_middle_of_an_epoch(tmp_path: Path) -> None:
    """No step is taken in twice, and none is left out; Lightning itself begins the data anew, so it says the steps."""
    keeper = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    recorders = [Recorder(), Recorder()]
    trainer(tmp_path, "single", [recorders[0], new(), keeper], max_epochs=1).fit(module("single"))
    callback, again = new(), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    resumed = trainer(tmp_path, "single", [recorders[1], callback, again])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before|Checkpoint dir")
        resumed.fit(module("single"), ckpt_path=tmp_path / "step=3.ckpt")
    taken_in = {step: recorders[0].weights[step] for step in (1, 2, 3)} | recorders[1].weights
    assert list(taken_in) == list(range(1, resumed.global_step + 1))
    assert callback.average.n_averaged == resumed.global_step
    assert_same(full_average(callback), plain_average(taken_in))


@pytest.mark.own_processes
@pytest.mark.parametrize("device", [None, "cpu"])
def test_placement_is_decided_when_the_model_is_where_it_trains(device: Any, tmp_path: Path) -> None:
    """P20: not when the checkpoint is read, which is before the model is moved; each shard then says where."""
    path, events, callback = tmp_path / "saved.ckpt", [], new(device=device)
    saved_by(tmp_path, "single", path, device=device)
    resumed = trainer(tmp_path, "single", [callback])

    def noting(original: Callable[..., Any], event: str) -> Callable[..., Any]:
        def stand_in(*arguments: Any, **settings: Any) -> Any:
            events.append((event, settings.get("device", "")))
            return original(*arguments, **settings)

        return stand_in

    noted = [(resumed.strategy, "load_checkpoint"), (resumed.strategy, "model_to_device"), (building, "ShardedAverage")]
    with contextlib.ExitStack() as stack:
        for owner, name in noted:
            stack.enter_context(mock.patch.object(owner, name, noting(getattr(owner, name), name)))
        resumed.fit(module("single"), ckpt_path=path)
    assert events == [("load_checkpoint", ""), ("model_to_device", ""), ("ShardedAverage", device)]
    assert_same(full_average(callback), average_after(NUM_STEPS))


# -- on other ranks ----------------------------------------------------------------------------------------------------


def save_with(tmp_path: Path, name: str) -> None:
    saved_by(tmp_path, name, tmp_path / "saved.ckpt")


def resume_with(tmp_path: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is there before the first step, and the rest of the run."""
    callback, held = new(), []
    resumed = trainer(tmp_path, name, [callback, At("on_train_start", lambda t: held.append(state_of(callback, t)))])
    resumed.fit(module(name), ckpt_path=tmp_path / "saved.ckpt")
    return held[0], state_of(callback, resumed)


def pair(saved: str, resumed: str) -> Any:
    alone = "here" in (STRATEGIES[saved].where, STRATEGIES[resumed].where)
    return pytest.param(saved, resumed, marks=pytest.mark.own_processes if alone else ())


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        pair("single", "ddp"),
        pair("ddp", "single"),
        pair("fsdp_full", "single"),
        pair("single", "fsdp_full"),
        pair("ddp", "fsdp2"),
        pair("fsdp2", "fsdp2_3ranks"),
        pair("fsdp2_3ranks", "fsdp2"),
    ],
)
def test_on_another_strategy_or_world_size(saved: str, resumed: str, tmp_path: Path) -> None:
    """P92, P93: weights, average and counts are those that were saved, and the run goes on from them.

    From one strategy's folders to another's, Lightning itself cannot: FSDP1's have no buffers.
    """
    run(saved, save_with, tmp_path, name=saved)
    exact = STRATEGIES[saved].exact
    for begin, end in run(resumed, resume_with, tmp_path, name=resumed):
        assert begin["counts"] == (NUM_BATCHES, NUM_BATCHES)
        assert_same(begin["raw"], raw_after(NUM_BATCHES), exact=exact)
        assert_same(begin["average"], average_after(NUM_BATCHES), exact=exact)
        assert end["counts"] == (NUM_STEPS, NUM_STEPS)
        assert_same(end["average"], average_after(NUM_STEPS), exact=exact and STRATEGIES[resumed].exact)


# -- folders -----------------------------------------------------------------------------------------------------------


def resume_after_failing(tmp_path: Path, name: str) -> list[dict[str, Any]]:
    """From what was saved while the average was in the model, by callbacks before and after ours."""
    fail_and_save(tmp_path, name, "on_validation_batch_end")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")  # without ModelCheckpoint
        return [restored(tmp_path, name, tmp_path / f"{at}.ckpt") for at in "12"]


@among("fsdp2", "deepspeed_2")
def test_folders_saved_on_an_exception(name: str, tmp_path: Path) -> None:
    """L6, P18: in validation; who saves is as in test_checkpoints.py."""
    for seen in itertools.chain(*run(name, resume_after_failing, tmp_path, name=name)):
        assert_same(seen["raw"], raw_after(NUM_STEPS))
        assert_same(seen["average"], average_after(NUM_STEPS))
    for at in "34":
        assert_average_in(tmp_path / f"{at}.ckpt", NUM_STEPS)


def outcome(act: Callable[[], Any]) -> tuple[str, list[str], Any]:
    """What an act raised, what it warned of, and what it returned."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            value, error = act(), ""
        except CheckpointError as refused:
            value, error = None, str(refused)
    return error, [str(warning.message) for warning in caught if "sharded_avg" in str(warning.message)], value


def make_torn(path: Path, other: Path, how: str) -> Path:
    """A copy of a checkpoint, less something, or with something of another one. On rank 0."""
    torn = path.with_name(f"{how}.ckpt")
    if torch.distributed.get_rank() == 0:
        shutil.copytree(path, torn)
        average = torn / "average"
        if how == "without manifest":
            (average / "manifest.json").unlink()
        elif how == "without a file":
            next(average.glob("*.distcp")).unlink()
        else:
            shutil.rmtree(average)
        if how == "of another step":
            shutil.copytree(other / "average", average)
    torch.distributed.barrier()
    return torn


TORN = {  # how, and what the error says
    "without average": "holds no saved average: there is nothing of that name",
    "without manifest": "it has no manifest.json, so it is something else, or was torn",
    "without a file": "distcp",
    "of another step": f"after {NUM_BATCHES} updates in {NUM_BATCHES} steps.*after {NUM_STEPS} updates in {NUM_STEPS}",
}


def resume_from_torn(tmp_path: Path, name: str, hows: list[str]) -> dict[str, Any]:
    early, path = tmp_path / "early.ckpt", tmp_path / "late.ckpt"
    saved_by(tmp_path, name, early)
    saved_by(tmp_path, name, path, max_epochs=2)
    outcomes = {}
    for how in hows:
        torn = make_torn(path, early, how)
        outcomes[how] = [outcome(lambda t=torn, s=s: restored(tmp_path, name, t, strict=s)) for s in (True, False)]
    return outcomes


@among("fsdp2", "deepspeed_2", further=["fsdp_sharded"])
def test_torn_folders_are_refused(name: str, tmp_path: Path) -> None:
    """P96: with advice; by request the weights are used alone, with one warning, and a new average starts."""
    hows = list(TORN) if name == "fsdp2" else ["without average", "of another step"]
    for rank, outcomes in enumerate(run(name, resume_from_torn, tmp_path, name=name, hows=hows)):
        for how, (strict, lenient) in outcomes.items():
            assert re.search(TORN[how], strict[0]), (how, strict)
            assert strict[0].endswith("give the callback strict=False")
            error, warned, seen = lenient
            assert (error, len(warned)) == ("", 1 if rank == 0 else 0), warned
            assert all("a new average starts from the weights of the checkpoint" in text for text in warned)
            assert (seen["counts"], seen["average"]) == ((0, 0), None)
            assert_same(seen["raw"], raw_after(NUM_STEPS))


def save_after_fit(tmp_path: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    path, callback = tmp_path / "fitted.ckpt", new()
    fitted = trainer(tmp_path, name, [callback], max_epochs=2)
    fitted.fit(module(name))
    fitted.save_checkpoint(path)
    return full_weights(fitted), restored(tmp_path, name, path)


@among("fsdp2", "deepspeed_2")
def test_folder_saved_after_fit(name: str, tmp_path: Path) -> None:
    """L7, P04: it has the raw weights, though the model has the average, before and after."""
    for end, seen in run(name, save_after_fit, tmp_path, name=name):
        assert_same(end, average_after(NUM_STEPS))
        assert_same(seen["raw"], raw_after(NUM_STEPS))
        assert_same(seen["average"], average_after(NUM_STEPS))


class KilledError(BaseException):
    pass


def overwrite_and_be_killed(tmp_path: Path, name: str) -> dict[str, Any]:
    """One folder, written three times; the third time, the run is killed when the model is there."""
    path = tmp_path / "one.ckpt"
    saved_by(tmp_path, name, path, max_epochs=2)
    after_two = restored(tmp_path, name, path)
    own = At("on_train_epoch_end", lambda t: t.save_checkpoint(path))
    killed = mock.patch.object(ShardedAverage, "save", side_effect=KilledError)
    with killed, pytest.raises(KilledError):
        trainer(tmp_path, name, [new(), own], max_epochs=3).fit(module(name), ckpt_path=path)
    return {"after_two": after_two, "killed": outcome(lambda: restored(tmp_path, name, path))}


@among("fsdp2", "deepspeed_2")
def test_killed_between_model_and_average(name: str, tmp_path: Path) -> None:
    """P96: a folder that is written again is the new checkpoint; half written, it is refused, never mixed."""
    for seen in run(name, overwrite_and_be_killed, tmp_path, name=name):
        assert_same(seen["after_two"]["raw"], raw_after(NUM_STEPS))
        assert_same(seen["after_two"]["average"], average_after(NUM_STEPS))
        error, _, _ = seen["killed"]
        assert "holds no saved average" in error
        assert error.endswith("strict=False")


def resume_without_average(tmp_path: Path, name: str) -> tuple[Any, ...]:
    path = tmp_path / "plain.ckpt"
    own = At("on_train_epoch_end", lambda t: t.save_checkpoint(path))
    trainer(tmp_path, name, [own], max_epochs=1).fit(module(name))
    callback, raw = new(), []
    look = At("on_train_start", lambda t: raw.append(full_weights(t)))

    def resume() -> dict[str, Any]:
        resumed = trainer(tmp_path, name, [callback, look])
        resumed.fit(module(name), ckpt_path=path)
        return state_of(callback, resumed)

    return raw, outcome(resume)


@among("single", "ddp", *FOLDERS)
def test_a_checkpoint_without_an_average(name: str, tmp_path: Path) -> None:
    """P97: its weights are the start of one, and one line says so."""
    expected = average_after(NUM_STEPS, NUM_BATCHES + 1)
    for rank, (raw, (error, warned, end)) in enumerate(run(name, resume_without_average, tmp_path, name=name)):
        assert (error, len(warned)) == ("", 1 if rank == 0 else 0), warned
        assert all("has no average in it" in text and "a new average starts from them" in text for text in warned)
        assert_same(raw[0], raw_after(NUM_BATCHES))
        assert end["counts"][0] == NUM_BATCHES
        assert_same(end["average"], expected)


@among(*FOLDERS)
def test_what_is_in_a_folder(name: str, tmp_path: Path) -> None:
    """P27: the average is one folder in it, which whoever deploys it and the command line find."""
    run(name, save_with, tmp_path, name=name)
    path, expected = tmp_path / "saved.ckpt", average_after(NUM_BATCHES)
    assert (path / "average" / "manifest.json").is_file()
    assert {entry.name for entry in path.iterdir() if entry.name.startswith("average")} == {"average"}
    Tiny().load_state_dict(sharded_avg.load_averaged_state_dict(path))
    for place in (path, path / "average"):
        found = sharded_avg.load_averaged_state_dict(place)
        assert_same(found, expected)
        facts = inspected(place)
        assert facts["averages"]["average"]["n_averaged"] == facts["step"] == NUM_BATCHES
