"""What is in checkpoints, whoever saves them and whenever: the average and the raw weights of one step, by value.

Every expectation is of plain torch: the weights after a step of a plain loop, and their average by the formula. Tests
compare bits, of all tensors under all keys.
"""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import Tensor

from sharded_avg.lightning import EMAWeightAveraging

from .modules import NUM_BATCHES, Tiny
from .reference import DECAY, NUM_STEPS, assert_same, average_after, plain_loss, raw_after, with_weights
from .runs import full_weights, module, run, trainer
from .saved_files import FILES, FOLDERS, assert_average_in, assert_holds, fail_and_save, inspected
from .strategies import STRATEGIES, among
from .watching import At, full_average

# -- files: every moment, every order ----------------------------------------------------------------------------------

MOMENTS = {  # and the steps that weights and average then have had, in the last epoch
    "on_validation_start": NUM_STEPS,
    "on_validation_batch_end": NUM_STEPS,
    "on_validation_epoch_end": NUM_STEPS,
    "on_validation_end": NUM_STEPS,
    "on_train_epoch_start": NUM_BATCHES,
    "on_train_epoch_end": NUM_STEPS,
    "on_train_end": NUM_STEPS,
}


class SavesItself(Tiny):
    """Its own hooks save, too, which run after those of the callbacks."""

    path: Path

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.trainer.save_checkpoint(self.path)


def savers(folder: Path) -> list[At]:
    paths = {moment: folder / f"{moment}.ckpt" for moment in MOMENTS}
    return [At(moment, lambda t, path=path: t.save_checkpoint(path)) for moment, path in paths.items()]


def save_at_every_moment(tmp_path: Path, name: str) -> dict[str, Any]:
    model, callback = module(name, SavesItself), EMAWeightAveraging(decay=DECAY)
    model.path = tmp_path / "module.ckpt"
    fitted = trainer(tmp_path, name, [*savers(tmp_path / "before"), callback, *savers(tmp_path / "after")])
    fitted.fit(model)
    end, keys = full_weights(fitted), list(model.state_dict())
    if name != "fsdp_full":  # FSDP1 gathers nothing any more, with or without an average
        fitted.save_checkpoint(tmp_path / "fitted.ckpt")
    return {"end": end, "again": full_weights(fitted), "keys": keys, "state": callback.state_dict()}


@among(*FILES)
def test_each_copy_under_its_name_at_every_moment(name: str, tmp_path: Path) -> None:
    """L7, P18, P25, P98, P109: before our callback and after it, swapped and not, at the end of training and after.

    The module's own state has no more keys than without a callback, and that of the callback no tensors.
    """
    for seen in run(name, save_at_every_moment, tmp_path, name=name):
        assert_same(seen["end"], average_after(NUM_STEPS))
        assert_same(seen["again"], average_after(NUM_STEPS))
        assert seen["keys"] == list(Tiny().state_dict()) or name == "fsdp_full"
        assert not any(isinstance(value, (Tensor, dict)) for value in seen["state"].values())
    for place in ("before", "after"):
        for moment, step in MOMENTS.items():
            assert_holds(tmp_path / place / f"{moment}.ckpt", step)
    for path in ["module.ckpt"] + ["fitted.ckpt"] * (name != "fsdp_full"):
        assert_holds(tmp_path / path, NUM_STEPS)


# -- ModelCheckpoint ---------------------------------------------------------------------------------------------------


def loss_of_average(step: int, first: int = 100) -> float:
    return plain_loss(with_weights(average_after(step)), first=first)


def fit_keeping_the_best(tmp_path: Path, name: str, save_last: Any) -> dict[str, Any]:
    """Three epochs, of which the two best are kept, and the last; and a second run from that, of one epoch more."""
    folder, callback = tmp_path / "kept", EMAWeightAveraging(decay=DECAY)
    listings: list[set[str]] = []
    keeper = ModelCheckpoint(folder, "{step}", monitor="val_loss", mode="max", save_top_k=2, save_last=save_last)
    listing = At("on_train_epoch_start", lambda t: listings.append(names_in(folder)))
    trainer(tmp_path, name, [keeper, callback, listing], max_epochs=3).fit(module(name))
    scores = {Path(path).name: float(score) for path, score in keeper.best_k_models.items()}
    resumed, again = trainer(tmp_path, name, [EMAWeightAveraging(decay=DECAY)], max_epochs=4), []
    resumed.callbacks.append(At("on_train_end", lambda t: again.append(full_average(t.callbacks[0]))))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
        resumed.fit(module(name), ckpt_path=keeper.last_model_path)
    return {
        "scores": scores,
        "best": Path(keeper.best_model_path),
        "last": Path(keeper.last_model_path),
        "listings": [*listings, names_in(folder)],
        "again": again[0],
    }


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*")}


