"""Weighted sums of saved averages and of checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sharded_avg
from sharded_avg import EMA, SWA, CheckpointError, ConfigError, ShardedAverage
from sharded_avg.commands.cli import main
from sharded_avg.commands.merge import merge
from sharded_avg.commands.sums.weighted_sum import given, uniform, window, wsm
from sharded_avg.commands.target import Target
from sharded_avg.formats.open import open_source

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.frozen = nn.Linear(3, 5).requires_grad_(False)
        self.norm = nn.BatchNorm1d(5)
        self.scale = nn.Parameter(torch.randn(1).bfloat16())
        self.out = nn.Linear(3, 7, bias=False)
        self.out.weight = self.embed.weight


def averages(folder: Path, count: int) -> list[Path]:
    """Averages of one run, saved at step 1, 2, ..."""
    net = Net()
    average = ShardedAverage(net, SWA())
    paths = []
    for index in range(count):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update()
        paths.append(folder / f"step-{index + 1}")
        average.save(paths[-1])
    return paths


def checkpoints(folder: Path, count: int) -> tuple[list[Path], list[dict[str, Tensor]]]:
    """Plain state dicts of models, with buffers of integers."""
    states = [Net().state_dict() for _ in range(count)]
    for index, state in enumerate(states):
        state["norm.num_batches_tracked"] += index
        torch.save(state, folder / f"{index}.pt")
    return [folder / f"{index}.pt" for index in range(count)], states


def test_weights_of_each_method():
    assert uniform(4) == [0.25] * 4
    assert given([1, 3]) == [0.25, 0.75]
    assert window(5, 2) == [0, 0, 0, 0.5, 0.5]
    assert wsm(1, "linear") == [1.0]
    assert wsm(4, "linear") == pytest.approx(uniform(4))  # a linear decay is the mean
    # Megatron's restatement for k = 4, by hand: w = 1 - sqrt(i / 4) = 1, 0.5, 1 - sqrt(0.5), 1 - sqrt(0.75)
    assert wsm(4, "1-sqrt") == pytest.approx([0.5, 0.5**0.5 - 0.5, 0.75**0.5 - 0.5**0.5, 1 - 0.75**0.5])
    for shape in ("linear", "1-sqrt"):
        for count in (1, 2, 3, 7, 50):
            assert sum(wsm(count, shape)) == pytest.approx(1.0, abs=1e-15)


def test_wsm_stands_in_for_a_decay_of_the_gradients():
    """merged = x_0 - sum w_i g_i: with x_j = x_0 - g_1 - ... - g_j, the share of g_i is w_i."""
    gradients = torch.randn(3, 5, dtype=torch.float64)
    snapshots = torch.randn(5, dtype=torch.float64) - torch.cat([torch.zeros(1, 5), gradients.cumsum(0)])
    merged = torch.tensor(wsm(4, "1-sqrt"), dtype=torch.float64) @ snapshots
    kept = torch.tensor([1 - (i / 4) ** 0.5 for i in (1, 2, 3)], dtype=torch.float64)
    torch.testing.assert_close(merged, snapshots[0] - kept @ gradients)


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -1.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_weights_that_cannot_be(weights):
    with pytest.raises(ConfigError):
        given(weights)


@pytest.mark.parametrize("last", [0, -1, 4])
def test_windows_that_cannot_be(last):
    with pytest.raises(ConfigError):
        window(3, last)


def test_a_merge_of_averages_loads_like_an_average(tmp_path):
    paths = averages(tmp_path, 3)
    weights = [0.2, 0.3, 0.5]
    merge(paths, Target(path=tmp_path / "merged", format="folder"), weights, method="weights")
    states = [sharded_avg.load_averaged_state_dict(path) for path in paths]
    found = sharded_avg.load_averaged_state_dict(tmp_path / "merged")
    assert list(found) == list(states[0])
    for name in found:
        expected = sum(w * s[name].double() for w, s in zip(weights, states, strict=True))
        assert torch.equal(found[name], expected.to(found[name].dtype)), name
    average = ShardedAverage(Net(), EMA(decay=0.9))
    average.load(tmp_path / "merged")
    assert average.n_averaged == 3  # the updates of the longest; the others' are among them
    with average.summon_full_params() as full:
        assert all(torch.equal(full[name], found[name]) for name in found)
    assert full["out.weight"] is full["embed.weight"]


def test_provenance(tmp_path):
    paths = averages(tmp_path, 3)
    assert main(["merge", *map(str, paths), str(tmp_path / "merged"), "--lawa", "2"]) == 0
    manifest = json.loads((tmp_path / "merged" / "manifest.json").read_text())
    provenance = manifest["provenance"]
    assert (provenance["kind"], provenance["method"], provenance["accumulate"]) == ("merge", "lawa 2", "float64")
    assert [source["weight"] for source in provenance["sources"]] == [0, 0.5, 0.5]
    assert [source["step"] for source in provenance["sources"]] == [1, 2, 3]
    assert [source["path"] for source in provenance["sources"]] == ["step-1", "step-2", "step-3"]
    assert manifest["step"] == 3


def test_one_source_is_itself(tmp_path):
    (path,) = averages(tmp_path, 1)
    for accumulate in ("fp64", "fp32"):
        out = tmp_path / accumulate
        assert main(["merge", str(path), str(out), "--wsm", "1-sqrt", "--accumulate", accumulate]) == 0
        left, right = map(sharded_avg.load_averaged_state_dict, (path, out))
        assert all(torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left)


@pytest.mark.parametrize("out", ["merged", "merged.safetensors", "merged.pt"])
def test_a_merge_of_model_checkpoints(tmp_path, out):
    """Parameters are averaged in fp64; what is not floating-point is the last source's."""
    paths, states = checkpoints(tmp_path, 3)
    assert main(["merge", *map(str, paths), str(tmp_path / out), "--uniform"]) == 0
    found = sharded_avg.load_averaged_state_dict(tmp_path / out)
    assert sorted(found) == sorted(states[0])
    for name, tensor in found.items():
        values = [state[name] for state in states]
        assert tensor.dtype == values[0].dtype
        expected = sum(v.double() / 3 for v in values).to(tensor.dtype) if tensor.is_floating_point() else values[-1]
        torch.testing.assert_close(tensor, expected, rtol=1e-7, atol=1e-7, msg=name)
    Net().load_state_dict(found)


