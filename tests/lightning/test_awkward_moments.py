"""Saves, signals, interruptions and failures at the moments that nobody plans for: each copy stays what it was.

Whatever comes between, a file has the raw weights under their name and the average under its own, a module that is
trained on goes on from its raw weights, and what belongs to another module is not mixed in.
"""

from __future__ import annotations

import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any
from unittest import mock

import lightning.pytorch as lightning
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from sharded_avg import ShardedAverage, load_averaged_state_dict
from sharded_avg.errors import CheckpointError, PeerError, UnsupportedModelError
from sharded_avg.exchange import handover, ways
from sharded_avg.lightning import EMAWeightAveraging, resuming, saving
from sharded_avg.lightning.weights import Weights
from sharded_avg.weights import aside as replaced

from .modules import NUM_BATCHES
from .runs import Recorder, full_weights, module, run, trainer
from .test_every_strategy import DECAY, At, full_average, plain_average, plain_loss, with_weights
from .test_failing import stopping
from .test_fit_again import Seen, among, counts
from .test_harness import NUM_STEPS, assert_same, plain_training
from .test_surroundings import Tunable

State = dict[str, Tensor]


def raw_after(step: int) -> State:
    return plain_training(step)[1][step]


def average_after(step: int) -> State:
    return plain_average(plain_training(step)[1])


def assert_holds(path: Path, step: int) -> None:
    """Both copies after this step."""
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] == step
    assert_same(saved["current_model_state"], raw_after(step))
    assert_same(saved["state_dict"], average_after(step))
    assert int(saved["averaging_state"]["n_averaged"]) == step


def averaging(**settings: Any) -> EMAWeightAveraging:
    return EMAWeightAveraging(decay=DECAY, **settings)


def saver_of_exceptions(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "exception", save_on_exception=True, save_top_k=0, enable_version_counter=False)


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


# -- between reading a checkpoint and the first step -------------------------------------------------------------------


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


# -- whose weights -----------------------------------------------------------------------------------------------------


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


# -- interruptions and signals between any two lines -------------------------------------------------------------------

CODES: dict[CodeType, str] = {
    **{
        vars(Weights)[name].__code__: name for name in ("enter", "leave", "finish", "unfinish", "_restored", "_go_back")
    },
    **{vars(Weights)[name].__wrapped__.__code__: name for name in ("raw", "_moving")},
    **{vars(ShardedAverage)[name].__code__: name for name in ("raw_weights", "copy_to_model", "restore_raw")},
    **{vars(handover)[name].__wrapped__.__code__: name for name in ("raw_weights", "copy_to_model", "restore_raw")},
    replaced.bring_back.__code__: "bring_back",
    replaced.set_aside.__code__: "set_aside",
}


class Lines:
    """Does something at one of the lines that exchange weights: at the `at`-th of those seen in a fit."""

    def __init__(self, weights_of: Callable[[], Weights | None], at: int | None, act: Callable[[], None]) -> None:
        self.weights_of, self.at, self.act = weights_of, at, act
        self.seen: list[tuple[Any, ...]] = []

    def __enter__(self) -> Lines:
        self._before = sys.gettrace()
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _called(self, frame: Any, event: str, argument: Any) -> Any:
        return self._line if frame.f_code in CODES else None

    def _line(self, frame: Any, event: str, argument: Any) -> Any:
        if event == "line":
            weights = self.weights_of()
            state = None if weights is None else (weights._swap is None, weights._kept is None)
            self.seen.append((CODES[frame.f_code], frame.f_lineno, state))
            if self.at == len(self.seen) - 1:
                self.act()
        return self._line


