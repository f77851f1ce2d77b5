"""Buffers on several ranks, in the hands of engines: recomputed, averaged over the ranks, and each rank's own again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn

from sharded_avg import (
    EMA,
    ConfigError,
    PeerError,
    ShardedAverage,
    UnsupportedModelError,
    averaged_buffers,
    refreshed_batch_norm,
)
from sharded_avg.evaluation import buffers
from tests.helpers.engines import COVER, Row, mesh, run_row
from tests.helpers.further import covered_by
from tests.helpers.models import Awkward, batch
from tests.helpers.pool import on_ranks, rank_device
from tests.helpers.watch import buffers_of, forward, same, snapshot, trained_with

SOME_ENGINES = [
    ("ddp", 3),
    ("fsdp1-full-views", 2),
    ("fsdp1-grad_op-flat", 2),
    ("fsdp1-no_shard-flat", 3),
    ("fsdp2", 3),
    ("fsdp2-offload", 2),
    ("zero1-groups", 3),
    ("zero2", 2),
    ("zero3", 2),
    ("zero3-persistent", 3),
]
# Where forward gives a plain model's numbers up to rounding only, or parameters are cut further.
MORE_ENGINES = [
    ("fsdp1-mixed-views", 2),
    ("fsdp1-hybrid-flat", 4),
    ("fsdp2-mixed", 2),
    ("tp", 2),
    ("zero1-bf16", 2),
    ("zero3-bf16-groups", 2),
]


class InjectedError(RuntimeError):
    pass


def own_batches(rank: int) -> list[Tensor]:
    return [batch(50 + number, rank) for number in range(3)]


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all buffers."""
    return {name: buffer.clone() for name, buffer in buffers_of(model).items()}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def means(ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Of floating-point buffers; the others are this rank's."""
    return {
        name: torch.stack([rank[name].double() for rank in ranks]).mean(0).to(own.dtype)
        if own.is_floating_point() and name != "cache"
        else own
        for name, own in ranks[dist.get_rank()].items()
    }


def from_all(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


# --- every engine --------------------------------------------------------------------------------------------------


def loaded(row: Row, average: ShardedAverage) -> Awkward:
    model = row.plain()
    with average.summon_full_params(rank0_only=False) as full:
        model.load_state_dict(full)
    return model


def recomputed(model: Awkward, live: dict[str, Tensor]) -> dict[str, Tensor]:
    """What update_bn makes of a plain model on this rank's batches; other buffers are the live ones."""
    with torch.no_grad():
        update_bn(own_batches(dist.get_rank()), model)
    return {
        name: tensor.clone() if name.startswith("norm.") else live[name] for name, tensor in buffers_of(model).items()
    }


def check_refresh(row: Row) -> None:
    """Statistics, and what forward makes of them, are those of plain models; everything else is untouched."""
    engine, average = trained_with(row)
    raw, before, live = forward(engine), snapshot(engine, average), statistics(engine.model)
    plain = loaded(row, average)
    expected = recomputed(plain, live)
    mean = means(from_all(expected))
    with average.swapped(), refreshed_batch_norm(engine.model, own_batches(dist.get_rank())):
        assert equal(statistics(engine.model), expected)
        with averaged_buffers(engine.model):
            assert equal(statistics(engine.model), mean)
            inside = forward(engine)
        assert equal(statistics(engine.model), expected)
    assert same(snapshot(engine, average), before)
    assert equal(statistics(engine.model), live)
    for name, buffer in buffers_of(plain).items():
        buffer.copy_(mean[name])
    plain.eval()
    with torch.no_grad():
        assert torch.equal(inside, plain(batch(7, engine.part)))
    assert torch.equal(forward(engine), raw)
    assert not equal(expected, live), "this test could not fail"
    assert not torch.equal(expected["norm.running_mean"], mean["norm.running_mean"]), "ranks do not differ"


@pytest.mark.parametrize(("row", "world_size"), covered_by(COVER, SOME_ENGINES))
def test_refreshed_and_averaged(row: str, world_size: int) -> None:
    """P32, P51, P52: recomputed for the average by each rank on its own data, then the same on all ranks."""
    run_row(row, world_size, check_refresh)


def evaluated_run(row: Row, refresh: bool) -> list[Any]:
    """Weights, averages and buffers of a run, with and without a refresh after each step."""
    engine = row.start()
    average = ShardedAverage(engine.model, EMA(decay=0.9))
    for step in range(4):
        engine.learn(batch(step, engine.part))
        average.update()
        if refresh:
            with (
                average.swapped(),
                refreshed_batch_norm(engine.model, [x.to(engine.own or x.dtype) for x in own_batches(engine.part)]),
                averaged_buffers(engine.model),
            ):
                forward(engine)
    return [*snapshot(engine, average), *statistics(engine.model).values()]


def check_training(row: Row) -> None:
    assert same(evaluated_run(row, refresh=True), evaluated_run(row, refresh=False))


@pytest.mark.parametrize(("row", "world_size"), covered_by(COVER, [*SOME_ENGINES, *MORE_ENGINES]))
def test_training_goes_on_as_if_nothing_had_been(row: str, world_size: int) -> None:
    """P32, P51: a run that never evaluates comes to the same bits, each rank's statistics included."""
    run_row(row, world_size, check_training)


# --- the mean over ranks -------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """Buffers of every dtype; `tied` is another name of one."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 5)
        self.register_buffer("single", torch.zeros(7, 3).t())  # not row-major
        self.register_buffer("narrow", torch.zeros(5, dtype=torch.bfloat16))
        self.register_buffer("wide", torch.zeros(3, 5, dtype=torch.float64))
        self.register_buffer("scalar", torch.zeros(()))
        self.register_buffer("none", torch.zeros(0, 3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("cache", torch.zeros(3), persistent=False)
        self.register_buffer("tied", self.wide)
        self.register_buffer("unset", None)

    def fill(self, rank: int) -> Holder:
        generator = torch.Generator().manual_seed(rank)
        for buffer in self.buffers():
            if buffer.is_floating_point():
                # Sums of small multiples of a power of two are exact in float64 too, in any order.
                buffer.copy_(torch.randn(buffer.shape, generator=generator).mul(2**20).round() / 2**20)
            else:
                buffer.copy_(torch.full_like(buffer, rank, dtype=torch.float32))
        return self.to(rank_device())


@on_ranks(2, 3)
def test_the_mean_over_ranks():
    """P51, P47, P54: floats are averaged, rounded once; integers and what is not persistent stay each rank's."""
    model = Holder().fill(dist.get_rank())
    own = statistics(model)
    pointers = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    expected = means(from_all({name: tensor.cpu() for name, tensor in own.items()}))
    with averaged_buffers(model):
        inside = statistics(model)
        assert all(torch.equal(inside[name].cpu(), expected[name].cpu()) for name in own)
        assert len({str(rank) for rank in from_all({k: v.tolist() for k, v in inside.items() if k in FLOATS})}) == 1
        assert model.tied is model.wide
    assert equal(statistics(model), own)
    assert pointers == {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    assert not torch.equal(own["single"].cpu(), expected["single"].cpu()), "this test could not fail"


FLOATS = ("single", "narrow", "wide", "scalar")


@on_ranks(3)
def test_many_buckets():
    model = Holder().fill(dist.get_rank())
    with averaged_buffers(model):
        expected = statistics(model)
    with mock.patch.object(buffers, "_BUCKET_NUMEL", 4), averaged_buffers(model):
        assert equal(statistics(model), expected)


@on_ranks(2)
def test_the_largest_values_do_not_overflow():
    model = nn.BatchNorm1d(3)
    model.running_var.fill_(torch.finfo(torch.float32).max)
    with averaged_buffers(model):
        assert torch.equal(model.running_var, torch.full((3,), torch.finfo(torch.float32).max))


@on_ranks(3)
def test_only_some_ranks():
    """Ranks 0 and 1 average; rank 2 is not asked."""
    pair = dist.new_group([0, 1])
    model = Holder().fill(dist.get_rank())
    own = statistics(model)
    both = [rank["wide"] for rank in from_all(own)][:2]
    if dist.get_rank() < 2:
        with averaged_buffers(model, pair):
            assert torch.equal(model.wide, (both[0] + both[1]) / 2)
    assert equal(statistics(model), own)


@on_ranks(2)
def test_dtensors_stay_as_they_are():
    model = nn.BatchNorm1d(3)
    model.running_mean = distribute_tensor(torch.ones(3), mesh((2,)), [Replicate()])
    model.running_var.fill_(dist.get_rank() + 1)
    with averaged_buffers(model):
        assert isinstance(model.running_mean, DTensor)
        assert torch.equal(model.running_mean.to_local(), torch.ones(3))
        assert torch.equal(model.running_var, torch.full((3,), 1.5))
    assert torch.equal(model.running_var, torch.full((3,), dist.get_rank() + 1.0))


def resized(model: Holder) -> None:
    model.narrow = torch.zeros(3, dtype=torch.bfloat16)


def renamed(model: Holder) -> None:
    model.register_buffer("other", torch.zeros(3))


def recast(model: Holder) -> None:
    model.narrow = model.narrow.float()


@pytest.mark.parametrize("change", [resized, renamed, recast])
@on_ranks(2, 3)
def test_ranks_with_different_buffers(change):
    model = Holder().fill(dist.get_rank())
    if dist.get_rank() == 1:
        change(model)
    own = statistics(model)
    with pytest.raises(UnsupportedModelError, match=r"other|narrow"), averaged_buffers(model):
        pass
    assert equal(statistics(model), own)
    dist.barrier()


# --- DDP sends rank 0's buffers around -----------------------------------------------------------------------------


def normed() -> tuple[DistributedDataParallel, nn.Sequential]:
    torch.manual_seed(3)
    inner = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    return DistributedDataParallel(inner), inner


@pytest.mark.parametrize("how", ["wrapper", "inside", "compiled"])
@on_ranks(2)
def test_ddp_does_not_send_rank_0s_statistics(how):
    """P51: whichever module forward is called on, each rank's statistics are of its own batches."""
    wrapped, inner = normed()
    model = {"wrapper": wrapped, "inside": inner, "compiled": torch.compile(wrapped, backend="eager")}[how]
    wrapped(batch(0)).sum().backward()
    plain = normed()[1]
    with torch.no_grad():
        update_bn(own_batches(dist.get_rank()), plain)
    with refreshed_batch_norm(model, own_batches(dist.get_rank()), forward=lambda _, x: wrapped(x)):
        with torch.no_grad():
            model.eval()(batch(1))
        assert torch.equal(inner[1].running_mean, plain[1].running_mean)
    assert wrapped.require_forward_param_sync == (how != "inside")
    inner.train()


@on_ranks(2)
def test_ranks_may_have_different_numbers_of_batches():
    """Where forward does not communicate; one rank has one batch, the other three."""
    wrapped, inner = normed()
    mine = own_batches(dist.get_rank())[: 1 + 2 * dist.get_rank()]
    with refreshed_batch_norm(wrapped, mine):
        assert inner[1].num_batches_tracked == len(mine)


# --- failures ------------------------------------------------------------------------------------------------------


def failing(after: int) -> Iterator[Tensor]:
    yield from own_batches(0)[:after]
    raise InjectedError("batches")


def check_failed_refresh(row: Row) -> None:
    """The last rank fails in its batches; in DDP and ZeRO 1 forward is local and the others come to their end."""
    engine, average = trained_with(row)
    culprit = dist.get_rank() == dist.get_world_size() - 1
    before, live = snapshot(engine, average), statistics(engine.model)
    for after in (0, 2):
        mine = failing(after) if culprit else own_batches(0)
        entered = False
        with (
            pytest.raises(InjectedError if culprit else PeerError),
            average.swapped(),
            refreshed_batch_norm(engine.model, mine),
        ):
            entered = True
        assert not entered
        assert same(snapshot(engine, average), before)
        assert equal(statistics(engine.model), live)
        assert all(module.training for module in engine.model.modules())
    with average.swapped(), refreshed_batch_norm(engine.model, own_batches(0)), averaged_buffers(engine.model):
        forward(engine)


@pytest.mark.parametrize(("row", "world_size"), [("ddp", 2), ("ddp", 3), ("zero1-groups", 3)])
def test_failed_refresh_of_one_rank(row: str, world_size: int) -> None:
    """P67: all ranks raise, none waits, and everything is as it was."""
    run_row(row, world_size, check_failed_refresh)


@on_ranks(2)
def test_one_rank_without_batches():
    model = nn.BatchNorm1d(3)
    lacking = dist.get_rank() == 1
    with (
        pytest.raises(ConfigError if lacking else PeerError),
        refreshed_batch_norm(model, [] if lacking else own_batches(0)),
    ):
        pass
    assert model.num_batches_tracked == 0


@on_ranks(2)
def test_a_rank_that_failed_shows_why_while_others_are_busy():
    """As under FSDP, where they may be stuck in forward because this rank does not come."""
    model, culprit = nn.BatchNorm1d(3), dist.get_rank() == 1
    began = time.monotonic()

    def slow(module: nn.Module, x: Tensor) -> None:
        time.sleep(1.0)

    with pytest.raises(InjectedError if culprit else PeerError):  # noqa: SIM117
        with refreshed_batch_norm(model, failing(0) if culprit else own_batches(0), forward=slow):
            pass
    assert not culprit or time.monotonic() - began < 2.8  # the others take 3 s
    dist.barrier()


@on_ranks(2, 3)
def test_leaving_is_local():
    """P67: one rank's body raises at once, the others go on in theirs, with the mean."""
    model = Holder().fill(dist.get_rank())
    own, culprit = statistics(model), dist.get_rank() == 0
    began = 0.0
    with pytest.raises(InjectedError) if culprit else nullcontext(), averaged_buffers(model):
        began, mean = time.monotonic(), statistics(model)
        if culprit:
            raise InjectedError("body")
        time.sleep(1.5)
        assert equal(statistics(model), mean)
    assert equal(statistics(model), own)
    assert not culprit or time.monotonic() - began < 1.4
    dist.barrier()


@pytest.mark.parametrize("where", ["_laid_end_to_end", "_write_means"])
@on_ranks(2, 3)
def test_averaging_on_all_ranks_or_none(where):
    """P51: no memory on one rank, before anything is written or half-way."""
    model, culprit = Holder().fill(dist.get_rank()), dist.get_rank() == 1
    own = statistics(model)

    def full(live: list[Tensor], *_: Any) -> None:
        live[0].fill_(3) if where == "_write_means" else None
        raise MemoryError("no room")

    entered = False
    with (
        mock.patch.object(buffers, where, full) if culprit else nullcontext(),
        pytest.raises(MemoryError if culprit else PeerError),
        averaged_buffers(model),
    ):
        entered = True
    assert not entered
    assert equal(statistics(model), own)
    with averaged_buffers(model):
        pass
