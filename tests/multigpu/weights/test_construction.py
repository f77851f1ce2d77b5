"""Building an average: who waits for whom, and for how long.

It is local, but for a mesh of several dimensions on a part of the job: its ranks have no group yet, and make one.
"""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from sharded_avg import EMA, ConfigError, PeerError, ShardedAverage
from sharded_avg.ranks import bounds, groups
from tests.helpers.further import covered_by
from tests.helpers.pool import on_ranks

WRONG: dict[str, dict[str, Any]] = {
    "rule": {"rule": "ema"},
    "schedule": {"schedule": 3},
    "dtype": {"dtype": "fp7"},
    "device": {"device": "nowhere"},
    "buffers": {"buffers": "some"},
    "include": {"include": 5},
    "include that raises": {"include": lambda name, tensor: 1 / 0},
}


numbers = count()


def on_a_part() -> nn.Module | None:
    """Collective: all ranks must call. A model on the mesh [[0], [1]], and `None` on the third rank."""
    groups._NAME = f"test{next(numbers)}"  # as in a job that has not averaged such a model before
    mesh = DeviceMesh("cpu", [[0], [1]], mesh_dim_names=("data", "tensor"))
    if dist.get_rank() > 1:
        return None
    model = nn.Linear(3, 5)
    for name, parameter in list(model.named_parameters()):
        torch.manual_seed(0)
        full = torch.randn(parameter.shape)
        setattr(model, name, nn.Parameter(distribute_tensor(full, mesh, [Shard(0), Replicate()])))
    return model


@pytest.mark.parametrize("wrong", covered_by({"rule", "include that raises"}, WRONG))
@on_ranks(3, timeout_s=30.0)
def test_a_bad_argument_on_one_rank_of_a_part_of_the_job(wrong: str) -> None:
    """It raises there, and leaves nobody waiting; then the average is built, and is one."""
    model, average = on_a_part(), None
    if dist.get_rank() == 0:
        average = ShardedAverage(model, EMA(decay=0.5))
    elif dist.get_rank() == 1:
        with pytest.raises((ConfigError, ZeroDivisionError)):
            ShardedAverage(model, **{"rule": EMA(decay=0.5), **WRONG[wrong]})
    dist.barrier()  # nobody waits in there any more
    if model is None:
        return
    average = ShardedAverage(model, EMA(decay=0.5)) if average is None else average
    average.update()
    with average.summon_full_params(rank0_only=False) as full:
        assert full["weight"].shape == (5, 3)


@on_ranks(3)
def test_a_rank_that_does_not_build_it() -> None:
    model, kept = on_a_part(), bounds.PATIENCE_S
    bounds.PATIENCE_S = 2.0
    try:
        if dist.get_rank() == 0:
            with pytest.raises(PeerError, match=r"no group of ranks \[0, 1\].*wait for 2 s"):
                ShardedAverage(model, EMA(decay=0.5))
    finally:
        bounds.PATIENCE_S = kept
    dist.barrier()