@pytest.mark.each_value
@pytest.mark.parametrize("save_last", [True, "link"])
@among("single", *FOLDERS)
def test_the_best_and_the_last(name: str, save_last: Any, tmp_path: Path) -> None:
    """P05, P06, P95: a checkpoint and its average are kept, linked, overwritten and removed as one; the last resumes.

    Its score is that of the average in it, which is what `load_from_checkpoint` and we load.
    """
    ranks = run(name, fit_keeping_the_best, tmp_path, name=name, save_last=save_last)
    steps = [NUM_BATCHES * epoch for epoch in (1, 2, 3)]
    losses = {f"step={step}.ckpt": loss_of_average(step) for step in steps}
    kept = sorted(losses, key=losses.__getitem__, reverse=True)[:2]  # on this data it grows
    first = f"step={NUM_BATCHES}.ckpt"
    assert first not in kept  # it was there, and was removed
    for seen in ranks:
        assert seen["scores"] == pytest.approx({path: losses[path] for path in kept}, rel=1e-6)
        assert seen["listings"][1] == {first, "last.ckpt"}
        assert seen["listings"][-1] == {*kept, "last.ckpt"}
        assert seen["best"].name == kept[0]
        assert_same(seen["again"], average_after(4 * NUM_BATCHES))
    folder = tmp_path / "kept"
    assert (folder / "last.ckpt").is_symlink() == (save_last == "link")
    steps_of = {path: step for step, path in zip(steps, losses, strict=True) if path in kept} | {"last.ckpt": steps[-1]}
    for path, step in ((folder / path, step) for path, step in steps_of.items()):
        assert path.is_dir() == STRATEGIES[name].writes_folder
        assert_average_in(path, step)
        if path.is_file():
            assert_holds(path, step)
            loaded = Tiny.load_from_checkpoint(path)
            assert plain_loss(loaded, first=100) == pytest.approx(losses[f"step={step}.ckpt"], rel=1e-6)


def save_weights_only(tmp_path: Path, name: str) -> float:
    keeper = ModelCheckpoint(tmp_path / "kept", "best", monitor="val_loss", mode="max", save_weights_only=True)
    trainer(tmp_path, name, [EMAWeightAveraging(decay=DECAY), keeper]).fit(module(name))
    fresh = trainer(tmp_path, name, [EMAWeightAveraging(decay=DECAY)])
    (metrics,) = fresh.test(module(name), ckpt_path=keeper.best_model_path, verbose=False)
    return float(metrics["test_loss"])


@among("single", "ddp", "fsdp2")
def test_weights_only(name: str, tmp_path: Path) -> None:
    """L5: the weights that the metric was measured on, and nothing else in a file; evaluating them needs no advice."""
    expected = loss_of_average(NUM_STEPS, first=200)
    for loss in run(name, save_weights_only, tmp_path, name=name):
        assert loss == pytest.approx(expected, rel=1e-6)
    path = tmp_path / "kept" / "best.ckpt"
    assert_average_in(path, NUM_STEPS)
    assert inspected(path)["averages"]["average"]["n_averaged"] == NUM_STEPS
    if path.is_file():
        checkpoint = torch.load(path, weights_only=True)
        assert_same(dict(checkpoint["state_dict"]), average_after(NUM_STEPS))
        assert not {"current_model_state", "averaging_state", "optimizer_states"} & checkpoint.keys()
    if name == "single":
        fresh = trainer(tmp_path, "single", [EMAWeightAveraging(decay=DECAY, evaluate_with="raw")])
        with pytest.warns(UserWarning, match="its weights are the average, none are raw"):
            fresh.test(module("single"), ckpt_path=path, verbose=False)


@pytest.mark.parametrize(("moment", "step"), [("on_validation_batch_end", NUM_STEPS), ("on_train_batch_start", 5)])
@among("single", "ddp")
def test_saved_on_an_exception(name: str, moment: str, step: int, tmp_path: Path) -> None:
    """L6, P18, P67, P109: in validation and training; each copy under its name, whoever saves; raw weights after."""
    for weights in run(name, fail_and_save, tmp_path, name=name, moment=moment):
        assert_same(weights, raw_after(step))
    for at in "1234":
        assert_holds(tmp_path / f"{at}.ckpt", step)


class LateIO(TorchCheckpointIO):
    """Writes when training is over."""

    def __init__(self) -> None:
        self.training_is_over = threading.Event()

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        assert self.training_is_over.wait(timeout=60)
        super().save_checkpoint(*args, **kwargs)


def save_asynchronously(tmp_path: Path, name: str) -> list[bool]:
    late, moments = LateIO(), ("on_validation_epoch_end", "on_train_epoch_start")
    paths = {moment: tmp_path / f"{moment}.ckpt" for moment in moments}
    own = [At(moment, lambda t, path=path: t.save_checkpoint(path)) for moment, path in paths.items()]
    early: list[bool] = []

    def release(trainer: Any) -> None:
        early.append(any(path.exists() for path in paths.values()))
        late.training_is_over.set()

    callbacks = [EMAWeightAveraging(decay=DECAY), *own, At("on_train_end", release)]
    trainer(tmp_path, name, callbacks, plugins=[AsyncCheckpointIO(late)]).fit(module(name))
    return early