class Disturbed:
    """Two fits of a module, with saves while it holds the average, during and after the first."""

    def __init__(self, folder: Path, at: int | None, act: Callable[[Disturbed], None]) -> None:
        self.folder, self.ours, self.recorder = folder, averaging(), Recorder()
        in_validation = At("on_validation_epoch_end", lambda _: self.save("validation"))
        callbacks = [self.recorder, self.ours, in_validation, saver_of_exceptions(folder)]
        self.trainer = trainer(folder, "single", callbacks, limit_train_batches=2, limit_val_batches=1, max_epochs=1)
        self.module = module("single")
        self.lines = Lines(lambda: self.ours.holdings.training, at, lambda: act(self))

    def save(self, name: str) -> Path:
        path = self.folder / f"{name}.ckpt"
        self.trainer.save_checkpoint(path)
        return path

    def run(self) -> None:
        with self.lines:
            self.trainer.fit(self.module)
            self.save("after")
            self.trainer.fit_loop.max_epochs = 2
            self.trainer.fit(self.module)

    def assert_saved(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        step = saved["global_step"]
        assert_same(saved["current_model_state"], self.recorder.weights[step])
        assert_same(saved["state_dict"], self.average(step))

    def average(self, step: int) -> State:
        return plain_average({past: self.recorder.weights[past] for past in range(1, step + 1)})


def undisturbed(folder: Path) -> tuple[Disturbed, dict[tuple[Any, ...], int]]:
    """The whole run, and: every line in every state of the weights -> when it comes first."""
    whole = Disturbed(folder, None, lambda _: None)
    whole.run()
    assert {name for name, _, _ in whole.lines.seen} == set(CODES.values())
    assert whole.trainer.global_step == 4
    whole.assert_saved(folder / "after.ckpt")
    assert_same(dict(whole.module.state_dict()), whole.average(4))
    return whole, {line: whole.lines.seen.index(line) for line in whole.lines.seen}


def interrupt(_: Disturbed) -> None:
    raise KeyboardInterrupt


@pytest.mark.own_processes
def test_interrupted_at_any_line(tmp_path: Path) -> None:
    """P18: after Ctrl-C at each line that moves weights, what is saved then, and once more later, has both copies."""
    _, lines = undisturbed(tmp_path)
    for line, at in lines.items():
        folder = tmp_path / str(at)
        run = Disturbed(folder, at, interrupt)
        try:
            in_fit = True
            with stopping(KeyboardInterrupt):
                try:
                    run.run()
                except KeyboardInterrupt:  # in the save after fit, where Lightning does not catch it
                    in_fit = False
                    raise SystemExit from None
            if in_fit:
                run.assert_saved(folder / "exception.ckpt")
            run.assert_saved(run.save("later"))
            step = run.trainer.global_step
            held = run.average(step) if run.ours.holdings.training._kept is not None else run.recorder.weights[step]
            assert_same(dict(run.module.state_dict()), held)
        except BaseException as error:
            raise AssertionError(f"interrupted at {line}") from error


@pytest.mark.own_processes
def test_signal_at_any_line(tmp_path: Path) -> None:
    """As before a SLURM requeue, a handler saves: it has both copies, and the run goes on as if nothing had been."""
    whole, lines = undisturbed(tmp_path)
    for line, at in lines.items():
        folder = tmp_path / str(at)
        run = Disturbed(folder, at, lambda _: signal.raise_signal(signal.SIGUSR1))
        listening = signal.signal(signal.SIGUSR1, lambda *_, run=run: run.save("requeue"))
        try:
            run.run()
            run.assert_saved(folder / "requeue.ckpt")
            run.assert_saved(folder / "after.ckpt")
            run.assert_saved(run.save("later"))
            assert counts(run.ours) == (4, 4)
            assert_same(full_average(run.ours), run.average(4))
            assert_same(dict(run.module.state_dict()), run.average(4))
            assert_same(run.recorder.weights[4], whole.recorder.weights[4])
        except BaseException as error:
            raise AssertionError(f"signal at {line}") from error
        finally:
            signal.signal(signal.SIGUSR1, listening)


@pytest.mark.own_processes
def test_signal_in_the_middle_of_an_exchange(tmp_path: Path) -> None:
    """Where live weights, average and scratch are each half of something; the save comes when they are whole."""
    copy, left = ways.InPlace._copy, [1]

    def copy_and_signal(way: Any, to: Any, source: Any, then: int) -> None:
        copy(way, to, source, then)
        if fitted.global_step == NUM_BATCHES and then == 2 and left:
            left.pop()
            signal.raise_signal(signal.SIGUSR1)

    fitted = trainer(tmp_path, "single", [averaging()])
    listening = signal.signal(signal.SIGUSR1, lambda *_: fitted.save_checkpoint(tmp_path / "requeue.ckpt"))
    try:
        with mock.patch.object(ways.InPlace, "_copy", copy_and_signal):
            fitted.fit(model := module("single"))
    finally:
        signal.signal(signal.SIGUSR1, listening)
    assert not left
    assert_holds(tmp_path / "requeue.ckpt", NUM_BATCHES)
    assert_same(dict(model.state_dict()), average_after(NUM_STEPS))


class SignalsWhileWriting(TorchCheckpointIO):
    """A signal comes while a file is written."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        if Path(path).name == "outer.ckpt":
            signal.raise_signal(signal.SIGUSR1)
        super().save_checkpoint(checkpoint, path, storage_options)


@pytest.mark.own_processes
@pytest.mark.parametrize("moment", ["on_train_epoch_end", "on_validation_epoch_end", "on_train_end"])
def test_a_save_in_the_middle_of_a_save(moment: str, tmp_path: Path) -> None:
    saver = At(moment, lambda t: t.save_checkpoint(tmp_path / "outer.ckpt"))
    plugins = [SignalsWhileWriting()]
    fitted = trainer(tmp_path, "single", [averaging(), saver], max_epochs=1, plugins=plugins)
    listening = signal.signal(signal.SIGUSR1, lambda *_: fitted.save_checkpoint(tmp_path / "inner.ckpt"))
    try:
        fitted.fit(model := module("single"))
    finally:
        signal.signal(signal.SIGUSR1, listening)
    assert_holds(tmp_path / "inner.ckpt", NUM_BATCHES)
    assert_holds(tmp_path / "outer.ckpt", NUM_BATCHES)
    assert_same(dict(model.state_dict()), average_after(NUM_BATCHES))


# -- what fails --------------------------------------------------------------------------------------------------------


class FullDisk(TorchCheckpointIO):
    def save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        raise OSError("disk full")


@pytest.mark.own_processes
def test_a_save_that_fails_and_is_caught(tmp_path: Path) -> None:
    """Validation goes on with the average, training with the raw weights, and at the end the average is there."""
    seen: list[State] = []

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


def _without_calls(state: State) -> State:
    return {key: value for key, value in state.items() if key != "calls"}
