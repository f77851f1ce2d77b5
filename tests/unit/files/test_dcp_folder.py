"""Reading: boxes out of DCP folders, torch files and safetensors, against the libraries that wrote them."""

from __future__ import annotations

import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

import sharded_avg
from sharded_avg import EMA, SWA, CheckpointError, ConfigError, NotStartedError, ShardedAverage
from sharded_avg.files import stored
from sharded_avg.files.dcp_folder import DcpFolder
from sharded_avg.files.safetensors_file import SafetensorsFiles
from sharded_avg.files.source import AbstractSource, TensorInfo, slabs
from sharded_avg.files.torch_file import TorchFile
from sharded_avg.formats.open import open_source
from sharded_avg.saved.folder import from_source
from sharded_avg.saved.manifest import AverageRecord, Manifest
from sharded_avg.shard import Box, take

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")


def tensors() -> dict[str, Tensor]:
    """Odd sizes, and every kind of dtype."""
    floats = {"matrix": torch.randn(5, 3), "cube": torch.randn(3, 5, 7), "scalar": torch.tensor(2.5)}
    half = {"bf16": torch.randn(7).bfloat16(), "fp16": torch.randn(2, 3).half(), "fp64": torch.randn(3).double()}
    others = {"int": torch.arange(7), "bool": torch.tensor([True, False, True]), "empty": torch.zeros(0, 3)}
    young = {"fp8": torch.randn(5).to(torch.float8_e4m3fn), "u16": torch.arange(3).to(torch.uint16)}
    return {**floats, **half, **others, **young}


def equal(a: Tensor, b: Tensor) -> bool:
    same = a.shape == b.shape and a.dtype == b.dtype
    return same and a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8))


def boxes(shape: tuple[int, ...], count: int = 12) -> list[Box]:
    found = [Box.whole(shape)]
    rng = random.Random(str(shape))
    for _ in range(count):
        edges = [sorted((rng.randint(0, size), rng.randint(0, size))) for size in shape]
        found.append(Box(tuple(a for a, _ in edges), tuple(b - a for a, b in edges)))
    return found


def assert_reads(source: AbstractSource, expected: dict[str, Tensor]) -> None:
    assert {name: (info.shape, info.dtype) for name, info in source.infos.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in expected.items()
    }
    for name, tensor in expected.items():
        assert equal(source.read(name), tensor)
        for box in boxes(tuple(tensor.shape)):
            assert equal(source.read(name, box), take(tensor, box)), (name, box)


@pytest.fixture(params=[1 << 20, 16], ids=["at once", "in pieces of 16 bytes"])
def piece_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(stored, "PIECE_BYTES", request.param)
    return int(request.param)


def test_torch_file(tmp_path, piece_bytes):
    expected = tensors()
    torch.save(OrderedDict(expected), tmp_path / "x.pt")
    assert_reads(TorchFile(tmp_path / "x.pt"), expected)


def test_torch_file_with_views_parameters_and_other_things(tmp_path, piece_bytes):
    base = torch.randn(7, 5)
    state = {"t": base.t(), "row": base[3], "step": base[::2, 1::3], "base": base, "p": nn.Parameter(base[0])}
    other: dict[str, Any] = {"epoch": 3, "lr": 0.1, "none": None, "names": ["a", ("b", 1)], "dtype": torch.bfloat16}
    torch.save({"state": state, **other, "size": torch.Size((2, 3)), "set": {1, 2}}, tmp_path / "x.pt")
    file = TorchFile(tmp_path / "x.pt")
    assert {key: file.content[key] for key in other} == other
    assert file.content["size"] == (2, 3)
    assert sorted(file.content["set"]) == [1, 2]
    assert_reads(file, {f"state.{key}": value.detach() for key, value in state.items()})


def test_torch_file_of_a_module(tmp_path):
    """A state dict has attributes of its own (_metadata), and tied weights share a storage."""
    net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    torch.save(net.state_dict(), tmp_path / "x.pt")
    assert_reads(TorchFile(tmp_path / "x.pt"), dict(net.state_dict()))


