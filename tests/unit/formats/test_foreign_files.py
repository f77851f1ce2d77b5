"""Files of other tools as files: foreign classes in them, damage, names that read alike, ties."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sharded_avg import CheckpointError
from sharded_avg.formats.importers import find_importer
from tests.helpers.foreign import (
    AVERAGE,
    BUILDERS,
    RAW,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")


def test_foreign_classes_are_refused_and_can_be_left_out(tmp_path: Path) -> None:
    torch.save({"state_dict": RAW, "state_dict_ema": AVERAGE, "args": argparse.Namespace(lr=0.1)}, tmp_path / "f.pt")
    with pytest.raises(CheckpointError, match=r"argparse\.Namespace.*--ignore-classes"):
        find_importer(tmp_path / "f.pt")
    source = find_importer(tmp_path / "f.pt", ignore_classes=True).open()
    assert all(torch.equal(source.read(name), AVERAGE[name]) for name in AVERAGE)


class Hostile:
    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("ignore_classes", [False, True])
def test_nothing_in_a_file_runs(ignore_classes: bool, tmp_path: Path) -> None:
    hostile = Hostile()
    hostile.target = tmp_path / "made by the file"
    torch.save({"model": RAW, "ema": AVERAGE, "x": hostile}, tmp_path / "f.pt")
    if ignore_classes:
        source = find_importer(tmp_path / "f.pt", ignore_classes=True).open()
        assert all(torch.equal(source.read(name), AVERAGE[name]) for name in AVERAGE)
    else:
        with pytest.raises(CheckpointError, match=r"mkdir.*--ignore-classes"):
            find_importer(tmp_path / "f.pt")
    assert not hostile.target.exists()


def test_a_pickled_module_is_no_state_dict(tmp_path: Path) -> None:
    """YOLOv5 and Ultralytics keep the average as a module: its tensors have no keys to read them by."""
    torch.save({"model": None, "ema": nn.Linear(3, 2), "updates": 5}, tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear"):
        find_importer(tmp_path / "best.pt")
    assert find_importer(tmp_path / "best.pt", ignore_classes=True) is None


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999])
def test_cut_short(keep: float, tmp_path: Path) -> None:
    path = BUILDERS["averaged_model"][1](tmp_path).path
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(CheckpointError):
        find_importer(path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        find_importer(tmp_path / "nothing")


def test_keys_that_read_alike(tmp_path: Path) -> None:
    torch.save({"ema.net": torch.zeros(1), "ema": {"net": torch.ones(1)}}, tmp_path / "f.pt")
    with pytest.raises(CheckpointError, match="keys with dots"):
        find_importer(tmp_path / "f.pt")


def test_two_names_that_are_one_without_wrappers(tmp_path: Path) -> None:
    values = {"module.a": torch.zeros(1), "module._orig_mod.a": torch.zeros(1), "n_averaged": torch.tensor(1)}
    torch.save(values, tmp_path / "f.pt")
    with pytest.raises(CheckpointError, match="two tensors have the same name"):
        find_importer(tmp_path / "f.pt").open()


def test_tied_names(tmp_path: Path) -> None:
    tied = torch.arange(6.0).reshape(2, 3)
    other = tied[1:]
    values = {"module.embed": tied, "module.head": tied, "module.row": other, "n_averaged": torch.tensor(1)}
    torch.save(values, tmp_path / "f.pt")
    assert find_importer(tmp_path / "f.pt").open().facts["aliases"] == {"head": "embed"}


def test_a_file_of_ours_is_not_foreign(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    save_file(AVERAGE, tmp_path / "ema.safetensors")
    assert find_importer(tmp_path) is None
