"""Files that anyone might have made: nothing in them runs, and none takes for ever."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from sharded_avg import SWA, CheckpointError, ShardedAverage
from sharded_avg.files.pickles import load_inert

from .hostile import Payload, refused, reindex

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")


@pytest.mark.parametrize("how", ["os.system", "eval", "Path.touch", "open"])
def test_code_in_the_index(saved, canary, how):
    (saved / ".metadata").write_bytes(pickle.dumps(Payload(canary, how)))
    refused(saved, "nothing in it was run")


@pytest.mark.parametrize("field", ["planner_data", "storage_data", "storage_meta", "version"])
def test_code_deep_in_the_index(saved, canary, field):
    reindex(saved, lambda index: setattr(index, field, {"x": [Payload(canary, "os.system")]}))
    refused(saved, "nothing in it was run")


def test_code_in_a_stored_piece(saved, canary):
    """The .distcp file is replaced by one item, which claims to be the tensor `b`."""
    torch.save(Payload(canary, "os.system"), saved / "__0_0.distcp")
    size = (saved / "__0_0.distcp").stat().st_size

    def change(index: Any) -> None:
        index.storage_data = {k: v for k, v in index.storage_data.items() if k.fqn == "average.b"}
        index.state_dict_metadata = {"average.b": index.state_dict_metadata["average.b"]}
        for place in index.storage_data.values():
            place.offset, place.length = 0, size

    reindex(saved, change)
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["tensors"], manifest["aliases"] = {"b": manifest["tensors"]["b"]}, {}
    (saved / "manifest.json").write_text(json.dumps(manifest))
    refused(saved, "nothing in it was run")


def test_code_in_the_manifest_of_a_users_checkpoint(tmp_path, canary):
    dcp.save({"average": {"manifest": Payload(canary, "os.system")}}, checkpoint_id=tmp_path / "users")
    canary.unlink(missing_ok=True)  # DCP's own planner may copy objects
    refused(tmp_path / "users", "nothing in it was run")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_code_in_a_torch_file(tmp_path, canary, protocol):
    file = tmp_path / "weights.pt"
    torch.save({"w": torch.ones(3), "x": Payload(canary, "os.system")}, file, pickle_protocol=protocol)
    refused(file, "nothing in it was run")


def test_code_in_a_torch_file_of_the_old_kind(tmp_path, canary):
    file = tmp_path / "weights.pt"
    torch.save({"x": Payload(canary, "os.system")}, file, _use_new_zipfile_serialization=False)
    refused(file)
    file.write_bytes(pickle.dumps(Payload(canary, "os.system")))
    refused(file)


def test_the_average_itself_does_not_run_code_either(saved, canary):
    (saved / ".metadata").write_bytes(pickle.dumps(Payload(canary, "os.system")))
    net = nn.Module()
    for name, shape in {"a": (5, 3), "b": (7,), "c": (1,), "d": (0, 3)}.items():
        net.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    net.e = net.a
    with pytest.raises(CheckpointError):
        ShardedAverage(net, SWA()).load(saved)


# -- bombs: little to read, and no end of work ---------------------------------------------------------------------


def raw(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


BOMBS = {
    "a memo of 2^31 entries": raw(b"N", b"r\xff\xff\xff\x7f"),
    "a tuple of tuples as a key": raw(b"}", b")", b"2\x86" * 64, b"Ns"),
    "a tuple of tuples in a set": raw(b"\x8f(", b")", b"2\x86" * 64, b"\x90"),
    "a string of 2^60 bytes": raw(b"\x8d" + struct.pack("<Q", 2**60) + b"abc"),
    "lists 100,000 deep": raw(b"]" * 100_000, b"a" * 99_999),
    "nothing": b"",
    "only an end": b".",
    "an opcode of protocol 0": raw(b"cos\nsystem\n(S'true'\ntR"),
    "an instance of protocol 0": raw(b"(S'true'\nios\nsystem\n"),
    "an extension registry": raw(b"\x82\x01"),
    "a buffer out of band": raw(b"\x97"),
    "a change of a class": raw(b"ctorch\nSize\n", b"}", b"\x8c\x01xK\x01s", b"b"),
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.timeout(60)
def test_bombs_in_the_index(saved, name):
    (saved / ".metadata").write_bytes(BOMBS[name])
    refused(saved)


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.timeout(60)
def test_bombs_in_a_torch_file(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("archive/data.pkl", BOMBS[name])
    refused(tmp_path / "x.pt")


@pytest.mark.timeout(60)
def test_a_small_pickle_of_endless_lists(tmp_path):
    """[x, x] with x = [y, y] ...: 2^40 values, were they walked through."""
    doubled = b"]" + b"".join(b"\x94](h" + bytes([i]) + b"h" + bytes([i]) + b"e" for i in range(40))
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("archive/data.pkl", raw(doubled))
    refused(tmp_path / "x.pt", "more values")


def test_classes_are_not_changed():
    """A BUILD on a class would reach into the real one, were there a real one."""
    with pytest.raises(CheckpointError):
        load_inert(BOMBS["a change of a class"], lambda module, name: True, what="it")
    assert not hasattr(torch.Size, "x")
