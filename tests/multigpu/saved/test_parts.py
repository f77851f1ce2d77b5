"""R02, R03: ranks that hold other things, or the same: saved together, each for itself, or refused.

Nothing of a model that some rank holds is lost without a word, and no rank waits for one that cannot go on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sharded_avg import (
    EMA,
    SWA,
    CheckpointError,
    PeerError,
    ShardedAverage,
    SwapError,
    load_averaged_state_dict,
)
from tests.helpers.pool import on_ranks, under_torchrun

pytestmark = pytest.mark.skipif(under_torchrun(), reason="makes groups of some of the ranks")
SOON_S = 15.0


class Layers(nn.Module):
    """Under names of their own. (No ModuleDict: torch 2.11's `fully_shard` refuses containers, whatever they do.)"""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def __getitem__(self, name: str) -> nn.Module:
        return self.get_submodule(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            x = layer(x)
        return x


def filled(model: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def started(model: nn.Module, **arguments: Any) -> ShardedAverage:
    average = ShardedAverage(model, EMA(decay=0.5), **arguments)
    average.update()
    return average


def own_model(value: float | None = None) -> nn.Module:
    """Of every rank its own, with odd sizes and a parameter of one element."""
    net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
    return filled(net, dist.get_rank() + 1.0 if value is None else value)


def stage(value: float | None = None) -> nn.Module:
    """Two layers of a pipeline, named as in the whole model; rank 1's are tied, and have a buffer."""
    rank = dist.get_rank()
    made = Layers({str(i): nn.Linear(3, 3) for i in (2 * rank, 2 * rank + 1)})
    if rank == 1:
        made["3"].weight = made["2"].weight
        made.add_module("norm", nn.BatchNorm1d(3))
    return filled(made, rank + 1.0 if value is None else value)


def values_in(path: Path) -> dict[str, set[float]]:
    return {key: set(value.flatten().tolist()) for key, value in load_averaged_state_dict(path).items()}


def value_of(average: ShardedAverage) -> float:
    with average.summon_full_params(rank0_only=False) as full:
        [value] = {float(v) for key, tensor in full.items() if "norm" not in key for v in tensor.flatten()}
    return value


class Raises:
    """`with Raises(kind, match)`: raises that within seconds."""

    def __init__(self, kind: Any, match: str | None = None) -> None:
        self._raises = pytest.raises(kind, match=match)

    def __enter__(self) -> Any:
        self._start = time.monotonic()
        return self._raises.__enter__()

    def __exit__(self, *error: Any) -> bool:
        assert time.monotonic() - self._start < SOON_S
        return bool(self._raises.__exit__(*error))


def ignored_experts() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    filled(net[1], dist.get_rank() + 1.0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(net, mesh=mesh, ignored_params=set(net[1].parameters()))
    return net


# -- R02: equal names --------------------------------------------------------------------------------------------------


@on_ranks(2, 3)
@pytest.mark.parametrize("make", [ignored_experts, own_model], ids=["experts", "models"])
@pytest.mark.parametrize("how", ["save", "async_save", "dcp.save", "dcp.async_save"])
def test_r02_equal_names_with_other_values_are_refused(tmp_path, make, how):
    """pytorch#120356, #146566: and an earlier checkpoint of that name stays."""
    average = started(make())
    ways: dict[str, Callable[[], Any]] = {
        "save": lambda: average.save(tmp_path / "run"),
        "async_save": lambda: average.async_save(tmp_path / "run").result(),
        "dcp.save": lambda: dcp.save({"average": average}, checkpoint_id=tmp_path / "dcp"),
        "dcp.async_save": lambda: dcp.async_save({"average": average}, checkpoint_id=tmp_path / "dcp").result(),
    }
    with Raises((CheckpointError, CheckpointException), r"(?s)average\.[01]\.weight.*a path of its own.*include="):
        ways[how]()
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "dcp" / ".metadata").exists()


@on_ranks(2, 3)
def test_r02_one_element_that_differs_is_noticed(tmp_path):
    """Also the last one, in bf16, by one bit; a NaN equals itself."""
    net = own_model(1.0).bfloat16()
    with torch.no_grad():
        net[0].weight[0, 0] = float("nan")
    average = started(net, dtype=None)
    average.save(tmp_path / "run")
    with torch.no_grad():
        net[0].weight[-1, -1] += dist.get_rank() * 2**-7
    average = started(net, dtype=None)
    with Raises(CheckpointError, r"average\.0\.weight'\, with other"):
        average.save(tmp_path / "other")
    assert not (tmp_path / "other").exists()


@on_ranks(2, 3)
def test_r02_a_path_for_each_rank(tmp_path):
    """Each folder is whole and its rank's; loading, and saving there again, are this rank's alone, too."""
    average = started(own_model())
    mine = tmp_path / f"run{dist.get_rank()}"
    for save in (average.save, lambda path: average.async_save(path).result(), average.save):
        save(mine)
        assert set.union(*values_in(mine).values()) == {dist.get_rank() + 1.0}
    fresh = ShardedAverage(own_model(50.0), EMA(decay=0.5))
    assert str(fresh.load(mine)) == "all of it was loaded"
    assert value_of(fresh) == dist.get_rank() + 1.0
    dist.barrier()
    other = tmp_path / f"run{(dist.get_rank() + 1) % dist.get_world_size()}"
    with Raises(CheckpointError, "of this job have saved to"):
        average.save(other)
    dist.barrier()
    assert set.union(*values_in(mine).values()) == {dist.get_rank() + 1.0}


@on_ranks(3)
def test_r02_some_ranks_share_a_path(tmp_path):
    """Two replicas of one model, and a model of its own."""
    rank = dist.get_rank()
    path = tmp_path / ("pair" if rank < 2 else "single")
    average = started(own_model(float(rank // 2)))
    average.save(path)
    dist.barrier()
    assert set.union(*values_in(path).values()) == {float(rank // 2)}
    fresh = ShardedAverage(own_model(50.0), EMA(decay=0.5))
    fresh.load(path)
    assert value_of(fresh) == rank // 2


@on_ranks(2, 3)
def test_r02_replicas_that_nothing_connects_save_once(tmp_path):
    """A plain model under torchrun, the same on all ranks: one folder, of the size of one model."""
    average = started(own_model(7.0))
    average.save(tmp_path / "run", with_buffers=True)
    dist.barrier()
    assert set.union(*values_in(tmp_path / "run").values()) == {7.0}
    counts = {"run": sum(file.read_bytes().count(b"data.pkl") for file in (tmp_path / "run").glob("*.distcp"))}
    assert counts["run"] == 2 * 5  # four parameters and the manifest, each named at its place and in its directory
    fresh = ShardedAverage(own_model(0.0), EMA(decay=0.5))
    fresh.load(tmp_path / "run")
    assert value_of(fresh) == 7.0


@on_ranks(2)
def test_r02_ranks_that_have_counted_differently_are_refused(tmp_path):
    average = started(own_model(1.0))
    if dist.get_rank() == 1:
        average.update()
    with Raises(CheckpointError, "other counts"):
        average.save(tmp_path / "run")


@on_ranks(2)
def test_r02_one_name_of_two_shapes_is_refused(tmp_path):
    average = started(filled(nn.Linear(3, 4 + dist.get_rank()), 1.0))
    with Raises(CheckpointError, "weight"):
        average.save(tmp_path / "run")
    with Raises(CheckpointException):
        dcp.save({"average": average}, checkpoint_id=tmp_path / "dcp")


@on_ranks(4)
def test_r02_groups_of_ranks_that_hold_stages(tmp_path):
    """Two FSDP2 stages on two ranks each: a path for each, or one checkpoint of torch's; never one torn folder."""
    number = dist.get_rank() // 2
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))["dp"]
    net = filled(Layers({str(i): nn.Linear(3, 3) for i in (2 * number, 2 * number + 1)}), number + 1.0)
    fully_shard(net, mesh=mesh)
    average = started(net)
    average.save(tmp_path / str(number))
    fresh = ShardedAverage(net, EMA(decay=0.5))
    fresh.load(tmp_path / str(number))
    outcome = "saved"
    try:
        average.save(tmp_path / "one")
    except CheckpointError as error:
        outcome = "refused" if "path of its own" in str(error) else str(error)
    outcomes: list[Any] = [None] * 4
    dist.all_gather_object(outcomes, (number, outcome))
    assert {done for _, done in outcomes} == {"saved", "refused"}
    assert len(set(outcomes)) == 2
    assert len(load_averaged_state_dict(tmp_path / "one")) == 4
    dcp.save({"average": average}, checkpoint_id=tmp_path / "dcp")
    found = values_in(tmp_path / "dcp")
    assert found == {f"{i}.{kind}": {i // 2 + 1.0} for i in range(4) for kind in ("weight", "bias")}
    whole = filled(Layers({str(i): nn.Linear(3, 3) for i in range(4)}), 0.0)
    fully_shard(whole, mesh=init_device_mesh("cpu", (4,)))
    for part in (ShardedAverage(net, EMA(decay=0.5)), ShardedAverage(whole, EMA(decay=0.5))):
        dcp.load({"average": part}, checkpoint_id=tmp_path / "dcp")
        assert part.n_averaged == 1
        with part.summon_full_params(rank0_only=False) as full:
            assert all(set(value.flatten().tolist()) == found[key] for key, value in full.items())


# -- R02: stages ---------------------------------------------------------------------------------------------------


@on_ranks(2, 3)
@pytest.mark.parametrize("how", ["save", "async_save"])
def test_r02_stages_are_saved_together(tmp_path, how):
    """torchtitan#406: all names, tied ones too, buffers and counts; each stage and the whole model load strictly."""
    rank, size = dist.get_rank(), dist.get_world_size()
    average = started(stage())
    if how == "save":
        average.save(tmp_path / "run", with_buffers=True)
    else:
        average.async_save(tmp_path / "run").result()
    dist.barrier()
    found = values_in(tmp_path / "run")
    names = {f"{i}.{kind}" for i in range(2 * size) for kind in ("weight", "bias")}
    assert {name for name in found if "norm" not in name} == names
    assert all(found[name] == {int(name.partition(".")[0]) // 2 + 1.0} for name in names)
    assert ("norm.running_var" in found) == (how == "save")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["aliases"] == {"3.weight": "2.weight"}
    fresh = ShardedAverage(stage(50.0), EMA(decay=0.5))
    assert str(fresh.load(tmp_path / "run")) == "all of it was loaded"
    assert value_of(fresh) == rank + 1.0
    assert fresh.update()
    whole = Layers({str(i): nn.Linear(3, 3) for i in range(2 * size)})
    whole["3"].weight = whole["2"].weight
    whole.add_module("norm", nn.BatchNorm1d(3))
    fully_shard(whole, mesh=init_device_mesh("cpu", (size,)))
    sharded = ShardedAverage(whole, EMA(decay=0.5))
    assert str(sharded.load(tmp_path / "run")) == "all of it was loaded"
    with sharded.summon_full_params(rank0_only=False) as full:
        assert all(set(full[name].flatten().tolist()) == found[name] for name in names)


@on_ranks(2)
def test_r02_strict_is_of_all_ranks_together(tmp_path):
    """A name that no rank has is unexpected; one that the folder lacks is missing, and told to all."""
    more = Layers({str(i): nn.Linear(3, 3) for i in range(5)})
    more["3"].weight = more["2"].weight
    started(filled(more, 1.0)).save(tmp_path / "run")
    fresh = ShardedAverage(stage(), EMA(decay=0.5))
    with Raises(CheckpointError, r"lacks: \['4\.weight', '4\.bias'\]" if dist.get_rank() == 0 else None):
        fresh.load(tmp_path / "run")
    result = fresh.load(tmp_path / "run", strict=False)
    assert result.unexpected_keys == ["4.weight", "4.bias"]
    longer = Layers({str(i): nn.Linear(3, 3) for i in ((0, 1), (2, 4, 5))[dist.get_rank()]})
    with Raises(
        CheckpointError, r"missing from it: \['5\.weight'" if dist.get_rank() == 1 else r"lacks: \['3\.bias'\]"
    ):
        ShardedAverage(longer, EMA(decay=0.5)).load(tmp_path / "run")


@on_ranks(2)
def test_r02_stages_in_a_checkpoint_of_the_users(tmp_path):
    """INTEGRATIONS: 23 of 45 names were read back, and a resume raised on one stage."""
    average = started(stage())
    dcp.save({"average": average}, checkpoint_id=tmp_path / "run")
    dist.barrier()
    assert {f"{i}.bias" for i in range(4)} <= set(load_averaged_state_dict(tmp_path / "run"))
    fresh = ShardedAverage(stage(50.0), EMA(decay=0.5))
    dcp.load({"average": fresh}, checkpoint_id=tmp_path / "run")
    assert (value_of(fresh), fresh.n_averaged) == (dist.get_rank() + 1.0, 1)


@on_ranks(2)
def test_r02_process_group_says_who_holds_a_model_together(tmp_path):
    average = started(own_model(3.0), process_group=dist.group.WORLD)
    average.save(tmp_path / "run")
    dist.barrier()
    assert set.union(*values_in(tmp_path / "run").values()) == {3.0}
    with Raises(Exception, "different places"):
        average.save(tmp_path / f"run{dist.get_rank()}")


# -- R03 ---------------------------------------------------------------------------------------------------------------


def misfit(average: ShardedAverage, path: Path) -> None:
    other = ShardedAverage(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), EMA(decay=0.5))
    other.load(path)


def narrow(average: ShardedAverage, path: Path) -> None:
    ShardedAverage(own_model(1.0), EMA(decay=0.5), dtype=torch.bfloat16).load(path)


def other_name(average: ShardedAverage, path: Path) -> None:
    ShardedAverage(own_model(1.0), {"mine": SWA()}).load(path)


def no_path(average: ShardedAverage, path: Path) -> None:
    average.load(3)  # type: ignore[arg-type]


def inside_a_swap(average: ShardedAverage, path: Path) -> None:
    with average.swapped():
        average.load(path)


def interrupted(average: ShardedAverage, path: Path) -> None:
    from sharded_avg.files.dcp_folder import DcpFolder

    read = DcpFolder.read

    def stop(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    DcpFolder.read = stop  # type: ignore[method-assign]
    try:
        average.load(path)
    finally:
        DcpFolder.read = read  # type: ignore[method-assign]


CASES = [
    (misfit, CheckpointError),
    (narrow, CheckpointError),
    (other_name, CheckpointError),
    (no_path, Exception),
    (inside_a_swap, SwapError),
    (interrupted, KeyboardInterrupt),
]


@on_ranks(2, 3)
def test_r03_a_load_that_fails_on_one_rank_fails_on_all(tmp_path):
    """pytorch#106415 and its kind: all raise within seconds, nothing has changed, and the next load succeeds."""
    average = started(own_model(1.0))
    average.save(tmp_path / "run")
    failing = dist.get_world_size() - 1
    for fail, kind in CASES:
        with Raises(kind if dist.get_rank() == failing else PeerError):
            (fail if dist.get_rank() == failing else ShardedAverage.load)(average, tmp_path / "run")
        assert (value_of(average), average.n_averaged) == (1.0, 1), fail
        average.load(tmp_path / "run")


@on_ranks(2, 3)
def test_r03_under_an_engine(tmp_path):
    """A rank that asks for another folder, or for none."""
    net = filled(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1)), 1.0)
    fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    average = started(net)
    average.save(tmp_path / "run")
    path = tmp_path / ("run" if dist.get_rank() else "elsewhere")
    with Raises(Exception, "different folders"):
        average.load(path)
    with Raises(CheckpointError, "nothing of that name"):
        average.load(tmp_path / "elsewhere")
    average.load(tmp_path / "run")
    assert average.n_averaged == 1
