"""Indexes and manifests that cannot be true of their folder are refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from sharded_avg import CheckpointError
from sharded_avg.formats.open import open_source

from .hostile import place_of, refused, reindex

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")


def outside(saved: Path, name: str) -> None:
    """Move the pieces out of the folder and let the index name them there."""
    (saved / "__0_0.distcp").rename(saved.parent / "secret.distcp")

    def change(index: Any) -> None:
        for place in index.storage_data.values():
            place.relative_path = name.format(parent=saved.parent)

    reindex(saved, change)


@pytest.mark.parametrize(
    "name", ["../secret.distcp", "{parent}/secret.distcp", "x/../../secret.distcp", ".", "", "..", "a\0b", "/dev/zero"]
)
def test_paths_out_of_the_folder(saved, name):
    outside(saved, name)
    refused(saved)


def test_links_out_of_the_folder(saved):
    outside(saved, "link.distcp")
    (saved / "link.distcp").symlink_to(saved.parent / "secret.distcp")
    refused(saved, "outside of it")


def test_a_pipe_in_place_of_a_file_does_not_hang(saved):
    outside(saved, "pipe.distcp")
    os.mkfifo(saved / "pipe.distcp")
    refused(saved, "not an ordinary file")


def test_an_index_of_shards_that_names_files_elsewhere(tmp_path):
    for name in ("../model.safetensors", "/etc/passwd", "sub/model.safetensors"):
        index = {"weight_map": {"w": name}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="own folder"):
            open_source(tmp_path)


# -- an index that cannot be ---------------------------------------------------------------------------------------


def chunks_of(index: Any, fqn: str) -> Any:
    return index.state_dict_metadata[fqn].chunks


def chunk(offsets: Any, sizes: Any) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def with_dtype(index: Any, dtype: torch.dtype) -> None:
    index.state_dict_metadata["average.a"].properties.dtype = dtype


def exchange(index: Any) -> None:
    a, b = place_of(index, "average.a"), place_of(index, "average.b")
    a.offset, a.length, b.offset, b.length = b.offset, b.length, a.offset, a.length


IMPOSSIBLE: dict[str, Callable[[Any], Any]] = {
    "negative offset": lambda i: setattr(place_of(i, "average.a"), "offset", -8),
    "offset beyond the file": lambda i: setattr(place_of(i, "average.a"), "offset", 10**9),
    "endless length": lambda i: setattr(place_of(i, "average.a"), "length", 2**63 - 1),
    "length of nothing": lambda i: setattr(place_of(i, "average.a"), "length", 0),
    "length of a float": lambda i: setattr(place_of(i, "average.a"), "length", 1e3),
    "offset of a string": lambda i: setattr(place_of(i, "average.a"), "offset", "0"),
    "two items in one place": lambda i: vars(place_of(i, "average.a")).update(vars(place_of(i, "average.b"))),
    "two items exchanged": exchange,
    "a file that is not there": lambda i: setattr(place_of(i, "average.a"), "relative_path", "__7_0.distcp"),
    "a path that is none": lambda i: setattr(place_of(i, "average.a"), "relative_path", None),
    "an extension": lambda i: setattr(place_of(i, "average.a"), "transform_descriptors", ["zstd"]),
    "no places": lambda i: setattr(i, "storage_data", None),
    "no names": lambda i: setattr(i, "state_dict_metadata", []),
    "a piece is missing": lambda i: chunks_of(i, "average.a").clear(),
    "a piece is twice": lambda i: chunks_of(i, "average.a").append(chunks_of(i, "average.a")[0]),
    "pieces overlap and leave a gap": lambda i: chunks_of(i, "average.a").__setitem__(
        slice(None), [chunk((0, 0), (3, 3)), chunk((1, 0), (2, 3))]
    ),
    "a piece sticks out": lambda i: chunks_of(i, "average.a").__setitem__(0, chunk((1, 0), (5, 3))),
    "a piece of another rank": lambda i: chunks_of(i, "average.a").__setitem__(0, chunk((0,), (15,))),
    "an absurd shape": lambda i: setattr(i.state_dict_metadata["average.a"], "size", torch.Size((2**40, 2**40))),
    "a shape of strings": lambda i: setattr(i.state_dict_metadata["average.a"], "size", ("5", "3")),
    "another shape": lambda i: setattr(i.state_dict_metadata["average.a"], "size", torch.Size((3, 5))),
    "another dtype": lambda i: with_dtype(i, torch.int32),
    "another dtype of another size": lambda i: with_dtype(i, torch.bfloat16),
    "no dtype": lambda i: setattr(i.state_dict_metadata["average.a"], "properties", None),
    "a name is missing": lambda i: i.state_dict_metadata.pop("average.b"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_indexes_that_cannot_be(saved, name):
    reindex(saved, IMPOSSIBLE[name])
    refused(saved)


def test_both_the_manifest_and_the_index_lie_about_a_shape(saved):
    """A petabyte of zeros is not allocated before the bytes are looked at."""

    def change(index: Any) -> None:
        index.state_dict_metadata["average.a"].size = torch.Size((2**50,))
        index.state_dict_metadata["average.a"].chunks[:] = [chunk((0,), (2**50,))]
        key = next(key for key in index.storage_data if key.fqn == "average.a")
        place = index.storage_data.pop(key)
        index.storage_data[type(key)("average.a", torch.Size((0,)))] = place
        index.state_dict_metadata.pop("manifest")

    reindex(saved, change)
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["tensors"]["a"]["shape"] = [2**50]
    (saved / "manifest.json").write_text(json.dumps(manifest))
    refused(saved)


# -- manifests -----------------------------------------------------------------------------------------------------


def edited(text: str, change: Callable[[Any], Any]) -> str:
    data = json.loads(text)
    change(data)
    return json.dumps(data)


MANIFESTS: dict[str, Callable[[str], str]] = {
    "empty": lambda text: "",
    "another version": lambda text: edited(text, lambda m: m.update(version=99)),
    "no header": lambda text: edited(text, lambda m: m.pop("format")),
    "a list": lambda text: "[]",
    "lists 100,000 deep": lambda text: "[" * 100_000,
    "NaN": lambda text: edited(text, lambda m: m.update(step=float("nan"))),
    "infinity among the updates": lambda text: text.replace('"updates": [', '"updates": [[1, 1e999, 1], ', 1),
    "a number of 5000 digits": lambda text: text.replace('"step": ', '"step": ' + "9" * 5000, 1),
    "a negative step": lambda text: edited(text, lambda m: m.update(step=-1)),
    "averages of a string": lambda text: edited(text, lambda m: m.update(averages="average")),
    "tensors of null": lambda text: edited(text, lambda m: m.update(tensors=None)),
    "a shape that is negative": lambda text: edited(text, lambda m: m["tensors"]["a"].update(shape=[-5, 3])),
    "a shape that is another": lambda text: edited(text, lambda m: m["tensors"]["a"].update(shape=[3, 5])),
    "a dtype that is a function": lambda text: edited(text, lambda m: m["tensors"]["a"].update(dtype="load")),
    "a dtype that is another": lambda text: edited(text, lambda m: m["tensors"]["a"].update(dtype="int32")),
    "an alias of nothing": lambda text: edited(text, lambda m: m.update(aliases={"x": "nothing"})),
    "a tensor that is not there": lambda text: edited(
        text, lambda m: m["tensors"].update(x={"shape": [1], "dtype": "float32"})
    ),
    "another count": lambda text: edited(text, lambda m: m["averages"]["average"].update(n_averaged=7)),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_that_cannot_be(saved, name):
    file = saved / "manifest.json"
    file.write_text(MANIFESTS[name](file.read_text()))
    refused(saved)
