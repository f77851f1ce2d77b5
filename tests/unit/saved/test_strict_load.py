"""R09: whatever a strict load needs is kept, wherever an average is saved or handed out.

TransformerEngine#458: `_extra_state`; DeepSpeed#8467: a parameter without elements.
"""

from __future__ import annotations

import io
import json
import math
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from sharded_avg import EMA, CheckpointError, ShardedAverage, load_averaged_state_dict
from sharded_avg.commands.cli import main
from sharded_avg.saved.manifest import Manifest
from sharded_avg.saved.plain import decode, encode

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

PLAIN = {
    "none": None,
    "numbers": [True, -3, 2**70, 0.1, -0.0, math.inf, complex(1, -2)],
    "text": "naïve\0",
    "bytes": bytes(range(256)),
    "bytearray": bytearray(b"ab"),
    "tuple": (1, (2, "x"), []),
    "sets": {1, 2},
    "frozen": frozenset({"a"}),
    "keys": {1: "a", (2, "b"): {}, None: 0, False: 1.5},
    "ordered": OrderedDict([("z", 1), ("a", 2)]),
    "size": torch.Size([2, 0]),
    "dtype": torch.bfloat16,
    "device": torch.device("cpu"),
}
TENSORS = [
    torch.tensor([1, 2, 3], dtype=torch.uint8),
    torch.randn(3, 5).bfloat16(),
    torch.randn(7, 3).t(),
    torch.tensor(3.5, dtype=torch.float64),
    torch.tensor([True, False]),
    torch.empty(0, 3),
    torch.randn(3, dtype=torch.complex64),
    torch.randn(5).to(torch.float8_e4m3fn),
]


class Stateful(nn.Module):
    """With a weight, a weight without elements, and extra state."""

    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.w, self.none = nn.Parameter(torch.ones(3)), nn.Parameter(torch.empty(0, 3))
        self.extra = extra
        self.seen: Any = "nothing"

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.seen = state


def net(extra: Any = None) -> nn.Module:
    """Beside extra state: tied, frozen, of no elements and frozen, buffers of two dtypes and one of no elements."""
    model = nn.Sequential(Stateful(extra), nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[2].weight = model[1].weight
    model[2].bias.requires_grad_(False)
    model[1].register_parameter("spare", nn.Parameter(torch.empty(2, 0), requires_grad=False))
    model[1].register_buffer("nothing", torch.empty(0, dtype=torch.int32))
    return model


def started(model: nn.Module) -> ShardedAverage:
    average = ShardedAverage(model, EMA(decay=0.5))
    average.update()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    average.update()
    return average


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    bits = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (left, right)]
    return left.shape == right.shape and torch.equal(*bits)


def assert_loads(found: dict[str, Any], average: ShardedAverage, fresh: nn.Module) -> None:
    """Strictly, every value."""
    with average.summon_full_params() as full:
        assert found.keys() == full.keys()
        for key, value in full.items():
            if isinstance(value, torch.Tensor):
                assert same(found[key], value), key
    fresh.load_state_dict(found, strict=True)


@pytest.mark.parametrize("extra", [PLAIN, *TENSORS, None], ids=lambda value: type(value).__name__)
def test_r09_a_folder_loads_strictly(tmp_path, extra):
    model = net(extra)
    average = started(model)
    average.save(tmp_path / "run", with_buffers=True)
    fresh = net()
    assert_loads(load_averaged_state_dict(tmp_path / "run"), average, fresh)
    seen = fresh[0].seen
    if isinstance(extra, torch.Tensor):
        assert (seen.dtype, seen.shape) == (extra.dtype, extra.shape)
        assert same(seen, extra)
    else:
        assert seen == extra
        assert repr(seen) == repr(extra)


def test_r09_without_buffers_there_is_enough_where_there_are_none(tmp_path):
    model = nn.Sequential(Stateful({"scale": torch.ones(3)}), nn.Linear(3, 2))
    average = started(model)
    average.save(tmp_path / "run")
    fresh = nn.Sequential(Stateful(None), nn.Linear(3, 2))
    assert_loads(load_averaged_state_dict(tmp_path / "run"), average, fresh)
    assert torch.equal(fresh[0].seen["scale"], torch.ones(3))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["empty"] == {"0.none": {"shape": [0, 3], "dtype": "float32"}}
    again = ShardedAverage(fresh, EMA(decay=0.5))
    assert str(again.load(tmp_path / "run")) == "all of it was loaded"


def test_r09_a_checkpoint_of_the_users(tmp_path):
    """Alone, and beside the model; loading takes checkpoints that have none of it, too."""
    model = nn.Sequential(Stateful(PLAIN), nn.Linear(3, 2))
    average = started(model)
    dcp.save({"average": average}, checkpoint_id=tmp_path / "alone")
    assert_loads(load_averaged_state_dict(tmp_path / "alone"), average, model)
    assert model[0].seen == PLAIN
    full = net(torch.arange(3))
    beside = started(full)
    dcp.save({"average": beside, "model": full.state_dict()}, checkpoint_id=tmp_path / "both")
    assert_loads(load_averaged_state_dict(tmp_path / "both"), beside, net())
    fresh = ShardedAverage(net(torch.arange(3)), EMA(decay=0.5))
    dcp.load({"average": fresh}, checkpoint_id=tmp_path / "both")
    assert fresh.n_averaged == 2


