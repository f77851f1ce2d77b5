"""Full states on every engine: keys, values, who holds what, edits written back, averages made the model's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from sharded_avg import EMA, ConfigError, NotStartedError, PeerError, ShardedAverage
from sharded_avg.exchange import gather
from sharded_avg.exchange.gather import local_part, split_region
from sharded_avg.shard import Box, Interval, Region, put, take
from tests.helpers.engines import ENGINES, ONE_PROCESS, Engine, Row, every_engine, mesh, run_row
from tests.helpers.models import VARIANTS, batch
from tests.helpers.pool import on_ranks
from tests.helpers.watch import CountBytes, buffers_of, forward, same, snapshot, trained_with

Full = dict[str, Tensor]


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def full_of(average: ShardedAverage, **arguments: Any) -> Full:
    with average.summon_full_params(**arguments) as full:
        return full


def equal(left: Full, right: Full) -> bool:
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


def from_rank_0(value: Any) -> Any:
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0)
    return values[0]


# --- reading -------------------------------------------------------------------------------------------------------


def check_state(row: Row, engine: Engine, average: ShardedAverage) -> Full:
    """Keys, order, ties, what is not averaged, and who holds it; the state."""
    forward(engine)  # leaves unsharded copies behind
    on_all = full_of(average, rank0_only=False)
    on_one = full_of(average)
    assert (list(on_one) == list(on_all)) if rank() == 0 else not on_one
    assert equal(on_all, from_rank_0(on_all)), "the same everywhere"
    assert rank() or equal(on_one, on_all)
    plain = row.plain()
    assert list(on_all) == list(plain.state_dict())
    plain.load_state_dict(on_all)
    assert torch.equal(on_all["again.weight"], on_all["first.weight"])
    assert all(torch.equal(on_all[f"frozen.{name}"], value) for name, value in frozen_values(plain, engine))
    live = from_rank_0(buffers_of(engine.model))
    persistent = [name for name in live if name in on_all]
    assert len(persistent) == 9
    assert all(torch.equal(on_all[name], live[name]) for name in persistent)
    return on_all


def frozen_values(plain: Any, engine: Engine) -> list[tuple[str, Tensor]]:
    """They are as they were built, in the dtype that the engine keeps."""
    start = ENGINES["ddp"].plain().frozen.state_dict()
    return [(name, value.to(engine.own or value.dtype)) for name, value in start.items()]


@contextmanager
def buckets_of(nbytes: int) -> Iterator[None]:
    with mock.patch.object(gather, "BUCKET_BYTES", nbytes):
        yield


def check_buckets(average: ShardedAverage, expected: Full) -> None:
    """However the pieces are cut into messages, the result is the same."""
    with buckets_of(36):
        assert equal(full_of(average, rank0_only=False), expected)
    with buckets_of(8):  # one or two elements
        on_one = full_of(average)
    assert rank() or equal(on_one, expected)


def check_reading(row: Row) -> None:
    engine = row.start()
    average = VARIANTS["ema"].build(engine.model)
    with pytest.raises(NotStartedError, match="no update"):
        full_of(average)
    with pytest.raises(NotStartedError, match="no update"):
        average.copy_to_model()
    for step in range(2):
        engine.learn(batch(step, engine.part))
        average.update()
    full = check_state(row, engine, average)
    before = snapshot(engine, average)
    check_buckets(average, full)
    with average.swapped():
        assert equal(full_of(average, rank0_only=False), full), "while swapped"
    with average.summon_full_params(rank0_only=False) as edited:
        for tensor in edited.values():
            tensor.zero_()
    assert same(snapshot(engine, average), before), "what is handed out is a copy"


@every_engine
def test_full_state(row: str, world_size: int) -> None:
    """P36, P54, P63, P64, P65, P80, P84, P105: keys and values of the plain model, nothing shared with the live one."""
    run_row(row, world_size, check_reading)


@pytest.mark.own_processes
def test_full_state_in_one_process() -> None:
    check_reading(ONE_PROCESS)


# --- messages ------------------------------------------------------------------------------------------------------

REGIONS = [
    (Interval(0, 0), (3, 5)),
    (Interval(2, 13), (3, 5)),
    (Interval(0, 1), ()),
    (Box((), ()), ()),
    (Box((0,), (7,)), (7,)),
    (Box((1, 2, 0), (2, 3, 5)), (3, 5, 7)),
    (Box((0, 0), (0, 5)), (3, 5)),
]


@pytest.mark.parametrize(("region", "shape"), REGIONS)
@pytest.mark.parametrize("limit", [1, 2, 4, 100])
def test_regions_are_cut_small_and_whole(region: Region, shape: tuple[int, ...], limit: int) -> None:
    full = torch.arange(float(torch.Size(shape).numel())).view(shape)
    values, copied = take(full, region), torch.full(shape, -1.0)
    parts = list(split_region(region, limit))
    assert all(0 < part.numel <= limit for part in parts)
    assert sum(part.numel for part in parts) == region.numel
    for part in parts:
        put(copied, part, local_part(values, region, part))
    expected = torch.full(shape, -1.0)
    put(expected, region, values)
    assert torch.equal(copied, expected)


WIDE: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "fsdp1": lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
    "fsdp2": lambda model: fully_shard(model, mesh=mesh((2,))),
}


@pytest.mark.parametrize("engine", WIDE)
@on_ranks(2)
def test_only_rank_0_holds_full_tensors(engine: str) -> None:
    """P66, P71: the other rank holds one message at a time, and none is larger than a bucket."""
    average = ShardedAverage(WIDE[engine](nn.Linear(256, 256)), EMA(decay=0.9))
    average.update()
    full_nbytes, bucket = 256 * 257 * 4, 32 << 10
    with buckets_of(bucket), CountBytes() as count:
        full = full_of(average)
    largest = max(storage.nbytes() for storage in count.storages.values())
    assert sum(tensor.nbytes for tensor in full.values()) == (full_nbytes if rank() == 0 else 0)
    assert rank() == 0 or bucket // 2 < largest <= bucket


# --- writing back --------------------------------------------------------------------------------------------------


def edit(full: Full, names: set[str]) -> None:
    """Another change on each rank, some in place and some by assignment."""
    for index, name in enumerate(sorted(names)):
        if index % 2:
            full[name] = full[name] * 2 + rank()
        else:
            full[name].mul_(2).add_(rank())


def check_edits(average: ShardedAverage, trained: set[str]) -> None:
    for arguments in ({"rank0_only": True}, {"rank0_only": False}):
        for nbytes in (12, 64 << 20):
            before = full_of(average, rank0_only=False)
            with buckets_of(nbytes), average.summon_full_params(writeback=True, **arguments) as full:
                if full:
                    edit(full, trained)
            after = full_of(average, rank0_only=False)
            mine = from_rank_0(0) if arguments["rank0_only"] else None
            assert_edited(before, after, trained, mine)


def assert_edited(before: Full, after: Full, trained: set[str], only: int | None) -> None:
    """Every element doubled, plus the number of the rank whose edit reached it."""
    for name, tensor in before.items():
        if name not in trained and name != "again.weight":
            assert torch.equal(after[name], tensor), name
            continue
        ranks = [only] if only is not None else range(dist.get_world_size() if dist.is_initialized() else 1)
        hits = torch.stack([after[name] == tensor * 2 + number for number in ranks])
        assert hits.any(0).all(), name


def check_failed_edits(engine: Engine, average: ShardedAverage, trained: set[str]) -> None:
    """A wrong shape, a lost key, an exception: on one rank, and then nothing is written on any."""
    before = snapshot(engine, average)
    failures: list[tuple[Callable[[Full], object], type[BaseException]]] = [
        (lambda full: full.update({"first.bias": torch.zeros(6)}), ConfigError),
        (lambda full: full.pop("first.bias"), ConfigError),
        (lambda full: full["nonsense"], KeyError),
    ]
    for rank0_only in (True, False):
        culprit = 0 if rank0_only or not dist.is_initialized() else dist.get_world_size() - 1
        for failure, error in failures:
            with pytest.raises(error if rank() == culprit else PeerError):
                edit_and_fail(average, rank0_only, trained, failure if rank() == culprit else None)
            assert same(snapshot(engine, average), before)


def edit_and_fail(
    average: ShardedAverage, rank0_only: bool, trained: set[str], failure: Callable[[Full], object] | None
) -> None:
    with average.summon_full_params(writeback=True, rank0_only=rank0_only) as full:
        if full:
            edit(full, trained)
        if failure is not None:
            failure(full)


def check_writing(row: Row) -> None:
    engine, average = trained_with(row)
    live = engine.full()
    trained = set(live)
    check_edits(average, trained)
    check_failed_edits(engine, average, trained)
    assert equal(engine.full(), live), "the model is left alone"


@every_engine
def test_edits_are_written_back(row: str, world_size: int) -> None:
    """From rank 0, or from each rank its own part; from all ranks or from none."""
    run_row(row, world_size, check_writing)


@pytest.mark.own_processes
def test_edits_are_written_back_in_one_process() -> None:
    check_writing(ONE_PROCESS)


# --- the model's own -----------------------------------------------------------------------------------------------


FAR = 16.0


def move_far(average: ShardedAverage) -> None:
    """Move the averages of some weights so far away that no training step does it, where tanh makes nothing of it."""
    with average.summon_full_params(writeback=True) as full:
        for name in full:
            if ".wide." in name:
                full[name] += FAR


def check_copy(row: Row) -> None:
    engine, average = trained_with(row)
    move_far(average)
    forward(engine)  # leaves unsharded copies behind
    average.copy_to_model()
    full = full_of(average, rank0_only=False)
    weights = engine.full()
    assert all(torch.equal(weights[name], full[name].to(weights[name].dtype)) for name in weights)
    with average.swapped():
        inside = forward(engine)
    assert torch.equal(inside, forward(engine)), "forward computes with the average, swapped or not"
    engine.learn(batch(5, engine.part))
    stepped = engine.full()
    for name, tensor in stepped.items():
        assert not torch.equal(tensor, full[name].to(tensor.dtype)), name
        assert float((tensor.float() - full[name]).abs().max()) < FAR / 4, f"{name}: not stepped from the average"


@every_engine
def test_copy_to_model(row: str, world_size: int) -> None:
    """P26, P84: the averaged weights are the model's own, masters included, and the next step goes on from them."""
    run_row(row, world_size, check_copy)


@pytest.mark.own_processes
def test_copy_to_model_in_one_process() -> None:
    check_copy(ONE_PROCESS)
