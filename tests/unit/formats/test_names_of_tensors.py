"""Averages whose tensors are numbered, or have lost their dots, and the names that they get."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sharded_avg import CheckpointError
from sharded_avg.formats.importers import find_importer
from tests.helpers.foreign import (
    AVERAGE,
    BUILDERS,
    NAMES,
    RAW,
    SHAPES,
    prefixed,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")


def numbered(tmp_path: Path) -> Path:
    return BUILDERS["torch_ema"][1](tmp_path).path


def test_numbered_tensors_need_names(tmp_path: Path) -> None:
    found = find_importer(numbered(tmp_path))
    with pytest.raises(CheckpointError, match=r"4 averaged tensors .* Give the names: --names FILE"):
        found.open()
    with pytest.raises(CheckpointError, match="4 averaged tensors, and 3 names"):
        found.open(NAMES[:3])
    with pytest.raises(CheckpointError, match=r"4 names were given \(3 different\)"):
        found.open([*NAMES[:3], NAMES[0]])


def test_given_shapes_are_checked(tmp_path: Path) -> None:
    found = find_importer(numbered(tmp_path))
    assert set(found.open(SHAPES).infos) == set(SHAPES)
    with pytest.raises(CheckpointError, match=r"'net\.0\.bias' has shape \[5\], and the tensor in its place \[5, 3\]"):
        found.open({name: SHAPES[name] for name in ["net.0.bias", "net.0.weight", "net.1.scale", "head.weight"]})


# -- names without dots --------------------------------------------------------------------------------------------


def lit_ema(tmp_path: Path, raw: dict[str, torch.Tensor], ema: dict[str, torch.Tensor]) -> Path:
    counts = {"model_ema.decay": torch.tensor(0.5), "model_ema.num_updates": torch.tensor(-1)}
    torch.save({"state_dict": {**raw, **prefixed("model_ema.", ema), **counts}}, tmp_path / "file.ckpt")
    return tmp_path / "file.ckpt"


def test_lit_ema_of_the_whole_module_that_does_not_count(tmp_path: Path) -> None:
    path = lit_ema(tmp_path, RAW, {name.replace(".", ""): value for name, value in AVERAGE.items()})
    source = find_importer(path).open()
    assert all(torch.equal(source.read(name), AVERAGE[name]) for name in AVERAGE)
    assert "n_averaged" not in source.facts


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"model.a.bc": torch.zeros(2), "model.ab.c": torch.zeros(2)}, "or more than one each"),
        ({"model.a.bd": torch.zeros(2)}, "match no parameters"),
        ({"model.a.bc": torch.zeros(3)}, "match no parameters"),
        ({"model.a.bc": torch.zeros(2), "other.a.bc": torch.zeros(2)}, "match 2 submodules"),
    ],
)
def test_ambiguous_names_are_refused(raw: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        find_importer(lit_ema(tmp_path, raw, {"abc": torch.ones(2)})).open()
