"""Whether values are finite on every rank: one answer for all, from one small message."""

from __future__ import annotations

import math
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sharded_avg import PeerError
from sharded_avg.evaluation.finite import all_finite
from tests.helpers.pool import on_ranks, rank_device


def mine(value: float | None) -> list[Tensor]:
    """Ranks bring different numbers of tensors, of different sizes and dtypes; the last rank has an empty one only."""
    rank, device = dist.get_rank(), rank_device()
    if rank == dist.get_world_size() - 1 and value is None:
        return [torch.empty(0, device=device)]
    tensors = [torch.ones(size, device=device) for size in range(1, rank + 3)] + [torch.ones(3, dtype=torch.bfloat16)]
    if value is not None:
        tensors[-1][1] = value
    return tensors


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@on_ranks(2, 3)
def test_one_rank_decides_for_all(bad):
    """P100: a rank-consistent decision, whichever rank it is."""
    for culprit in range(dist.get_world_size()):
        assert all_finite(mine(None), dist.group.WORLD)
        assert not all_finite(mine(bad if dist.get_rank() == culprit else None), dist.group.WORLD)


@on_ranks(2)
def test_without_a_group_it_is_local():
    assert all_finite([torch.tensor(math.nan if dist.get_rank() == 1 else 1.0)], None) == (dist.get_rank() == 0)


@on_ranks(3)
def test_no_tensors_anywhere():
    assert all_finite([], dist.group.WORLD)


@on_ranks(2)
def test_no_tensor_travels():
    """One word of each rank to the job's store: no collective that a rank could miss."""
    with mock.patch.object(dist, "all_reduce") as reduce, mock.patch.object(dist, "all_gather_object") as gather:
        assert all_finite(mine(None), dist.group.WORLD)
    assert not reduce.called
    assert not gather.called


def broken() -> Iterator[Tensor]:
    yield torch.ones(3)
    raise MemoryError("no room")


@on_ranks(3)
def test_a_rank_that_cannot_look_does_not_leave_others_waiting():
    culprit = dist.get_rank() == 1
    with pytest.raises(MemoryError if culprit else PeerError, match="no room"):
        all_finite(broken() if culprit else mine(None), dist.group.WORLD)
    assert all_finite(mine(None), dist.group.WORLD)
