"""Where ranks wait for each other: no failure of one leaves the others waiting, and what is saved is one rank's."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from sharded_avg import SWA, CheckpointError, PeerError, ShardedAverage
from sharded_avg.averages.store import Store
from sharded_avg.ranks import bounds
from tests.helpers.pool import on_ranks


def ddp(model: nn.Module) -> tuple[DistributedDataParallel, ShardedAverage]:
    wrapped = DistributedDataParallel(model)
    average = ShardedAverage(wrapped, SWA(), buffers="average")
    average.update()
    return wrapped, average


@on_ranks(3)
def test_ranks_in_time_and_late_when_one_gave_up():
    """One rank fails in the block and gives up, one leaves in time, one too late: all raise, none waits for a peer."""
    _, average = ddp(nn.Linear(3, 5))
    rank, began = dist.get_rank(), time.monotonic()
    bounds.LEAVING_GRACE_S, before = 1.0, bounds.LEAVING_GRACE_S
    try:
        with pytest.raises(RuntimeError if rank == 0 else PeerError), average.swapped():  # noqa: PT012
            if rank == 0:
                raise RuntimeError("out of memory")
            if rank == 2:
                time.sleep(2.0)
    finally:
        bounds.LEAVING_GRACE_S = before
    assert time.monotonic() - began < 10.0
    dist.barrier()


@on_ranks(2, 3)
def test_meeting_leaves_nothing_in_the_store():
    """R21: a job of many evaluations does not fill the memory of the rank that keeps the store."""
    _, average = ddp(nn.Linear(3, 5))
    store = dist.distributed_c10d._get_default_store()
    with average.swapped():
        pass
    dist.barrier()
    before = store.num_keys()
    for _ in range(3):
        with average.swapped():
            pass
    dist.barrier()
    assert store.num_keys() <= before
    dist.barrier()


@on_ranks(2)
def test_saved_buffers_are_rank_0s(tmp_path):
    """P51: BatchNorm statistics differ between ranks; saved and handed out are those of rank 0."""
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 64), nn.BatchNorm1d(64))
    wrapped = DistributedDataParallel(model)  # sends rank 0's buffers around once, and again at every forward
    average = ShardedAverage(wrapped, SWA(), buffers="average")
    for buffer in model.buffers():
        buffer.fill_(dist.get_rank() + 1)
    average.update()
    average.save(tmp_path / "average")
    fresh = ShardedAverage(wrapped, SWA(), buffers="average")
    fresh.load(tmp_path / "average")
    for one in (average, fresh):
        with one.summon_full_params(rank0_only=False) as full:
            assert {float(v) for name, t in full.items() if "running" in name for v in t} == {1.0}


@on_ranks(2)
def test_no_room_on_one_rank(tmp_path):
    """Loading makes room on all ranks before any reads."""
    _, average = ddp(nn.Linear(3, 5))
    average.save(tmp_path / "average")
    arrange = Store.arrange

    def no_room(self: Store, shards: object) -> object:
        if dist.get_rank() == 1:
            raise MemoryError("no room")
        return arrange(self, shards)

    Store.arrange = no_room
    try:
        with pytest.raises(MemoryError if dist.get_rank() == 1 else PeerError):
            average.load(tmp_path / "average")
    finally:
        Store.arrange = arrange
    average.load(tmp_path / "average")


@on_ranks(2)
def test_a_storage_that_raises_on_rank_0(tmp_path):
    """Whatever rank 0 meets while it prepares a folder, all ranks raise."""
    _, average = ddp(nn.Linear(3, 5))
    with pytest.raises(CheckpointError, match="File name too long"):  # rank 0 decides, and tells the others why
        average.save(f"file://{tmp_path}/" + "n" * 300)  # longer than a file name can be


@on_ranks(2)
def test_asynchronous_saves_in_a_row(tmp_path):
    """The second waits for the first: one group carries both."""
    _, average = ddp(nn.Linear(3, 5))
    for _ in range(3):
        average.async_save(tmp_path / "average")
        average.update()
    average.save(tmp_path / "average")
    _, fresh = ddp(nn.Linear(3, 5))
    fresh.load(tmp_path / "average")
    assert fresh.n_averaged == 4


@on_ranks(4)
def test_groups_side_by_side(tmp_path):
    """Two models on two halves of the job, each saved by its own ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "tp"))
    torch.manual_seed(mesh.get_local_rank("replica"))
    model = nn.Sequential(nn.Linear(3, 5))
    weight = model[0].weight.detach().clone()
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
    average = ShardedAverage(model, SWA())
    average.update()
    half = tmp_path / str(mesh.get_local_rank("replica"))
    average.async_save(half).result()
    average.save(half)
    fresh = ShardedAverage(model, SWA())
    fresh.load(half)
    with fresh.summon_full_params(rank0_only=False) as full:
        assert torch.equal(full["0.weight"], weight)
    with fresh.summon_full_params() as full:
        assert bool(full) == (mesh.get_local_rank("tp") == 0)


@on_ranks(2)
def test_writeback_of_a_plain_model_in_a_job():
    """Nothing connects the processes of a plain model: each edits its own average."""
    average = ShardedAverage(nn.Linear(3, 5), SWA())
    average.update()
    with average.summon_full_params(writeback=True) as full:
        full["weight"].fill_(dist.get_rank() + 2.0)
    with average.summon_full_params(rank0_only=False) as full:
        assert torch.equal(full["weight"], torch.full((5, 3), dist.get_rank() + 2.0))
