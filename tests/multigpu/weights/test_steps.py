"""`average.attach(optimizer)` in the hands of every engine."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from sharded_avg import EMA, ShardedAverage
from tests.helpers.pool import on_ranks
from tests.helpers.zero_engines import engine_of, settings, train


def fsdp1(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def tp(model: nn.Module) -> nn.Module:
    return parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), {"0": ColwiseParallel()})


@on_ranks(2)
def test_only_steps_count() -> None:
    """R30: the same answer on every rank, whatever of the weights it owns."""
    for engine in (DistributedDataParallel, fsdp1, fully_shard, tp):
        torch.manual_seed(3)
        model = engine(nn.Sequential(nn.Linear(3, 5, bias=False)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        average = ShardedAverage(model, EMA(decay=0.5))
        average.attach(optimizer)
        counted = []
        for micro in range(6):
            model(torch.randn(7, 3, generator=torch.Generator().manual_seed(micro))).square().mean().backward()
            if micro % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
            counted += [average.update(), average.update()]
        assert counted == [False] * 4 + [True] + [False] * 5 + [True, False], engine
        assert average.num_steps == 2


@on_ranks(2, kind="deepspeed")
def test_an_engine_of_deepspeed_tells_by_itself() -> None:
    with engine_of(settings("2-bf16", gradient_accumulation_steps=2)) as engine:
        average = ShardedAverage(engine, EMA(decay=0.5))
        average.attach(engine.optimizer.optimizer)
        counted = []
        for step in range(4):
            train(engine, range(step, step + 1))
            counted.append(average.update())
        assert counted == [False, True, False, True]
