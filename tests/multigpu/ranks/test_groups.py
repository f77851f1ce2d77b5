"""A group of a part of the job, made by its members alone, whatever other groups there are."""

from __future__ import annotations

from datetime import timedelta
from unittest import mock

import torch
import torch.distributed as dist

from sharded_avg.ranks import bounds, groups, part_group
from tests.helpers.pool import on_ranks

SOON = timedelta(seconds=20)


def total(group: dist.ProcessGroup, value: float) -> float:
    tensor = torch.tensor([value])
    dist.all_reduce(tensor, group=group)
    return tensor.item()


@on_ranks(3)
def test_members_are_in_different_groups_besides(world_size: int) -> None:
    """torch's own names for such groups differ then (2.8 to 2.13)."""
    rank = dist.get_rank()
    for _ in range(2):
        dist.new_group([0, 2], timeout=SOON)
    if rank < 2:
        with mock.patch.object(bounds, "PATIENCE_S", 20.0):
            group = part_group([0, 1])
        assert part_group([0, 1]) is group
        assert dist.get_process_group_ranks(group) == [0, 1]
        assert (dist.get_rank(group), dist.get_world_size(group)) == (rank, 2)
        assert total(group, 10.0**rank) == 11.0


@on_ranks(3)
def test_groups_that_the_job_makes_later(world_size: int) -> None:
    """From 2.14 on torch names a group by how many the process has made before; rank 2 has not made the first."""
    rank = dist.get_rank()
    if rank < 2:
        with mock.patch.object(bounds, "PATIENCE_S", 20.0):
            assert total(part_group([0, 1]), 1.0) == 2.0
    later = dist.new_group([1, 2], timeout=SOON)
    if rank > 0:
        assert total(later, 10.0**rank) == 110.0
    if rank != 1:
        with mock.patch.object(bounds, "PATIENCE_S", 20.0):
            assert total(part_group([0, 2]), 1.0) == 2.0
    assert total(dist.new_group(timeout=SOON), 1.0) == 3.0


@on_ranks(3)
def test_a_job_that_is_bound_to_a_device(world_size: int) -> None:
    """nccl would make the group by a split, which waits for all ranks of the job; gloo is asked, GPU or not."""
    assert hasattr(dist.ProcessGroup, "bound_device_id")
    made = []
    c10d = dist.distributed_c10d

    def remembered(size: int, rank: int, ranks: list[int], backend: str, *rest: object, **options: object) -> object:
        made.append((ranks, backend))
        return dist.group.WORLD, None

    bound = mock.Mock(bound_device_id=torch.device("cuda", 0))
    world = mock.Mock(pg_map={bound: ("nccl", None)}, pg_group_ranks={})
    patches = {"_get_default_group": lambda: bound, "_world": world, "_new_process_group_helper": remembered}
    rank = dist.get_rank()
    with mock.patch.multiple(c10d, **patches), mock.patch.object(dist, "get_rank", return_value=rank):
        groups._made_by_its_members([0, 1, 2], "name", SOON)
    assert made == [([0, 1, 2], "gloo")]


def test_names_of_large_groups() -> None:
    """They begin keys of the job's store, which ends the connection for a key of more than 8192 bytes."""
    names = [groups._name_of(list(range(first, first + 20_000))) for first in (0, 1)]
    assert len({*names, groups._name_of([0])}) == 3
    assert max(map(len, names)) < 64


def test_an_error_lists_few_ranks() -> None:
    assert groups._few([0, 1]) == "[0, 1]"
    assert groups._few(list(range(2000))).endswith("14, ..., 1999] (2000 of them)")