@among("single", "ddp")
def test_asynchronous_saving(name: str, tmp_path: Path) -> None:
    """P23: written long after, what lands is of the moment of the call."""
    by_rank = run(name, save_asynchronously, tmp_path, name=name)
    assert by_rank[0] == [False]  # the rank that writes
    assert_holds(tmp_path / "on_train_epoch_start.ckpt", NUM_BATCHES)
    assert_holds(tmp_path / "on_validation_epoch_end.ckpt", NUM_STEPS)


def save_before_the_first_update(tmp_path: Path, name: str) -> float:
    callback, path = EMAWeightAveraging(decay=DECAY, update_starting_at_step=NUM_STEPS - 1), tmp_path / "early.ckpt"
    own = At("on_validation_epoch_end", lambda t: t.current_epoch or t.save_checkpoint(path))
    trainer(tmp_path, name, [callback, own]).fit(module(name))
    fresh = trainer(tmp_path, name, [EMAWeightAveraging(decay=DECAY)])
    (metrics,) = fresh.test(module(name), ckpt_path=path, verbose=False)
    assert callback.average.n_averaged == 1
    return float(metrics["test_loss"])


@among("single", "ddp", "fsdp2")
def test_before_the_first_update(name: str, tmp_path: Path) -> None:
    """L2, P03, P10: there is no average, and nothing in its place; the weights are those of the moment."""
    expected = plain_loss(with_weights(raw_after(NUM_BATCHES)), first=200)
    for loss in run(name, save_before_the_first_update, tmp_path, name=name):
        assert loss == pytest.approx(expected, rel=1e-6)
    path = tmp_path / "early.ckpt"
    assert not (path / "average").exists()
    if path.is_file():
        checkpoint = torch.load(path, weights_only=True)
        assert not {"current_model_state", "averaging_state"} & checkpoint.keys()
        assert_same(Tiny.load_from_checkpoint(path).state_dict(), raw_after(NUM_BATCHES))


class Renames(Tiny):
    """Its file has other names than the module, one entry less, and one more; each hook takes it all back."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.called: list[str] = []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.called.append("save")
        state = checkpoint["state_dict"]
        if state:
            state["top.weight"] = state.pop("head.weight")
            del state["calls"]
        checkpoint["top"] = {"is": "head"}
        del checkpoint["loops"]["predict_loop"], checkpoint["lr_schedulers"]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.called.append("load")
        state = checkpoint["state_dict"]
        state[f"{checkpoint['top'].pop('is')}.weight"] = state.pop("top.weight")
        state["calls"] = torch.tensor(NUM_BATCHES)
        checkpoint["lr_schedulers"] = []
        del checkpoint["top"]


def fit_renaming(tmp_path: Path, name: str) -> dict[str, Any]:
    path, callback = tmp_path / "renamed.ckpt", EMAWeightAveraging(decay=DECAY)
    own = At("on_validation_end", lambda t: t.current_epoch or t.save_checkpoint(path))
    model, again = module(name, Renames), module(name, Renames)
    trainer(tmp_path, name, [own, EMAWeightAveraging(decay=DECAY)], max_epochs=1).fit(model)
    trainer(tmp_path, name, [callback]).fit(again, ckpt_path=path)
    return {"called": (model.called, again.called), "average": full_average(callback)}


@among("single", "ddp")
def test_users_own_edits(name: str, tmp_path: Path) -> None:
    """P12: each copy is edited when it is saved and when it is loaded, on every rank equally often."""
    for seen in run(name, fit_renaming, tmp_path, name=name):
        assert seen["called"] == (["save", "save"], ["load", "load"])
        assert_same(seen["average"], average_after(NUM_STEPS))
    checkpoint = torch.load(tmp_path / "renamed.ckpt", weights_only=True)
    for key, expected in (("state_dict", average_after(NUM_BATCHES)), ("current_model_state", raw_after(NUM_BATCHES))):
        assert "head.weight" not in checkpoint[key]
        assert "calls" not in checkpoint[key]
        assert torch.equal(checkpoint[key]["top.weight"], expected["head.weight"])
    assert_same(Renames.load_from_checkpoint(tmp_path / "renamed.ckpt").state_dict(), average_after(NUM_BATCHES))


class Counts(Tiny):
    """Its hook waits for the other ranks, as one does that gathers something."""

    num_saves = 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.num_saves += 1
        self.trainer.strategy.barrier()


def fit_counting(tmp_path: Path, name: str) -> int:
    model, own = module(name, Counts), At("on_validation_end", lambda t: t.save_checkpoint(tmp_path / "x.ckpt"))
    trainer(tmp_path, name, [own, EMAWeightAveraging(decay=DECAY)], max_epochs=1).fit(model)
    return model.num_saves


@among("ddp", "fsdp_full", "fsdp2", "deepspeed_2")
def test_hooks_are_called_on_all_ranks(name: str, tmp_path: Path) -> None:
    """P12: once for each copy in a file; for folders once, as without an average. Or a hook that gathers would hang."""
    row = STRATEGIES[name]
    assert run(name, fit_counting, tmp_path, name=name) == [1 if row.writes_folder else 2] * row.world_size
