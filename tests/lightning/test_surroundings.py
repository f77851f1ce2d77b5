"""What stands around a callback: command lines, pickles, both Lightning packages, tuners, spawned processes."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as lightning
import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_avg_fn

from sharded_avg import EMA, ConfigError, PowerAverage
from sharded_avg.errors import EngineVersionError
from sharded_avg.lightning import EMAWeightAveraging, WeightAveraging
from sharded_avg.lightning.trainers import callback_class, check

from .modules import NUM_BATCHES, Tiny, Tunable, of_package
from .reference import DECAY, NUM_STEPS, assert_same, plain_average, plain_training
from .runs import QUIET, Recorder, full_weights, module, run, trainer
from .strategies import STRATEGIES, among
from .watching import At, counts, full_average

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def expected_average(num_steps: int = NUM_STEPS, **options: Any) -> dict[str, Tensor]:
    return plain_average(plain_training(num_steps, **options)[1])


# --- LightningCLI ---------------------------------------------------------------------------------------------------

EVERYTHING = {  # no value is the default
    "device": "cpu",
    "use_buffers": False,
    "decay": DECAY,
    "update_every_n_steps": 2,
    "update_starting_at_step": 1,
    "update_starting_at_epoch": 1,
    "evaluate_with": "both",
    "raw_prefix": "live_",
    "end_with": "raw",
    "strict": False,
    "skip_nonfinite": True,
    "log_every_n_updates": 3,
}
CONFIG = """
trainer:
  accelerator: cpu
  max_epochs: 2
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: {root}
  callbacks: {callbacks}
"""


def built(package: str, root: Path, callbacks: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, str]:
    """The callback of a fit that LightningCLI was told of in YAML, and the YAML that it wrote beside the run."""
    monkeypatch.setattr(sys, "argv", ["train.py"])  # or Lightning takes pytest's arguments for the user's
    path = root / "asked.yaml"
    path.write_text(CONFIG.format(root=root, callbacks=callbacks))
    command_line = importlib.import_module(f"{package}.cli").LightningCLI
    cli = command_line(of_package(Tiny, package), run=False, args=["--config", str(path)], seed_everything_default=0)
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, WeightAveraging)]
    cli.trainer.fit(cli.model)
    return callback, (root / "config.yaml").read_text()


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")  # Lightning's calls
@pytest.mark.parametrize("package", PACKAGES)
class TestCommandLine:
    def test_every_argument(self, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """From a list of callbacks; none of the arguments has its default."""
        for cls in (EMAWeightAveraging, WeightAveraging):
            defaults = {name: p.default for name, p in inspect.signature(cls).parameters.items()}
            assert not any(defaults.get(name) == value for name, value in EVERYTHING.items())
        entry = [{"class_path": "sharded_avg.lightning.EMAWeightAveraging", "init_args": EVERYTHING}]
        callback, written = built(package, tmp_path, repr(entry).replace("True", "true"), monkeypatch)
        assert callback.rule == EMA(decay=DECAY)
        for name, value in EVERYTHING.items():
            assert name == "decay" or getattr(callback, name) == value
            assert re.search(rf"^ +{name}: {str(value).lower()}$", written, re.MULTILINE), written
        assert counts(callback) == (2, NUM_STEPS)  # after the steps 4 and 6 of 0 to 7

    def test_rule_by_class_path(self, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A single callback, not in a list."""
        rule = {"class_path": "sharded_avg.EMA", "init_args": {"decay": DECAY, "warmup": True}}
        entry = {"class_path": "sharded_avg.lightning.WeightAveraging", "init_args": {"rule": rule}}
        callback, written = built(package, tmp_path, repr(entry).replace("True", "true"), monkeypatch)
        assert callback.rule == EMA(decay=DECAY, warmup=True)
        assert "class_path: sharded_avg.EMA" in written
        assert counts(callback) == (NUM_STEPS, NUM_STEPS)

    def test_several_rules(self, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        rules = {
            "short": {"class_path": "sharded_avg.EMA", "init_args": {"decay": DECAY}},
            "long": {"class_path": "sharded_avg.PowerAverage", "init_args": {"power": 2.0}},
        }
        snapshots = {"folder": str(tmp_path / "snapshots"), "every_steps": NUM_STEPS, "dtype": "bfloat16"}
        settings = {"rule": rules, "end_with": "long", "evaluate_with": "all", "snapshots": snapshots}
        entry = {"class_path": "sharded_avg.lightning.WeightAveraging", "init_args": settings}
        callback, _ = built(package, tmp_path, repr(entry), monkeypatch)
        assert callback.rule == {"short": EMA(decay=DECAY), "long": PowerAverage(2.0)}
        assert callback.average.names == ("short", "long")
        assert [path.name for path in (tmp_path / "snapshots").iterdir()] == [f"step-{NUM_STEPS:09d}"]


def test_functions_and_rules_are_not_for_the_ema() -> None:
    """Absent ones are what jsonargparse passes; present ones are a mistake."""
    assert EMAWeightAveraging(decay=DECAY, avg_fn=None, multi_avg_fn=None).rule == EMA(decay=DECAY)
    with pytest.raises(ConfigError, match="for \\['avg_fn'\\], use WeightAveraging"):
        EMAWeightAveraging(avg_fn=get_ema_avg_fn(DECAY))


# --- copies ---------------------------------------------------------------------------------------------------------


def copies(callback: Any) -> list[Any]:
    return [copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))]


