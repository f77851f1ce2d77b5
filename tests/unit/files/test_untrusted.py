"""Files that anyone might have made: nothing in them runs, and what is damaged is refused, all of it."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

import sharded_avg
from sharded_avg import SWA, CheckpointError, ShardedAverage
from sharded_avg.commands.cli import main
from sharded_avg.files.pickles import load_inert
from sharded_avg.files.safetensors_file import SafetensorsFiles
from sharded_avg.files.torch_file import TorchFile
from sharded_avg.formats.open import open_source

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")


class Payload:
    """Unpickling this makes a file: with os.system, eval, a constructor, or a change of what is there."""

    def __init__(self, canary: Path, how: str) -> None:
        self.canary, self.how = canary, how

    def __reduce__(self) -> Any:
        code = f"open({str(self.canary)!r}, 'w').close()"
        calls: dict[str, Any] = {
            "os.system": (os.system, (f"touch {self.canary}",)),
            "eval": (eval, (code,)),
            "Path.touch": (Path.touch, (self.canary,)),
            "open": (open, (str(self.canary), "w")),
        }
        return calls[self.how]


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "canary"
    yield file
    assert not file.exists(), "something in the file was run"


def make(folder: Path) -> Path:
    """A saved average of five odd-sized tensors, one of them empty, one of one element, one tied."""
    torch.manual_seed(0)
    net = nn.Module()
    for name, shape in {"a": (5, 3), "b": (7,), "c": (1,), "d": (0, 3)}.items():
        net.register_parameter(name, nn.Parameter(torch.randn(shape)))
    net.e = net.a
    average = ShardedAverage(net, SWA())
    average.update()
    average.save(folder)
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return make(tmp_path / "average")


def refused(path: Path, match: str | None = None) -> None:
    with pytest.raises(CheckpointError, match=match):
        sharded_avg.load_averaged_state_dict(path)


def reindex(folder: Path, change: Callable[[Any], None]) -> None:
    """Change DCP's own index, which the test may unpickle because it made it."""
    file = folder / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))


# -- code ----------------------------------------------------------------------------------------------------------


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


# -- paths ---------------------------------------------------------------------------------------------------------


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


def place_of(index: Any, fqn: str) -> Any:
    return next(place for key, place in index.storage_data.items() if key.fqn == fqn)


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


# -- damage --------------------------------------------------------------------------------------------------------


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


def safetensors(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: Any = (3,), begin: Any = 0, end: Any = 12, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


BAD_SAFETENSORS = {
    "empty": b"",
    "only a length": struct.pack("<Q", 2**63),
    "a header beyond the file": struct.pack("<Q", 10**6) + b"{}",
    "no JSON": safetensors(b"{'a': 1}", b""),
    "a list": safetensors([], b""),
    "lists 100,000 deep": safetensors(b"[" * 100_000, b""),
    "NaN": safetensors(b'{"a": NaN}', b""),
    "a tensor that is none": safetensors({"a": 3}, b""),
    "an unknown dtype": safetensors({"a": entry(dtype="X9")}, bytes(12)),
    "a negative size": safetensors({"a": entry((-3,))}, bytes(12)),
    "a size that is a string": safetensors({"a": entry(("3",))}, bytes(12)),
    "an absurd shape": safetensors({"a": entry((2**40, 2**40))}, bytes(12)),
    "another number of bytes": safetensors({"a": entry((2,))}, bytes(12)),
    "beyond the file": safetensors({"a": entry((30,), 0, 120)}, bytes(12)),
    "negative offsets": safetensors({"a": entry((3,), -12, 0)}, bytes(12)),
    "overlapping tensors": safetensors({"a": entry(), "b": entry((3,), 4, 16)}, bytes(16)),
    "a hole": safetensors({"a": entry(), "b": entry((3,), 16, 28)}, bytes(28)),
    "bytes left over": safetensors({"a": entry()}, bytes(13)),
    "cut short": safetensors({"a": entry()}, bytes(11)),
    "metadata of numbers": safetensors({"__metadata__": {"x": 1}, "a": entry()}, bytes(12)),
}


@pytest.mark.parametrize("name", BAD_SAFETENSORS)
def test_safetensors_that_cannot_be(tmp_path, name):
    file = tmp_path / "x.safetensors"
    file.write_bytes(BAD_SAFETENSORS[name])
    with pytest.raises(CheckpointError):
        SafetensorsFiles(file)


def test_flipped_bits_in_the_header_of_safetensors(tmp_path):
    """The format has no checksum: a flip may change names or dtypes unnoticed, but never crash."""
    whole = safetensors({"a": entry(), "b": entry((2, 2), 12, 28)}, bytes(28))
    file = tmp_path / "x.safetensors"
    for position in range(len(whole) - 28):
        for bit in (0, 3, 6):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            file.write_bytes(damaged)
            try:
                source = SafetensorsFiles(file)
            except CheckpointError:
                continue
            assert sum(source.read(name).nbytes for name in source.infos) == 28


# -- the command line ----------------------------------------------------------------------------------------------


def test_commands_refuse_and_leave_nothing(saved, tmp_path, canary, capsys):
    (saved / ".metadata").write_bytes(pickle.dumps(Payload(canary, "os.system")))
    out = tmp_path / "out"
    out.mkdir()
    for command in (
        ["inspect", str(saved)],
        ["consolidate", str(saved), str(out / "x.safetensors")],
        ["consolidate", str(saved), str(out / "x.pt")],
        ["merge", str(saved), str(saved), str(out / "x"), "--uniform"],
    ):
        assert main(command) == 3
        assert "nothing in it was run" in capsys.readouterr().err
    assert not list(out.iterdir())


def test_a_damaged_tensor_is_noticed_while_writing(saved, tmp_path):
    """Checksums are looked at when the bytes are read: by then, the target has been begun."""
    index = pickle.loads((saved / ".metadata").read_bytes())
    place = place_of(index, "average.b")
    file = saved / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    begin = data.index(b"PK\x01\x02", place.offset)  # of the directory; the tensor's bytes lie before it
    torch.manual_seed(0)
    value = torch.randn(5, 3), torch.randn(7)
    at = data.index(value[1].numpy().tobytes(), place.offset, begin)
    data[at + 5] ^= 4
    file.write_bytes(data)
    out = tmp_path / "out"
    out.mkdir()
    for name in ("x.safetensors", "x.pt", "folder"):
        assert main(["consolidate", str(saved), str(out / name)]) == 3
    assert main(["merge", str(saved), str(out / "merged"), "--uniform"]) == 3
    assert [path for path in out.rglob("*") if path.is_file()] == []


def test_terminal_escapes_in_names_are_not_printed(tmp_path, capsys):
    torch.save({"\x1b[2Jname": torch.ones(2)}, tmp_path / "x.pt")
    assert main(["inspect", str(tmp_path / "x.pt"), "--tensors"]) == 0
    assert "\x1b" not in capsys.readouterr().out
