"""Which ranks an FSDP1 model lies on, and which models Fsdp1Layout refuses, with what words."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from sharded_avg.errors import EngineVersionError, LayoutChangedError, UnsupportedModelError
from sharded_avg.weights.layouts.fsdp1 import Fsdp1Layout
from tests.helpers.fsdp1_models import assert_state, batch, both_views, fsdp, mesh, plain_model
from tests.helpers.pool import on_ranks


@on_ranks(3)
def test_group_of_a_part_of_the_world() -> None:
    """A process group that the user gave is the layout's."""
    pair, other = dist.new_group([0, 1]), dist.new_group([0, 2])
    if dist.get_rank() < 2:
        plain = plain_model()
        model = FSDP(copy.deepcopy(plain), process_group=pair, device_id=torch.device("cpu"), use_orig_params=True)
        layout = Fsdp1Layout(model)
        assert layout.group is pair
        assert_state(layout, plain)
    if dist.get_rank() == 0:
        groups = {"process_group": (pair, other), "sharding_strategy": ShardingStrategy.HYBRID_SHARD}
        model = FSDP(plain_model(), device_id=torch.device("cpu"), **groups)
        with pytest.raises(UnsupportedModelError, match="HYBRID_SHARD over 2 x 2 ranks of 3"):
            Fsdp1Layout(model)
        inside = FSDP(nn.Linear(3, 3), process_group=other, device_id=torch.device("cpu"))
        both = nn.Sequential(inside, FSDP(nn.Linear(3, 3), process_group=pair, device_id=torch.device("cpu")))
        with pytest.raises(UnsupportedModelError, match=r"different ranks, \[\(0, 1\), \(0, 2\)\]"):
            Fsdp1Layout(both)


@on_ranks(2)
def test_refusals_say_why() -> None:
    """P34: what cannot be cut rightly is refused, with a way out, and nothing is averaged wrongly."""
    cpu = torch.device("cpu")
    conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
    with pytest.raises(UnsupportedModelError, match=r"'weight' of shape \(5, 3, 3, 3\).*contiguous\(\)"):
        Fsdp1Layout(FSDP(conv, device_id=cpu))

    mixed = nn.Sequential(
        FSDP(nn.Linear(3, 3), device_id=cpu), fully_shard(nn.Linear(3, 3), mesh=mesh((1, 2))["shard"])
    )
    with pytest.raises(UnsupportedModelError, match="'1' is a FSDPLinear"):
        Fsdp1Layout(mixed)
    mixed = nn.Sequential(FSDP(nn.Linear(3, 3), device_id=cpu), DistributedDataParallel(nn.Linear(3, 3)))
    with pytest.raises(UnsupportedModelError, match="'1' is a DistributedDataParallel"):
        Fsdp1Layout(mixed)
    part = nn.Sequential(FSDP(nn.Linear(3, 3), device_id=cpu), nn.Linear(3, 3))
    part[1].weight = nn.Parameter(distribute_tensor(part[1].weight.detach(), mesh((1, 2))["shard"]))
    with pytest.raises(UnsupportedModelError, match=r"'1\.weight' is a DTensor"):
        Fsdp1Layout(part)

    for use_orig_params in (True, False):
        inner = nn.Sequential(FSDP(nn.Linear(3, 3), device_id=cpu), nn.Linear(3, 3))
        FSDP(inner, device_id=cpu, use_orig_params=use_orig_params)
        with pytest.raises(UnsupportedModelError, match="pass the outermost module"):
            Fsdp1Layout(inner)
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    tied[0] = FSDP(tied[0], device_id=cpu, use_orig_params=True)
    with pytest.raises(UnsupportedModelError, match=r"'1\.weight'.*share a tied parameter"):
        Fsdp1Layout(tied)

    model = FSDP(nn.Linear(3, 3), device_id=cpu)
    del model._handle.flat_param._shard_param_infos
    with pytest.raises(EngineVersionError, match=f"torch {re.escape(torch.__version__)} has no _shard_param_infos"):
        Fsdp1Layout(model)


@both_views
@on_ranks(2)
def test_not_inside_summon_full_params(use_orig_params: bool) -> None:
    """FSDP's own full parameters are left alone, with a message."""
    model = fsdp(plain_model(), "FULL_SHARD", use_orig_params)
    layout = Fsdp1Layout(model)
    model(batch())
    with FSDP.summon_full_params(model, writeback=False), pytest.raises(LayoutChangedError, match="leave that context"):
        layout.release()