def test_torch_file_of_tensors_with_attributes(tmp_path, piece_bytes):
    """As in FSDP1's full state dicts: a whole one, a view, a scalar."""
    base = torch.randn(7, 5)
    tensors = {"whole": base.clone(), "view": base[::2, 1::3], "scalar": torch.tensor(3)}
    for tensor in tensors.values():
        tensor._has_been_cloned = True
    torch.save({"state": tensors, "plain": base}, tmp_path / "x.pt")
    assert b"_rebuild_from_type_v2" in (tmp_path / "x.pt").read_bytes()
    assert_reads(
        TorchFile(tmp_path / "x.pt"),
        {"plain": base} | {f"state.{name}": tensor for name, tensor in tensors.items()},
    )


def test_torch_file_without_checksums(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.arange(5.0)}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_reads(TorchFile(tmp_path / "x.pt"), {"w": torch.arange(5.0)})


def test_safetensors(tmp_path, piece_bytes):
    expected = tensors()
    safetensors.torch.save_file(expected, tmp_path / "x.safetensors", metadata={"format": "pt"})
    source = SafetensorsFiles(tmp_path / "x.safetensors")
    assert_reads(source, {name: expected[name] for name in source.infos})
    assert source.metadata == {"format": "pt"}


def test_dcp_folder_of_plain_tensors(tmp_path, piece_bytes):
    expected = tensors()
    dcp.save({"model": expected, "step": 3, "names": ["a"]}, checkpoint_id=tmp_path / "x")
    folder = DcpFolder(tmp_path / "x")
    assert_reads(folder, {f"model.{name}": tensor for name, tensor in expected.items()})
    assert folder.load_object("step") == 3
    assert folder.load_object("names.0" if "names.0" in folder.objects else "names") in ("a", ["a"])


