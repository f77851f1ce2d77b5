"""Flipped bits, files cut short, files that are gone: what is damaged is refused, all of it."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

import sharded_avg
from sharded_avg import CheckpointError
from sharded_avg.files.torch_file import TorchFile

from .hostile import refused

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return list(left) == list(right) and all(
        torch.equal(left[key], right[key]) and left[key].dtype == right[key].dtype for key in left
    )


def positions(size: int, count: int, seed: int) -> list[int]:
    ends = [*range(min(size, 64)), *range(max(0, size - 128), size)]
    return sorted({*ends, *random.Random(seed).sample(range(size), min(size, count))})


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "manifest.json"])
def test_flipped_bits_in_a_folder(saved, name):
    """Either nothing that matters was hit, and the values are the saved ones, or it is refused as damaged."""
    right = sharded_avg.load_averaged_state_dict(saved)
    file = saved / name
    whole = file.read_bytes()
    num_refused = 0
    for position in positions(len(whole), 1500, seed=len(name)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        file.write_bytes(damaged)
        try:
            assert same(sharded_avg.load_averaged_state_dict(saved), right), f"byte {position} changed the values"
        except CheckpointError:
            num_refused += 1
    assert num_refused > 50


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "manifest.json"])
def test_truncated_folders(saved, name):
    file = saved / name
    whole = file.read_bytes()
    for size in positions(len(whole), 200, seed=1):
        file.write_bytes(whole[:size])
        refused(saved)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_files_that_are_gone(saved, name):
    (saved / name).unlink()
    refused(saved)


def test_a_manifest_that_is_gone_is_also_among_the_tensors(saved):
    """DCP's index is written last: with it, the pieces are whole, as in a user's own dcp.save(average.state_dict())."""
    right = sharded_avg.load_averaged_state_dict(saved)
    (saved / "manifest.json").unlink()
    assert same(sharded_avg.load_averaged_state_dict(saved), right)


def test_flipped_and_truncated_torch_files(tmp_path):
    file = tmp_path / "x.pt"
    torch.save({"a": torch.randn(5, 3), "b": {"c": torch.arange(7)}}, file)
    source = TorchFile(file)
    right = {name: source.read(name) for name in source.infos}
    whole = file.read_bytes()
    for position in positions(len(whole), 1500, seed=2):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        file.write_bytes(damaged)
        try:
            source = TorchFile(file)
            found = {name: source.read(name) for name in source.infos}
        except CheckpointError:
            continue
        assert same(found, right), f"byte {position} changed the values"
    for size in positions(len(whole), 200, seed=3):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            TorchFile(file)
