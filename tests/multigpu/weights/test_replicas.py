"""Replicas: models that several ranks hold whole, whether or not a wrapper says so, and what a swap does to them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sharded_avg import EMA, ConfigError, ShardedAverage, load_averaged_state_dict
from tests.helpers.pool import on_ranks


def model_of(value: float) -> nn.ModuleDict:
    """Equal on all ranks for equal values; odd sizes."""
    model = nn.ModuleDict({"first": nn.Linear(3, 5), "second": nn.Linear(5, 1, bias=False)})
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.arange(float(parameter.numel())).view_as(parameter) / 8 + value + number)
    return model


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


# --- process_group= ------------------------------------------------------------------------------------------------


@on_ranks(2, 3)
def test_replicas_that_no_wrapper_knows_of(world_size: int, tmp_path: Path) -> None:
    """R02: with `process_group=`, a plain module is divided, swapped and saved as one under DDP."""
    plain = model_of(1.0)
    average = ShardedAverage(plain, EMA(decay=0.5), process_group=dist.group.WORLD)
    other = ShardedAverage(DistributedDataParallel(model_of(1.0)), EMA(decay=0.5))
    average.update()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(2)
    average.update()
    other.update()
    assert average.nbytes == other.nbytes
    assert average.process_group is dist.group.WORLD
    raw, expected = values_of(plain), values_of(model_of(2.0))
    with average.swapped():
        assert_equal(values_of(plain), expected)
    assert_equal(values_of(plain), raw)
    average.save(tmp_path / "one")
    assert_equal(load_averaged_state_dict(tmp_path / "one"), expected)
    other.load(tmp_path / "one")
    with other.summon_full_params(rank0_only=False) as full:
        assert_equal(full, expected)


@on_ranks(3)
def test_replicas_on_a_part_of_the_job() -> None:
    pair = dist.new_group([0, 1])
    model = model_of(dist.get_rank() // 2)
    if dist.get_rank() == 2:
        with pytest.raises(ConfigError, match="rank 2 is not one of its ranks"):
            ShardedAverage(model, EMA(decay=0.5), process_group=pair)
        average = ShardedAverage(model, EMA(decay=0.5))
    else:
        average = ShardedAverage(model, EMA(decay=0.5), process_group=pair)
    average.update()
    raw = values_of(model)
    with average.swapped():
        assert_equal(values_of(model), raw)
    assert_equal(values_of(model), raw)
    assert average.nbytes == 4 * (25 if dist.get_rank() == 2 else (13, 12)[dist.get_rank()])


@on_ranks(2)
def test_a_group_that_contradicts_the_engine() -> None:
    wrapped, alone = DistributedDataParallel(model_of(1.0)), [dist.new_group([rank]) for rank in range(2)]
    with pytest.raises(ConfigError, match=r"has the ranks \[\d\].*DistributedDataParallel.*on \[0, 1\]: leave"):
        ShardedAverage(wrapped, EMA(decay=0.5), process_group=alone[dist.get_rank()])
    ShardedAverage(wrapped, EMA(decay=0.5), process_group=dist.group.WORLD)  # no contradiction
    with pytest.raises(ConfigError, match=r"process_group=2: must be a torch\.distributed\.ProcessGroup"):
        ShardedAverage(model_of(1.0), EMA(decay=0.5), process_group=2)  # type: ignore[arg-type]
