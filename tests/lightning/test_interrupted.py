"""Interruptions and signals between any two lines that move weights, and saves inside of saves.

Whatever comes between, a file has the raw weights under their name and the average under its own, and a module that is
trained on goes on from its raw weights.
"""

from __future__ import annotations

import inspect
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from sharded_avg import SWA, ShardedAverage
from sharded_avg.exchange import handover, ways
from sharded_avg.lightning.weights import Weights, _leaving
from sharded_avg.weights import aside as replaced
from tests.helpers.further import further

from .modules import NUM_BATCHES
from .reference import NUM_STEPS, assert_same, average_after, plain_average
from .runs import Recorder, module, trainer
from .saved_files import assert_holds, saver_of_exceptions
from .watching import At, averaging, counts, full_average, stopping

CODES: dict[CodeType, str] = {
    **{
        vars(Weights)[name].__code__: name for name in ("enter", "leave", "finish", "unfinish", "_restored", "_go_back")
    },
    **{vars(Weights)[name].__wrapped__.__code__: name for name in ("raw", "_moving")},
    _leaving.__wrapped__.__code__: "_leaving",
    **{vars(ShardedAverage)[name].__code__: name for name in ("raw_weights", "copy_to_model", "restore_raw")},
    **{inspect.unwrap(vars(handover)[name]).__code__: name for name in ("raw_weights", "copy_to_model", "restore_raw")},
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
        self.raised: BaseException | None = None
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

    def average(self, step: int) -> dict[str, Tensor]:
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


some_or_all = pytest.mark.parametrize("every", [pytest.param(3, id="each third"), further(1, id="each")])


def interrupt(run: Disturbed) -> None:
    """As in a notebook, what was raised stays, and with it every frame that it went through."""
    run.raised = KeyboardInterrupt()
    raise run.raised


@pytest.mark.own_processes
@some_or_all
def test_interrupted_at_any_line(every: int, tmp_path: Path) -> None:
    """P18: after Ctrl-C at each line that moves weights, what is saved then, and once more later, has both copies."""
    _, lines = undisturbed(tmp_path)
    for line, at in list(lines.items())[::every]:
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
@some_or_all
def test_signal_at_any_line(every: int, tmp_path: Path) -> None:
    """As before a SLURM requeue, a handler saves: it has both copies, and the run goes on as if nothing had been."""
    whole, lines = undisturbed(tmp_path)
    for line, at in list(lines.items())[::every]:
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


@pytest.mark.parametrize("when", ["before", "after"])
def test_interrupted_beside_the_last_line(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C before anything was copied leaves raw weights; when all is, they can still be brought back."""
    model = torch.nn.Linear(3, 5)
    average = ShardedAverage(model, SWA())
    average.update()
    with torch.no_grad():
        model.weight.add_(1)
    raw, weights, copy = model.weight.detach().clone(), Weights(average, "average", model), average.copy_to_model

    def interrupted(*args: Any, **kwargs: Any) -> None:
        if when == "after":
            copy(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(average, "copy_to_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        weights.finish()
    assert weights.exchanged == (when == "after")
    assert torch.equal(model.weight, raw) == (when == "before")
    assert weights.unfinish()
    assert torch.equal(model.weight, raw)
