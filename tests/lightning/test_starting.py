"""Between reading a checkpoint and the first step: what fails there, and runs that have nothing left to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as lightning
import pytest

from .modules import NUM_BATCHES
from .reference import NUM_STEPS, assert_same, average_after, plain_average
from .runs import full_weights, module, run, trainer
from .saved_files import assert_holds
from .strategies import among
from .watching import Seen, averaging, counts, full_average, other_weights, said


class FailsBeforeTraining(lightning.Callback):
    """And saves, as Lightning's OnExceptionCheckpoint does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        raise ValueError("by design")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        trainer.save_checkpoint(self.path)


def fail_before_the_first_step(tmp_path: Path, name: str) -> dict[str, Any]:
    """A run is resumed from the file that it saves to on exceptions, fails before it trains, and is resumed again."""
    path = tmp_path / "exception.ckpt"
    first = trainer(tmp_path, name, [averaging()], max_epochs=1)
    first.fit(module(name))
    first.save_checkpoint(path)

    second = trainer(tmp_path, name, [averaging(), FailsBeforeTraining(path)])
    with pytest.raises(ValueError, match="by design"):
        second.fit(module(name), ckpt_path=path)
    third_ours = averaging()
    third = trainer(tmp_path, name, [third_ours])
    third.fit(module(name), ckpt_path=path)
    return {"average": full_average(third_ours), "counts": counts(third_ours), "end": full_weights(third)}


@among("single", "fsdp2")
def test_an_average_that_waits_is_saved(name: str, tmp_path: Path) -> None:
    """The checkpoint that a failed start writes over the one it came from has the average of that one."""
    for seen in run(name, fail_before_the_first_step, tmp_path, name=name):
        assert seen["counts"] == (NUM_STEPS, NUM_STEPS)
        assert_same(seen["average"], average_after(NUM_STEPS))
        assert_same(seen["end"], average_after(NUM_STEPS))


@pytest.mark.own_processes
def test_nothing_left_to_do(tmp_path: Path) -> None:
    """A finished run that is queued once more ends as it had ended, and its file can still be extended."""
    path, ours = tmp_path / "end.ckpt", averaging()
    first = trainer(tmp_path, "single", [averaging()], max_epochs=1)
    first.fit(module("single"))
    first.save_checkpoint(path)
    model = module("single")
    again = trainer(tmp_path, "single", [ours], max_epochs=1)
    again.fit(model, ckpt_path=path)
    assert_same(dict(model.state_dict()), average_after(NUM_BATCHES))
    assert counts(ours) == (NUM_BATCHES, NUM_BATCHES)
    path.unlink()
    again.save_checkpoint(path)
    assert_holds(path, NUM_BATCHES)
    extended = averaging()
    trainer(tmp_path, "single", [extended]).fit(module("single"), ckpt_path=path)
    assert_same(full_average(extended), average_after(NUM_STEPS))


@pytest.mark.own_processes
def test_a_load_that_fails_leaves_the_module_alone(tmp_path: Path) -> None:
    path = tmp_path / "end.ckpt"
    first = trainer(tmp_path, "single", [averaging()], max_epochs=1)
    first.fit(module("single"))
    first.save_checkpoint(path)
    second, model = trainer(tmp_path, "single", [averaging()]), module("single")
    failing = mock.patch.object(type(second._checkpoint_connector), "restore_model", side_effect=OSError("by design"))
    with failing, pytest.raises(OSError, match="by design"):
        second.fit(model, ckpt_path=path)
    assert "on_load_checkpoint" not in vars(model)
    fresh = averaging()
    trainer(tmp_path, "single", [fresh], max_epochs=1).fit(model)
    assert counts(fresh) == (NUM_BATCHES, NUM_BATCHES)


@pytest.mark.own_processes
@pytest.mark.parametrize("end_with", ["average", "raw"])
def test_a_checkpoint_without_an_average_in_a_second_fit(end_with: str, tmp_path: Path) -> None:
    """Its weights have nothing to do with the average of the first fit, which begins anew, and says so."""
    plain, model = trainer(tmp_path, "single", max_epochs=1), module("single")
    other_weights(model, 0.25)
    plain.fit(model)
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    seen = Seen(tmp_path, "single")
    seen.callback.end_with = end_with
    seen.fit(1)
    with said("the checkpoint has no average in it"):
        seen.fit(2, ckpt_path=tmp_path / "plain.ckpt")
    later = {step: seen.recorder.weights[step] for step in range(NUM_BATCHES + 1, NUM_STEPS + 1)}
    assert counts(seen.callback) == (NUM_BATCHES, NUM_BATCHES)
    assert_same(full_average(seen.callback), plain_average(later))
