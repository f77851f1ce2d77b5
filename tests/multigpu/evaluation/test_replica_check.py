"""Replicas that have drifted apart: what, and on which rank."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sharded_avg import EMA, PeerError, Schedule, ShardedAverage, SwapError
from sharded_avg.evaluation.replicas import Differing
from tests.helpers.engines import ENGINES
from tests.helpers.pool import on_ranks

STRAY = 2  # the rank that is wrong


def begun(row: str) -> ShardedAverage:
    engine = ENGINES[row].start()
    average = ShardedAverage(engine.model, {"short": EMA(decay=0.5), "long": EMA(decay=0.9)})
    for step in range(2):
        engine.learn_steps(step, step + 1)
        average.update()
    assert average.check_replicas() == []
    return average


def stray(tensor: torch.Tensor) -> None:
    """The last bit of the last element, on one rank."""
    if dist.get_rank() == STRAY:
        flat = tensor.detach().view(-1)[-1:].view(torch.int32)
        flat ^= 1


def shard_of(average: ShardedAverage, name: str):
    return next(shard for shard in average._state.members.averaged if shard.name == name)


@on_ranks(4)
def test_ddp() -> None:
    """Every rank has all weights; averages are in parts, which nobody else has."""
    average = begun("ddp")
    stray(dict(average._state.layout.replicas())["back.bias"])
    found = [Differing("weights", "back.bias", (STRAY,))]
    assert average.check_replicas() == found
    assert average.check_replicas(schedule=Schedule(every_steps=3)) == []  # after 2 steps
    assert average.check_replicas(schedule=Schedule(every_steps=2)) == found
    mine = dist.get_rank() == STRAY
    with pytest.raises(ZeroDivisionError if mine else PeerError):
        average.check_replicas(schedule=(lambda step: bool(step // 0)) if mine else Schedule())
    with average.summon_full_params("short"):
        pass


@on_ranks(4)
def test_hsdp() -> None:
    """Two ranks have the same piece: weights and averages are compared, each for itself."""
    average = begun("fsdp2-hsdp")
    held = shard_of(average, "blocks.0.wide.weight")
    stray(held.tensor)
    (found,) = average.check_replicas()
    assert (found.what, found.name) == ("weights", "blocks.0.wide.weight")
    stray(held.tensor)  # and back
    stray(average._state.store.view("long", "blocks.0.wide.weight"))
    (found,) = average.check_replicas()
    assert (found.what, found.name) == ("long", "blocks.0.wide.weight")
    assert len(found.ranks) == 1
    with average.swapped("long"), pytest.raises(SwapError, match="check_replicas"):
        average.check_replicas()


@on_ranks(4)
def test_nothing_is_held_twice() -> None:
    average = begun("fsdp2")
    stray(shard_of(average, "blocks.0.wide.weight").tensor)  # its own
    assert average.check_replicas() == []


@pytest.mark.own_processes
def test_one_process() -> None:
    average = ShardedAverage(nn.Linear(3, 5), EMA(decay=0.5))
    average.update()
    assert average.check_replicas() == []
