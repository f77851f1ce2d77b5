"""Saved averages as files that people can use, and how much memory that takes."""

from __future__ import annotations

import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

import sharded_avg
from sharded_avg import EMA, SWA, ConfigError, ShardedAverage
from sharded_avg.commands.consolidate import consolidate
from sharded_avg.commands.target import Target, guess_format
from sharded_avg.files import sinks
from sharded_avg.files.source import TensorInfo, slabs
from sharded_avg.files.stored import contiguous_stride
from sharded_avg.formats.open import open_source
from sharded_avg.shard import take
from tests.helpers.further import further

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")


class Net(nn.Module):
    """Odd sizes, one element, tied, bf16, and a parameter of no elements."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.layers = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 1, bias=False))
        self.scale = nn.Parameter(torch.randn(3).bfloat16())
        self.none = nn.Parameter(torch.zeros(0, 3))
        self.out = nn.Linear(5, 7, bias=False)
        self.out.weight = self.embed.weight


@pytest.fixture(params=["whole tensors", "slabs of 8 bytes"])
def saved(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Averages "ema" (fp32) and "swa"; with slabs so small, every tensor is written in several."""
    if request.param != "whole tensors":
        monkeypatch.setattr(sinks, "slabs", lambda info: slabs(info, max_bytes=8))
    net = Net()
    average = ShardedAverage(net, {"ema": EMA(decay=0.5), "swa": SWA()}, dtype=None)
    for _ in range(2):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update()
    average.save(tmp_path / "average")
    return tmp_path / "average"


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype | None = None) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == (dtype or tensor.dtype)
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name