def test_copies_of_a_callback(tmp_path: Path) -> None:
    """P08, L15: copied and pickled before, during and after training, it has its settings, and nothing of the run."""
    callback, made = EMAWeightAveraging("cpu", False, DECAY, 2, 1, evaluate_with="both", end_with="raw"), []
    made += copies(callback)
    moments = ("on_fit_start", "on_train_start", "on_validation_epoch_end", "on_train_epoch_end", "on_train_end")
    looks = [At(moment, lambda t: made.extend(copies(callback))) for moment in moments]
    trainer(tmp_path, "single", [callback, *looks]).fit(module("single"))
    made += copies(callback)
    assert len(made) == 2 * (1 + 1 + 1 + 4 + 2 + 1 + 1)  # two epochs have two passes of validation each
    settings = {name: value for name, value in vars(EMAWeightAveraging()).items() if not name.startswith("_")}
    for other in made:
        assert other.average is None
        for name in settings.keys() - {"holdings", "current_epoch"}:
            assert getattr(other, name) == getattr(callback, name)
    trainer(tmp_path, "single", [made[-1]]).fit(module("single"))
    assert_same(full_average(made[-1]), full_average(callback))
    assert counts(made[-1]) == counts(callback)


def test_copies_of_a_trainer(tmp_path: Path) -> None:
    """With the hooks for saving in place: the copy trains on its own, and saves what is its own."""
    fitted, model = trainer(tmp_path, "single", [EMAWeightAveraging(decay=DECAY)]), module("single")
    fitted.fit(model)
    path = tmp_path / "copy.ckpt"
    for another in (copy.deepcopy(fitted), pickle.loads(pickle.dumps(fitted))):
        (callback,) = [c for c in another.callbacks if isinstance(c, WeightAveraging)]
        assert callback is not fitted.callbacks[0]
        assert callback.average is None
        another.fit_loop.max_epochs = 3
        another.fit(fresh := module("single"))
        assert counts(callback) == (NUM_BATCHES, NUM_BATCHES)
        another.save_checkpoint(path)
        saved = torch.load(path, weights_only=True)
        assert_same(saved["state_dict"], dict(fresh.state_dict()))
        assert int(saved["averaging_state"]["n_averaged"]) == NUM_BATCHES
    assert counts(fitted.callbacks[0]) == (NUM_STEPS, NUM_STEPS)
    fitted.save_checkpoint(path)
    assert_same(torch.load(path, weights_only=True)["state_dict"], dict(model.state_dict()))


# --- both packages --------------------------------------------------------------------------------------------------


def fit_in_the_other_package(tmp_path: Path, name: str) -> dict[str, Any]:
    other, path = "pytorch_lightning", tmp_path / "half.ckpt"
    first = trainer(tmp_path, name, [EMAWeightAveraging(decay=DECAY)], package=other, max_epochs=1)
    model = module(name, package=other)
    first.fit(model)
    first.save_checkpoint(path)
    callback = EMAWeightAveraging(decay=DECAY)
    fitted = trainer(tmp_path, name, [callback], package=other)
    fitted.fit(module(name, package=other), ckpt_path=path)
    assert type(fitted).__module__.startswith(other)
    return {"average": full_average(callback), "end": full_weights(fitted), "counts": counts(callback)}


@among("single", "fsdp2", "deepspeed_2")
def test_in_the_other_package(name: str, tmp_path: Path) -> None:
    """One callback class for both: trained, saved and resumed in pytorch_lightning."""
    for seen in run(name, fit_in_the_other_package, tmp_path, name=name):
        assert_same(seen["average"], expected_average())
        assert_same(seen["end"], expected_average())
        assert seen["counts"] == (NUM_STEPS, NUM_STEPS)


