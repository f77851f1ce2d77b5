"""What runs leave on the disk: files with both copies under their names, and folders."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor

import sharded_avg
from sharded_avg.commands.cli import main
from sharded_avg.lightning import EMAWeightAveraging

from .modules import Tiny
from .reference import DECAY, assert_same, average_after, raw_after
from .runs import full_weights, module, trainer
from .watching import At

FILES = ("single", "ddp", "fsdp_full")
FOLDERS = ("fsdp_sharded", "fsdp2", "deepspeed_2")


def assert_holds(path: Path, step: int) -> None:
    """A file with both copies of this step, each under its name."""
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["global_step"] == step
    assert int(checkpoint["averaging_state"]["n_averaged"]) == step
    assert_same(dict(checkpoint["state_dict"]), average_after(step))
    assert_same(dict(checkpoint["current_model_state"]), raw_after(step))


def assert_average_in(path: Path, step: int) -> None:
    """Of a checkpoint of any kind, as one who deploys it sees it."""
    found = sharded_avg.load_averaged_state_dict(path)
    expected = average_after(step)
    assert_same(found, {name: expected[name] for name in found})
    assert found.keys() >= {name for name, _ in Tiny().named_parameters()}


def inspected(path: Path) -> dict[str, Any]:
    """What `sharded-avg inspect` says."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert main(["inspect", "--json", str(path)]) == 0
    return json.loads(output.getvalue())


class OnPurposeError(Exception):
    pass


class FailsIn(lightning.Callback):
    """Raises in the second epoch, in its second batch."""

    def __init__(self, moment: str) -> None:
        setattr(self, moment, self._fail)

    def _fail(self, trainer: Any, pl_module: Any, *arguments: Any) -> None:
        batch_idx = next(value for value in reversed(arguments) if type(value) is int) if arguments else 1
        if trainer.current_epoch == 1 and batch_idx == 1:
            raise OnPurposeError


def fail_and_save(tmp_path: Path, name: str, moment: str) -> dict[str, Tensor]:
    """Lightning's two callbacks save, and one's own before and after ours."""
    own = [At("on_exception", lambda t, at=at: t.save_checkpoint(tmp_path / f"{at}.ckpt")) for at in "12"]
    keeper = ModelCheckpoint(tmp_path, "3", every_n_epochs=99, save_on_exception=True, enable_version_counter=False)
    others = [keeper, OnExceptionCheckpoint(tmp_path, "4"), FailsIn(moment)]
    fitted = trainer(tmp_path, name, [own[0], EMAWeightAveraging(decay=DECAY), own[1], *others])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`?.fit\(ckpt_path=")  # OnExceptionCheckpoint has it look for one
        with pytest.raises(OnPurposeError):
            fitted.fit(module(name))
    return full_weights(fitted)


def saver_of_exceptions(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "exception", save_on_exception=True, save_top_k=0, enable_version_counter=False)
