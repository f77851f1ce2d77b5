"""Saves and loads that fail, on one rank or on all: each copy stays what it was, and nobody waits for ever."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as lightning
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from sharded_avg.errors import CheckpointError, PeerError
from sharded_avg.exchange import handover
from sharded_avg.lightning import resuming, saving

from .modules import NUM_BATCHES
from .reference import (
    NUM_STEPS,
    Weights,
    assert_same,
    average_after,
    plain_average,
    plain_loss,
    plain_training,
    raw_after,
    with_weights,
)
from .runs import full_weights, module, run, trainer
from .saved_files import assert_holds, saver_of_exceptions
from .strategies import among
from .watching import At, Seen, averaging, counts, full_average


class FullDisk(TorchCheckpointIO):
    def save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        raise OSError("disk full")


@pytest.mark.own_processes
def test_a_save_that_fails_and_is_caught(tmp_path: Path) -> None:
    """Validation goes on with the average, training with the raw weights, and at the end the average is there."""
    seen: list[Weights] = []

    def save_in_vain(fitted: Any) -> None:
        seen.append(full_weights(fitted))
        with pytest.raises(OSError, match="disk full"):
            fitted.save_checkpoint(tmp_path / "none.ckpt")

    saver = At("on_validation_batch_start", save_in_vain)
    fitted = trainer(tmp_path, "single", [averaging(), saver], plugins=[FullDisk()])
    fitted.fit(model := module("single"))
    assert len(seen) == 4  # batches of validation
    for number, weights in enumerate(seen):
        assert_same(weights, average_after(NUM_BATCHES * (1 + number // 2)))
    expected = plain_loss(with_weights(average_after(NUM_STEPS)), first=100)
    assert float(fitted.callback_metrics["val_loss"]) == pytest.approx(expected, rel=1e-6)
    assert_same(dict(model.state_dict()), average_after(NUM_STEPS))
    with pytest.raises(OSError, match="disk full"):
        fitted.save_checkpoint(tmp_path / "none.ckpt")
    assert_same(dict(model.state_dict()), average_after(NUM_STEPS))


@pytest.mark.own_processes
def test_raw_weights_that_cannot_be_brought_back_are_kept(tmp_path: Path) -> None:
    """The save fails, and the next one has both copies; so does the next fit."""
    seen = Seen(tmp_path, "single")
    seen.fit(1)
    for error in (KeyboardInterrupt, MemoryError):
        failing = mock.patch.object(handover, "bring_back", side_effect=error)
        with failing, pytest.raises(error):
            seen.trainer.save_checkpoint(tmp_path / "end.ckpt")
    seen.trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert_holds(tmp_path / "end.ckpt", NUM_BATCHES)
    with mock.patch.object(handover, "bring_back", side_effect=MemoryError), pytest.raises(MemoryError):
        seen.fit(2)
    seen.fit(2)
    assert_same(seen.began[-1], raw_after(NUM_BATCHES))
    assert_same(full_average(seen.callback), plain_average(seen.recorder.weights))
    assert counts(seen.callback) == (NUM_STEPS, NUM_STEPS)


GRACE_S = 1.0


class FailsAlone(lightning.Callback):
    """One rank fails while it trains; the others notice later, as if by the time-out of a collective."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            if trainer.global_rank == self.rank:
                raise ValueError("by design")
            time.sleep(1.5 * GRACE_S)
            raise TimeoutError("by design")


def fail_alone(tmp_path: Path, name: str, rank: int) -> dict[str, Any]:
    raised, callbacks = None, [averaging(), FailsAlone(rank), saver_of_exceptions(tmp_path)]
    fitted = trainer(tmp_path, name, callbacks)
    with mock.patch.object(saving, "RENDEZVOUS_GRACE_S", GRACE_S), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start = time.monotonic()
        try:
            fitted.fit(module(name))
        except Exception as error:
            raised = error
    warned = sum("has the weights, not the average" in str(warning.message) for warning in caught)
    return {
        "raised": type(raised),
        "took_s": time.monotonic() - start,
        "warned": warned,
        "weights": full_weights(fitted),
    }


@pytest.mark.each_value
@pytest.mark.parametrize("rank", [0, 1])
@among("ddp", "fsdp_full")
def test_one_rank_fails_while_it_trains(name: str, rank: int, tmp_path: Path) -> None:
    """Nobody waits for ever. Where rank 0 has all weights it saves them; the average is in parts and is left out."""
    own = [ValueError if other == rank else TimeoutError for other in range(2)]
    path = tmp_path / "exception.ckpt"
    ranks = run(name, fail_alone, tmp_path, name=name, rank=rank)
    for number, found in enumerate(ranks):
        alone = name == "ddp" and number == 0
        assert found["raised"] is (own[number] if alone else PeerError)
        assert found["warned"] == int(alone)
        assert found["took_s"] < 20 * GRACE_S
        assert_same(found["weights"], raw_after(2))
    assert path.exists() == (name == "ddp")
    if path.exists():
        saved = torch.load(path, weights_only=True)
        assert "current_model_state" not in saved
        assert_same(saved["state_dict"], raw_after(2))


class TornOnOneRank:
    """The last rank cannot read one of the averaged tensors."""

    def __init__(self) -> None:
        self.read = resuming.FileTensors.__getitem__

    def patch(self) -> Any:
        def read(tensors: Any, name: str) -> Tensor:
            if dist.get_rank() == dist.get_world_size() - 1 and name == "head.bias":
                raise CheckpointError("stale file handle")
            return self.read(tensors, name)

        return mock.patch.object(resuming.FileTensors, "__getitem__", read)


def resume_torn_on_one(tmp_path: Path, name: str) -> dict[str, Any]:
    path = tmp_path / "end.ckpt"
    first = trainer(tmp_path, name, [averaging()], max_epochs=1)
    first.fit(module(name))
    first.save_checkpoint(path)
    ours, found = averaging(strict=False), {}
    resumed = trainer(tmp_path, name, [ours])
    with TornOnOneRank().patch(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises((CheckpointError, PeerError)) as failed:
            trainer(tmp_path, name, [averaging()]).fit(module(name), ckpt_path=path)
        resumed.fit(module(name), ckpt_path=path)
    found["strict"] = (type(failed.value), str(failed.value))
    found["said"] = [str(w.message) for w in caught if "a new average starts" in str(w.message)]
    return found | {"average": full_average(ours), "counts": counts(ours)}


@among("fsdp_full")
def test_a_file_that_one_rank_cannot_read(name: str, tmp_path: Path) -> None:
    """All ranks raise; or, if that is not `strict`, all ranks start a new average, and rank 0 says why."""
    _, weights = plain_training(NUM_STEPS)
    later = plain_average({step: weights[step] for step in range(NUM_BATCHES + 1, NUM_STEPS + 1)})
    first, last = run(name, resume_torn_on_one, tmp_path, name=name)
    assert first["strict"][0] is PeerError
    assert last["strict"][0] is CheckpointError
    assert "stale file handle. To start a new average" in last["strict"][1]
    assert [len(first["said"]), len(last["said"])] == [1, 0]
    assert "stale file handle" in first["said"][0]
    for found in (first, last):
        assert_same(found["average"], later)
        assert found["counts"] == (NUM_BATCHES, NUM_BATCHES)