def test_r09_an_old_folder_lacks_it_and_loads(tmp_path):
    """Format 1 before `empty` and `extra`: a model with both takes it over strictly."""
    average = started(nn.Sequential(Stateful(3), nn.Linear(3, 2)))
    dcp_manifest = average.manifest()
    text = json.loads(dcp_manifest.to_json())
    del text["empty"], text["extra"]
    old = Manifest.from_json(json.dumps(text))
    assert not old.empty
    with average.summon_full_params() as full:
        average.load_full({"average": full}, old)


def test_r09_bytes_streams(tmp_path):
    """TransformerEngine keeps a BytesIO."""
    stream = io.BytesIO()
    torch.save({"amax": torch.ones(3)}, stream)
    average = started(nn.Sequential(Stateful(stream), nn.Linear(3, 2)))
    average.save(tmp_path / "run")
    found = load_averaged_state_dict(tmp_path / "run")["0._extra_state"]
    assert torch.equal(torch.load(found)["amax"], torch.ones(3))


class Odd:
    """Of a class that a file must not name."""

    ran = False

    def __reduce__(self) -> Any:
        return setattr, (Odd, "ran", True)


def test_r09_what_would_run_is_refused(tmp_path):
    average = started(nn.Sequential(Stateful({"a": [Odd()]}), nn.Linear(3, 2)))
    with pytest.raises(CheckpointError, match=r"0\._extra_state.*Odd.*torch\.save into an io\.BytesIO"):
        average.save(tmp_path / "run", with_buffers=True)
    assert not (tmp_path / "run").exists()
    with pytest.warns(UserWarning, match="It was left out"):
        average.save(tmp_path / "run")
    assert "0.w" in load_averaged_state_dict(tmp_path / "run")
    with pytest.warns(UserWarning, match="It was left out"):
        dcp.save({"average": average}, checkpoint_id=tmp_path / "dcp")
    assert not Odd.ran


@pytest.mark.parametrize(
    "hostile",
    [
        {"Odd": 1},
        {"bytes": "!"},
        {"tensor": ["float32", [3], ""]},
        {"tensor": ["float32", [-1, -12], "AAAA"]},
        {"tensor": ["Tensor", [3], "AAAA"]},
        {"dict": [[[], 1]]},
        {"dict": 3},
        {"a": 1, "b": 2},
        {"complex": "x"},
        {"device": "nosuch"},
        {},
    ],
    ids=repr,
)
def test_r09_extra_state_that_nobody_wrote(tmp_path, hostile):
    """A manifest is a text that anybody can edit: it is an error, and nothing runs."""
    average = started(nn.Sequential(Stateful(3), nn.Linear(3, 2)))
    average.save(tmp_path / "run")
    manifest = tmp_path / "run" / "manifest.json"
    data = json.loads(manifest.read_text())
    data["extra"] = {"0._extra_state": hostile}
    manifest.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="damaged"):
        load_averaged_state_dict(tmp_path / "run")


def test_r09_deep_and_wide_values():
    deep: Any = []
    for _ in range(200):
        deep = [deep]
    with pytest.raises(TypeError, match="deep"):
        encode(deep)
    text = "[" * 200 + "]" * 200
    with pytest.raises(ValueError, match="deep"):
        decode(json.loads(text))
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(TypeError, match="deep"):
        encode(loop)


def test_r09_plain_values_are_json():
    assert pickle.loads(pickle.dumps(PLAIN)) == decode(json.loads(json.dumps(encode(PLAIN), allow_nan=False)))


def test_r09_converted_and_consolidated(tmp_path, capsys):
    """Into our own format and a torch file, all of it; into safetensors, what are tensors, and a word of the rest."""
    average = started(nn.Sequential(Stateful(torch.arange(5)), Stateful({"a": 1})))
    average.save(tmp_path / "run", with_buffers=True)
    expected = load_averaged_state_dict(tmp_path / "run")
    run, merged_path = str(tmp_path / "run"), str(tmp_path / "merged")
    for out in ("x.safetensors", "x.pt"):
        assert main(["consolidate", run, str(tmp_path / out)]) == 0
        found = load_averaged_state_dict(tmp_path / out)
        lacking = {"1._extra_state"} if out == "x.safetensors" else set()
        assert found.keys() == expected.keys() - lacking
        assert found["0.none"].shape == (0, 3)
        assert torch.equal(found["0._extra_state"], torch.arange(5))
        assert ("left out, as it is no tensor: 1._extra_state" in capsys.readouterr().err) == bool(lacking)
    assert main(["merge", run, run, merged_path, "--weights", "1,0"]) == 0
    merged = load_averaged_state_dict(merged_path)
    assert merged["0.none"].shape == (0, 3)
    assert merged["1._extra_state"] == {"a": 1}
    nn.Sequential(Stateful(None), Stateful(None)).load_state_dict(merged, strict=True)