DTYPES = [None, torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_safetensors_file(saved, tmp_path, dtype):
    expected = sharded_avg.load_averaged_state_dict(saved, "ema")
    out = tmp_path / "x.safetensors"
    consolidate(saved, Target(path=out, format="safetensors"), name="ema", dtype=dtype)
    assert_same(safetensors.torch.load_file(out), expected, dtype)
    assert_same(sharded_avg.load_averaged_state_dict(out), expected, dtype)
    with safetensors.safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"  # transformers refuses files without it
    assert json.loads(metadata["sharded_avg"])["n_averaged"] == 2
    Net().load_state_dict(safetensors.torch.load_file(out), strict=True)  # R09: of a parameter without elements, too


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_torch_file(saved, tmp_path, dtype):
    expected = sharded_avg.load_averaged_state_dict(saved, "swa")
    out = tmp_path / "x.pt"
    consolidate(saved, Target(path=out, format="torch"), name="swa", dtype=dtype)
    for mmap in (False, True):
        found = torch.load(out, weights_only=True, mmap=mmap)
        assert list(found) == list(expected)
        assert_same(found, expected, dtype)
        assert found["out.weight"].data_ptr() == found["embed.weight"].data_ptr(), "tied weights share a storage"
        assert all(tensor.data_ptr() % 64 == 0 for tensor in found.values() if mmap and tensor.numel())
    assert_same(sharded_avg.load_averaged_state_dict(out), expected, dtype)
    assert open_source(out).facts["rule"] == {"kind": "SWA"}


@pytest.mark.parametrize("max_bytes", [1, 100, 150, 10**9])
def test_several_files_and_an_index(saved, tmp_path, max_bytes):
    expected = sharded_avg.load_averaged_state_dict(saved, "ema")
    out = tmp_path / "hf"
    consolidate(saved, Target(path=out, format="safetensors", max_file_bytes=max_bytes), name="ema")
    files = sorted(path.name for path in out.glob("*.safetensors"))
    found = {name: tensor for file in files for name, tensor in safetensors.torch.load_file(out / file).items()}
    assert_same(found, expected)
    assert_same(sharded_avg.load_averaged_state_dict(out), expected)
    if max_bytes == 10**9:
        assert files == ["model.safetensors"]
        assert not (out / "model.safetensors.index.json").exists()
        return
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert sorted(set(index["weight_map"].values())) == files
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    for name, file in index["weight_map"].items():
        with safetensors.safe_open(out / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118 it is no dict
    for file in files:
        tensors = safetensors.torch.load_file(out / file).values()
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors) <= max_bytes


def test_files_of_tensors_that_typed_storages_lack(tmp_path):
    """float8 and unsigned integers are written as bytes with a dtype."""
    state = {"fp8": torch.randn(5, 3).to(torch.float8_e4m3fn), "u16": torch.arange(3).to(torch.uint16)}
    state |= {"complex": torch.randn(3, dtype=torch.complex64), "bool": torch.tensor([True, False])}
    state |= {"scalar": torch.tensor(1.5), "int": torch.arange(7), "empty": torch.zeros(3, 0)}
    torch.save(state, tmp_path / "in.pt")
    for out in ("out.pt", "out.safetensors"):
        consolidate(tmp_path / "in.pt", Target(path=tmp_path / out, format=guess_format(tmp_path / out, "")), raw=True)
        source = open_source(tmp_path / out)
        for name, tensor in state.items():
            read = source.read(name)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert read.view(-1).view(torch.uint8).equal(tensor.view(-1).view(torch.uint8)), name
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    assert all(loaded[name].dtype == tensor.dtype for name, tensor in state.items())
    assert loaded["fp8"].float().equal(state["fp8"].float())


def test_a_dtype_that_the_format_lacks(tmp_path):
    torch.save({"w": torch.zeros(3, dtype=torch.complex128)}, tmp_path / "in.pt")
    with pytest.raises(ConfigError, match="complex128"):
        consolidate(tmp_path / "in.pt", Target(path=tmp_path / "x.safetensors", format="safetensors"), raw=True)
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 3), (3, 5, 7), (1, 1, 9), (2, 0, 3), (13, 2, 1, 3)])
@pytest.mark.parametrize("max_bytes", [1, 4, 12, 40, 10**6])
def test_slabs_fill_a_tensor_in_order(shape, max_bytes):
    full = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    parts = [take(full, box).reshape(-1) for box in slabs(TensorInfo(shape, full.dtype), max_bytes)]
    assert torch.equal(torch.cat([torch.zeros(0), *parts]), full.reshape(-1))
    assert all(part.nbytes <= max(max_bytes, 4) for part in parts)


def test_targets_that_cannot_be(saved, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.safetensors").touch()
    with pytest.raises(ConfigError, match="already holds"):
        consolidate(saved, Target(path=tmp_path / "folder", format="safetensors"), name="ema")
    for wrong in (
        {"path": tmp_path / "folder", "format": "torch"},
        {"path": tmp_path / "x.safetensors", "format": "safetensors", "max_file_bytes": 5},
        {"path": tmp_path / "x", "format": "folder", "max_file_bytes": 5},
        {"path": tmp_path / "x", "format": "pickle"},
        {"path": tmp_path / "nowhere" / "x.pt", "format": "torch"},
    ):
        with pytest.raises(ConfigError):
            Target(**wrong)  # type: ignore[arg-type]
    for place in (saved, saved / "x.pt", saved.parent):
        with pytest.raises(ConfigError, match="choose another place"):
            Target(path=place, format="folder").refuse_sources([saved])


def test_an_earlier_file_stays_until_the_new_one_is_whole(saved, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("x.safetensors", "x.pt"):
        (out / name).write_text("before")

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sinks, "_write_tensor", fail)
    for name in ("x.safetensors", "x.pt", "folder"):
        target = Target(path=out / name, format=guess_format(out / name, "safetensors"))
        with pytest.raises(OSError, match="No space left"):
            consolidate(saved, target, name="ema")
    assert [path.read_text() for path in sorted(out.iterdir()) if path.is_file()] == ["before", "before"]
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]


# -- memory --------------------------------------------------------------------------------------------------------