def test_a_merge_of_model_checkpoints_becomes_an_average(tmp_path):
    """BatchNorm's statistics are buffers: they lie beside the average, as in any folder of ours."""
    paths, _ = checkpoints(tmp_path, 2)
    assert main(["merge", *map(str, paths), str(tmp_path / "merged"), "--uniform"]) == 0
    average = ShardedAverage(Net(), SWA(), include=lambda name, tensor: True)
    average.load(tmp_path / "merged")
    assert average.n_averaged == 2


def test_what_does_not_fit(tmp_path, capsys):
    one, other = nn.Linear(3, 5), nn.Linear(5, 3, bias=False)
    torch.save(one.state_dict(), tmp_path / "one.pt")
    torch.save(other.state_dict(), tmp_path / "other.pt")
    torch.save({"weight": torch.ones(5, 3, dtype=torch.int32), "bias": torch.ones(5)}, tmp_path / "ints.pt")
    sources = [tmp_path / "one.pt", tmp_path / "other.pt"]
    with pytest.raises(CheckpointError, match=r"bias.*weight"):
        merge(sources, Target(path=tmp_path / "x.pt", format="torch"), [0.5, 0.5])
    with pytest.raises(CheckpointError, match="cannot be summed"):
        merge([sources[0], tmp_path / "ints.pt"], Target(path=tmp_path / "x.pt", format="torch"), [0.5, 0.5])
    with pytest.raises(ConfigError, match="one for each"):
        merge(sources[:1], Target(path=tmp_path / "x.pt", format="torch"), [0.5, 0.5])
    assert main(["merge", *map(str, sources), str(tmp_path / "one.pt"), "--uniform"]) == 2
    assert "choose another place" in capsys.readouterr().err
    assert open_source(tmp_path / "one.pt").read("bias").equal(one.bias)