def test_a_callback_that_is_in_no_list(tmp_path: Path) -> None:
    callback = EMAWeightAveraging(decay=DECAY)
    settings = QUIET | {"accelerator": "cpu", "devices": 1, "default_root_dir": tmp_path}
    lightning.Trainer(callbacks=callback, **settings).fit(module("single"))
    assert_same(full_average(callback), expected_average())


@pytest.mark.parametrize("present", PACKAGES)
def test_one_package_is_enough(present: str) -> None:
    """And with none, the error says what to install."""

    def find(name: str) -> Any:
        return importlib.util.find_spec(name) if present.startswith(name) else None

    with mock.patch("sharded_avg.lightning.trainers.find_spec", find):
        assert callback_class().__bases__ == (importlib.import_module(present).Callback,)
    with (
        mock.patch("sharded_avg.lightning.trainers.find_spec", return_value=None),
        pytest.raises(ImportError, match=r"needs lightning>=2\.6.*none is installed\. Install it with: pip install '"),
    ):
        callback_class()


@pytest.fixture
def left_out_anew() -> Iterator[None]:
    """What the test finds too old is forgotten after it."""
    yield
    callback_class()


def test_an_old_one_beside_a_good_one_is_told_to_who_imported_it(
    left_out_anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its Trainer might train without averaging, in silence. Who uses the good one is let be."""
    with monkeypatch.context() as patch:
        patch.setattr("sharded_avg.lightning.trainers.installed_version", lambda name: "1.9.5")
        patch.delitem(sys.modules, "pytorch_lightning")  # nobody has imported it
        assert callback_class().__bases__ == (lightning.Callback,)
        assert "pytorch_lightning" not in sys.modules
        EMAWeightAveraging(decay=DECAY)
    with monkeypatch.context() as patch:
        patch.setattr("pytorch_lightning.__version__", "1.9.5")
        assert callback_class().__bases__ == (lightning.Callback,)
        with pytest.warns(
            UserWarning, match=r"pytorch_lightning 1\.9\.5 is too old.*pip install 'pytorch-lightning>=2"
        ):
            EMAWeightAveraging(decay=DECAY)
        EMAWeightAveraging(decay=DECAY)  # once


def test_another_copy_than_the_installed_one_is_too_old(left_out_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an installer wrote is of the one, and what is first on the path is the other."""
    old = mock.Mock(__version__="1.9.5", Callback=lightning.Callback)
    with monkeypatch.context() as patch:
        for package in PACKAGES:
            patch.delitem(sys.modules, package)
        patch.setattr("sharded_avg.lightning.trainers.importlib.import_module", lambda name: old)
        with pytest.raises(EngineVersionError, match=r"pytorch_lightning 1\.9\.5 is too old"):
            callback_class()


def test_old_ones_are_told_in_one_sentence(left_out_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        for package in PACKAGES:
            patch.setattr(f"{package}.__version__", "2.2.0")
        told = (
            "and lightning.pytorch 2.2.0 is too old, pytorch_lightning 2.2.0 is too old. Install it with: pip install"
        )
        with pytest.raises(EngineVersionError, match=re.escape(told)) as error:
            callback_class()
    assert str(error.value).count("pip install") == 1


def test_the_supported_range_is_one_everywhere() -> None:
    """P15: in the package's metadata, in its errors, and in the versions that these tests run with."""
    required = [line for line in metadata.requires("sharded-avg") or [] if "lightning" in line.partition(";")[0]]
    ranges = {re.split(r"[;\s]", line.replace("pytorch-lightning", "lightning"))[0] for line in required}
    assert {name for name in ranges if not name.startswith("sharded-avg[")} == {"lightning>=2.6"}  # its extras' extras
    tested = re.search(r"^lightning==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert tested is not None
    too_new = mock.Mock(spec=["callbacks", "strategy"])
    with pytest.raises(EngineVersionError, match=rf"no Mock\.save_checkpoint.*lightning>=2\.6,<={tested[1]}, or"):
        check(too_new)


def tuned(tmp_path: Path, name: str, how: str) -> dict[str, Any]:
    """A fit with a tuner: what was averaged, and the raw weights of the fit."""
    from lightning.pytorch.tuner.tuning import Tuner

    callback, recorder, extra = EMAWeightAveraging(decay=DECAY), Recorder(), []
    if how == "lr callback":
        extra = [lightning.callbacks.LearningRateFinder(num_training_steps=3, early_stop_threshold=None)]
    elif how == "lr in the middle":
        extra = [FindLearningRateEachEpoch(num_training_steps=3, early_stop_threshold=None)]
    fitted, model = trainer(tmp_path, name, [callback, *extra, recorder]), module(name, Tunable)
    if how == "lr":
        Tuner(fitted).lr_find(model, num_training=3, early_stop_threshold=None)
    elif how == "batch size":
        Tuner(fitted).scale_batch_size(model, max_trials=2, steps_per_trial=1)
    assert how not in ("lr", "batch size") or (callback.average is None and not recorder.weights)
    fitted.fit(model)
    return {"counts": counts(callback), "average": full_average(callback), "weights": recorder.weights}


class FindLearningRateEachEpoch(lightning.callbacks.LearningRateFinder):
    """As Lightning's documentation has it for finetuning: searches again while a fit goes on."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch:
            self.lr_find(trainer, pl_module)


@pytest.mark.parametrize(
    ("name", "how"),  # under other strategies Lightning's tuners cannot read what they saved, or refuse
    [
        ("single", "lr"),
        ("single", "lr callback"),
        ("single", "lr in the middle"),
        ("single", "batch size"),
        ("ddp", "lr callback"),
        ("fsdp_full", "lr in the middle"),
    ],
)
def test_tuners_leave_no_trace_in_the_average(name: str, how: str, tmp_path: Path) -> None:
    """Their trial steps are no updates, and the weights that they bring back are what is averaged."""
    for seen in run(name, tuned, tmp_path, name=name, how=how):
        assert seen["counts"] == (NUM_STEPS, NUM_STEPS)
        assert sorted(seen["weights"]) == list(range(1, NUM_STEPS + 1))
        assert_same(seen["average"], plain_average(seen["weights"]))
    assert list(tmp_path.glob(".*.ckpt")) == []


class RollBack(lightning.Callback):
    """Saves after the second step, and goes back there before the second epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            trainer._checkpoint_connector._restore_modules_and_callbacks(self.path)
            trainer._checkpoint_connector.resume_end()


def test_a_checkpoint_read_in_the_middle_of_a_fit(tmp_path: Path) -> None:
    """If it is an earlier one, the average goes back with the weights."""
    callback, recorder = EMAWeightAveraging(decay=DECAY), Recorder()
    trainer(tmp_path, "single", [callback, recorder, RollBack(tmp_path / "2.ckpt")]).fit(module("single"))
    assert counts(callback) == (2 + NUM_BATCHES, 2 + NUM_BATCHES)
    kept = {step: weights for step, weights in recorder.weights.items() if step not in (3, 4)}
    assert not torch.equal(recorder.weights[5]["head.bias"], plain_training(5)[1][5]["head.bias"])
    assert_same(full_average(callback), plain_average(kept))


def test_fast_dev_run(tmp_path: Path) -> None:
    callback = EMAWeightAveraging(decay=DECAY)
    fitted, model = trainer(tmp_path, "single", [callback], fast_dev_run=2), module("single")
    fitted.fit(model)
    assert counts(callback) == (2, 2)
    assert_same(dict(model.state_dict()), expected_average(2))


# --- processes that are spawned -------------------------------------------------------------------------------------


class SaveAtEnd(lightning.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint(self.path)


def fit_spawned(tmp_path: Path) -> dict[str, Any]:
    """Half a run in spawned processes, and its second half here."""
    path, callback, model = tmp_path / "half.ckpt", EMAWeightAveraging(decay=DECAY), module("ddp_spawn")
    trainer(tmp_path, "ddp_spawn", [callback, SaveAtEnd(path)], max_epochs=1).fit(model)
    spawned = callback.average
    resumed = EMAWeightAveraging(decay=DECAY)
    trainer(tmp_path, "single", [resumed]).fit(module("single"), ckpt_path=path)
    return {
        "end": {name: value.clone() for name, value in model.state_dict().items()},
        "spawned": spawned,
        "average": full_average(resumed),
        "counts": counts(resumed),
    }


@pytest.mark.own_processes
def test_spawned(tmp_path: Path) -> None:
    """P08: the average comes back to the main process in its module, and the raw weights are in the checkpoint."""
    assert STRATEGIES["ddp_spawn"].where == "fresh"
    (seen,) = run("ddp_spawn", fit_spawned, tmp_path)
    assert_same(seen["end"], expected_average(NUM_BATCHES))
    assert seen["spawned"] is None  # it was in processes that are gone
    assert_same(seen["average"], expected_average())
    assert seen["counts"] == (NUM_STEPS, NUM_STEPS)