def sparse_archive(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """torch.save of zeros, with a hole in the file where the zeros are; returns its length."""
    numel = torch.Size(shape).numel()
    tensor = sinks._TensorAt(sinks._StorageId("0", dtype, numel), shape)
    stream = sinks.io.BytesIO()
    sinks._Pickler(stream, protocol=2).dump(tensor)
    members = [("archive/data.pkl", stream.getvalue(), len(stream.getvalue())), ("archive/version", b"3\n", 2)]
    members.append(("archive/data/0", b"", numel * dtype.itemsize))
    directory = b""
    with open(path, "wb") as file:
        for name, data, size in members:
            extra = struct.pack("<HHQQ", 1, 16, size, size)
            wide = (0xFFFFFFFF, 0xFFFFFFFF, len(name), len(extra))
            at = file.tell()
            file.write(struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", 45, 0, 0, 0, 0, 0, *wide) + name.encode() + extra)
            file.write(data)
            file.seek(size - len(data), 1)
            head = struct.pack("<4sHHHHHHIIIHH", b"PK\x01\x02", 45, 45, 0, 0, 0, 0, 0, *wide)
            directory += head + struct.pack("<HHHII", 0, 0, 0, 0, at) + name.encode() + extra
        begin = file.tell()
        file.write(directory)
        end = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, 3, 3, len(directory), begin)
        file.write(end + struct.pack("<4sIQI", b"PK\x06\x07", 0, begin + len(directory), 1))
        file.write(struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 3, 3, 0xFFFFFFFF, 0xFFFFFFFF, 0))
        return file.tell()


def sparse_folder(folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A DCP folder of one tensor in one piece, most of which is a hole."""
    folder.mkdir()
    length = sparse_archive(folder / "__0_0.distcp", shape, dtype)
    chunk = ChunkStorageMetadata(torch.Size([0] * len(shape)), torch.Size(shape))
    entry = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [chunk])
    place = {MetadataIndex("model.big", chunk.offsets): _StorageInfo("__0_0.distcp", 0, length)}
    index = Metadata(state_dict_metadata={"model.big": entry}, storage_data=place)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


MEASURED = """
import sys
from sharded_avg.commands.cli import main
code = main(sys.argv[1:])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(code, int(peak.split()[1]) * 1024)
"""


def measured(*arguments: object) -> tuple[int, int]:
    """Exit code and peak resident bytes of a command, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, arguments)], capture_output=True, text=True, timeout=240, check=True
    )
    code, peak = done.stdout.split()
    return int(code), int(peak)


ONE_GIB = 1 << 30


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("out", [further("x.safetensors"), "x.pt"])
def test_peak_memory_is_under_1_gib_for_one_tensor_of_2_gib(tmp_path, out):
    """P65, P71: a consolidation holds a slab at a time, however large the tensor; measured from outside."""
    shape = (2**20 + 1, 511)
    sparse_folder(tmp_path / "big", shape, torch.float32)
    nbytes = torch.Size(shape).numel() * 2
    try:
        code, peak = measured("consolidate", tmp_path / "big", tmp_path / out, "--name", "model", "--dtype", "bf16")
        assert code == 0
        assert peak < ONE_GIB
        assert nbytes < (tmp_path / out).stat().st_size < nbytes + 4096
        source = open_source(tmp_path / out)
        assert source.infos["big"] == TensorInfo(shape, torch.bfloat16)
    finally:
        for file in tmp_path.rglob("*"):
            if file.is_file():
                file.unlink()


def test_a_sparse_checkpoint_is_one_that_torch_reads(tmp_path):
    """The test above rests on it."""
    sparse_archive(tmp_path / "x.pt", (5, 3), torch.float32)
    assert torch.load(tmp_path / "x.pt", weights_only=True).equal(torch.zeros(5, 3))
    assert contiguous_stride((5, 3)) == (3, 1)