class Cut(AbstractSource):
    """Tensors that come in pieces of a few elements."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.values = values
        self.infos = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in values.items()}
        self.facts = {}

    def read(self, name: str, box: Box | None = None) -> Tensor:
        return take(self.values[name], box or Box.whole(self.values[name].shape)).contiguous()


def test_dcp_folder_of_many_pieces(tmp_path, monkeypatch, piece_bytes):
    """Each tensor is stored in Boxes of at most 6 bytes to 6 floats, as if as many ranks had written it."""
    monkeypatch.setattr(from_source, "slabs", lambda info: slabs(info, max_bytes=24))
    expected = {name: tensor for name, tensor in tensors().items() if tensor.numel()}
    average = AverageRecord(rule={}, n_averaged=1)
    from_source.write_folder(Cut(expected), tmp_path / "x", Manifest(step=1, averages={"a": average}, tensors={}))
    assert_reads(DcpFolder(tmp_path / "x"), {f"beside.{name}": tensor for name, tensor in expected.items()})


# -- averages ------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Tied, frozen, with buffers, one in bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.frozen = nn.Linear(3, 5).requires_grad_(False)
        self.norm = nn.BatchNorm1d(5)
        self.scale = nn.Parameter(torch.randn(3).bfloat16())
        self.out = nn.Linear(3, 7, bias=False)
        self.out.weight = self.embed.weight


def trained(rules: Any) -> tuple[Net, ShardedAverage]:
    net = Net()
    average = ShardedAverage(net, rules)
    for _ in range(3):
        average.update()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter))
    return net, average


def full(average: ShardedAverage, name: str | None = None) -> dict[str, Tensor]:
    with average.summon_full_params(name) as state:
        return {key: value.clone() for key, value in state.items()}


AVERAGED = ["embed.weight", "norm.bias", "norm.weight", "out.weight", "scale"]


def test_load_of_our_folder(tmp_path):
    _, average = trained(EMA(decay=0.5))
    average.save(tmp_path / "average")
    expected = full(average)
    found = sharded_avg.load_averaged_state_dict(tmp_path / "average")
    assert sorted(found) == AVERAGED
    assert all(equal(found[name], expected[name]) for name in found)
    assert found["out.weight"] is found["embed.weight"]
    facts = open_source(tmp_path / "average").facts
    assert (facts["n_averaged"], facts["step"], facts["rule"]["decay"]) == (3, 3, 0.5)


def test_load_of_a_users_checkpoint_is_strict(tmp_path):
    """Frozen parameters and buffers come from the model that lies beside the average."""
    net, average = trained({"ema": EMA(decay=0.5), "swa": SWA()})
    dcp.save(
        {"model": net.state_dict(), "nested": {"avg": average.state_dict()}, "step": 7},
        checkpoint_id=tmp_path / "users",
    )
    expected = full(average, "swa")
    found = sharded_avg.load_averaged_state_dict(tmp_path / "users", "swa")
    assert list(found) == list(net.state_dict())
    assert all(equal(found[name], expected[name]) for name in found)
    Net().load_state_dict(found)


def test_an_average_in_a_folder_below(tmp_path):
    _, average = trained(SWA())
    average.save(tmp_path / "run" / "checkpoint" / "average")
    expected = sharded_avg.load_averaged_state_dict(tmp_path / "run" / "checkpoint" / "average")
    found = sharded_avg.load_averaged_state_dict(tmp_path / "run")
    assert all(equal(found[name], expected[name]) for name in expected)
    average.save(tmp_path / "run" / "other")
    with pytest.raises(CheckpointError, match=r"checkpoint/average.*other"):
        sharded_avg.load_averaged_state_dict(tmp_path / "run")


def test_what_is_wrong_is_said(tmp_path):
    net, average = trained({"ema": EMA(decay=0.5), "swa": SWA()})
    load = sharded_avg.load_averaged_state_dict
    average.save(tmp_path / "average")
    for name in (None, "average", "swa.scale"):
        with pytest.raises(CheckpointError, match=r"\['ema', 'swa'\]"):
            load(tmp_path / "average", name)
    ShardedAverage(net, SWA()).save(tmp_path / "early")
    with pytest.raises(NotStartedError, match="no update"):
        load(tmp_path / "early")
    dcp.save({"model": net.state_dict()}, checkpoint_id=tmp_path / "plain")
    torch.save(net.state_dict(), tmp_path / "plain.pt")
    for plain in ("plain", "plain.pt"):
        with pytest.raises(CheckpointError, match="no average"):
            load(tmp_path / plain)
    (tmp_path / "empty").mkdir()
    for missing in ("empty", "not there", "not/there.pt"):
        with pytest.raises(CheckpointError):
            load(tmp_path / missing)
    (tmp_path / "average").rename(tmp_path / "torn.incoming")
    (tmp_path / "torn.incoming" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="cut short"):
        load(tmp_path / "torn")
    with pytest.raises(CheckpointError, match="copy the folder"):
        load("s3://bucket/average")


def test_a_key_of_a_plain_checkpoint(tmp_path):
    net, _ = trained(SWA())
    dcp.save({"model": net.state_dict(), "optim": {"w": torch.ones(3)}}, checkpoint_id=tmp_path / "plain")
    assert list(open_source(tmp_path / "plain", "model").infos) == list(net.state_dict())
    with pytest.raises(CheckpointError, match="'model', 'optim'"):
        open_source(tmp_path / "plain", "weights")


def test_a_folder_of_several_files_names_them(tmp_path):
    for name in ("a", "b"):
        safetensors.torch.save_file({"w": torch.ones(3)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ConfigError, match=r"a\.safetensors.*b\.safetensors"):
        open_source(tmp_path)


def test_reading_needs_no_process_group(tmp_path):
    _, average = trained(SWA())
    average.save(Path(tmp_path / "average"))
    assert not torch.distributed.is_initialized()
    sharded_avg.load_averaged_state_dict(str(tmp_path / "average"))
    assert not torch.distributed.is_initialized()
