"""Averages handed from object to object, and weights from the model to the average and back, on every engine."""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sharded_avg import EMA, Schedule, ShardedAverage, ShardedAvgError, UnsupportedModelError
from sharded_avg.saved.manifest import Manifest
from sharded_avg.weights.write import write_live
from tests.helpers.engines import ENGINES, ONE_PROCESS, Engine, Row, one_size, run_row
from tests.helpers.models import batch
from tests.helpers.pool import on_ranks, run_on_ranks

NUM_STEPS = 3


def trained(row: Row) -> tuple[Engine, ShardedAverage]:
    engine = row.start()
    average = ShardedAverage(engine.model, EMA(decay=0.5))
    for step in range(NUM_STEPS):
        engine.learn_steps(step, step + 1)
        average.update()
    return engine, average


def full_of(average: ShardedAverage) -> dict[str, Tensor]:
    with average.summon_full_params(rank0_only=False) as full:
        return {name: tensor.clone() for name, tensor in full.items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@torch.no_grad()
def output(engine: Engine) -> Tensor:
    x = batch(77, engine.part)
    out: Tensor = engine.model(x if engine.own is None else x.to(engine.own))
    return out.clone()


def check_raw_weights(row: Row) -> None:
    """The average for good and back, bit for bit; not back over weights that somebody changed."""
    engine, average = trained(row)
    raw, raw_output, averaged = engine.full(), output(engine), full_of(average)
    kept = average.raw_weights()
    average.copy_to_model(undo=kept)
    now = engine.full()
    for name, tensor in now.items():
        assert torch.equal(tensor, averaged[name].to(tensor.dtype)), name
    assert same(full_of(average), averaged)
    assert average.restore_raw(kept)
    assert same(engine.full(), raw)
    assert torch.equal(output(engine), raw_output)
    assert average.restore_raw(kept), "raw weights that are back already were taken for other ones"
    average.copy_to_model()
    engine.learn_steps(NUM_STEPS, NUM_STEPS + 1)
    changed = engine.full()
    assert not average.restore_raw(kept), "raw weights were put over weights that training has changed"
    assert same(engine.full(), changed)


def check_taking_over(row: Row) -> None:
    """Another object goes on where one was: from that object, or from full tensors."""
    engine, average = trained(row)
    averaged, manifest = full_of(average), average.manifest()
    heirs = [ShardedAverage(engine.model, EMA(decay=0.5)) for _ in range(2)]
    heirs[0].take_from(average)
    heirs[1].load_full({"average": averaged}, Manifest.from_json(manifest.to_json()))
    for heir in heirs:
        assert (heir.n_averaged, heir.num_steps) == (NUM_STEPS, NUM_STEPS)
        assert same(full_of(heir), averaged)
    engine.learn_steps(NUM_STEPS, NUM_STEPS + 1)
    for each in (average, *heirs):
        each.update()
    for heir in heirs:
        assert same(full_of(heir), full_of(average))
        assert heir.manifest().averages == average.manifest().averages


def check_writing_live(row: Row) -> None:
    """Full tensors reach every live shard and master, and forward."""
    engine, average = trained(row)
    averaged = full_of(average)
    others = {name: tensor for name, tensor in engine.full().items() if name.endswith("bias")}
    missing = write_live(engine.model, {name: value for name, value in averaged.items() if name not in others})
    assert set(others) <= set(missing)
    for name, tensor in engine.full().items():
        expected = others[name] if name in others else averaged[name].to(tensor.dtype)
        assert torch.equal(tensor, expected), name


def check_looking(row: Row) -> None:
    """Distance, each element once, and finiteness, alike on all ranks."""
    engine, average = trained(row)
    raw, averaged = engine.full(), full_of(average)
    pairs = [(raw[name].double(), averaged[name].double()) for name in raw]
    expected = sqrt(
        sum(float((x - a).square().sum()) for x, a in pairs) / sum(float(x.square().sum()) for x, _ in pairs)
    )
    assert average.distance() == pytest.approx(expected, rel=1e-9)
    by_module = average.distances()
    for path in {name.rpartition(".")[0] for name in raw}:
        inside = [(raw[n].double(), averaged[n].double()) for n in raw if n.rpartition(".")[0] == path]
        apart = sum(float((x - a).square().sum()) for x, a in inside)
        size = sum(float(x.square().sum()) for x, _ in inside)
        assert by_module[path] == pytest.approx(sqrt(apart / size), rel=1e-9), path
    assert average.last_update is not None
    assert average.last_update.seconds > 0
    assert average.last_update.nbytes >= 2 * average.nbytes
    assert average.check_replicas() == []
    assert average.live_is_finite()
    hold = average._state.members.averaged
    last = dist.get_rank() == dist.get_world_size() - 1 if dist.is_initialized() else True
    mine = [shard.tensor for shard in hold if shard.tensor.numel()]
    if last and mine:
        mine[-1].view(-1)[-1] = float("nan")
    holds_any: list[Any] = [None] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(holds_any, bool(mine))
    assert not average.live_is_finite() or not (holds_any[-1] if dist.is_initialized() else mine)


def check_unscheduled(row: Row) -> None:
    """An update outside the schedule counts as an update and not as a step."""
    engine = row.start()
    average = ShardedAverage(engine.model, EMA(decay=0.5), schedule=lambda step: step == 2)
    engine.learn_steps(0, 1)
    assert not average.update()
    assert average.update(unscheduled=True)
    assert (average.n_averaged, average.num_steps) == (1, 1)
    averaged, first = full_of(average), engine.full()
    assert all(torch.equal(averaged[name], value.to(averaged[name].dtype)) for name, value in first.items())
    engine.learn_steps(1, 2)
    assert average.update()
    assert (average.n_averaged, average.num_steps) == (2, 2)


def check_write_back(row: Row) -> None:
    """Half-way to the average, by plain arithmetic on full tensors; then all the way. Optimizers go on from there."""
    engine, average = trained(row)
    raw, averaged = engine.full(), full_of(average)
    when = Schedule(every_steps=NUM_STEPS)
    assert average.copy_to_model(factor=0.5, schedule=when)
    assert not average.copy_to_model(factor=0.5, schedule=when), "twice after one step"
    for name, tensor in engine.full().items():
        expected = raw[name].to(averaged[name]).lerp(averaged[name], 0.5).to(tensor.dtype)
        assert torch.equal(tensor, expected), name
    assert same(full_of(average), averaged)
    assert not average.check_replicas()
    engine.learn_steps(NUM_STEPS, NUM_STEPS + 1)
    average.update()
    before = engine.full()
    assert not average.copy_to_model(schedule=when)
    assert same(engine.full(), before)


CHECKS = (
    check_raw_weights,
    check_taking_over,
    check_writing_live,
    check_looking,
    check_unscheduled,
    check_write_back,
)


def check_all(row: Row) -> None:
    for check in CHECKS:
        check(row)


@one_size
def test_on_every_engine(row: str, world_size: int) -> None:
    """P04, P93: see the checks."""
    run_row(row, world_size, check_all)


@pytest.mark.own_processes
@pytest.mark.parametrize("check", CHECKS)
def test_on_one_process(check: Any) -> None:
    check(ONE_PROCESS)


@on_ranks(2)
def test_other_cuts_are_refused_on_all_ranks() -> None:
    """DDP divides what is averaged: another choice of parameters is another cut."""
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 7)))
    average = ShardedAverage(model, EMA(decay=0.5))
    average.update()
    other = ShardedAverage(model, EMA(decay=0.5), include=lambda name, tensor: name.startswith("1"))
    with pytest.raises(ShardedAvgError, match=r"is cut into|other rank"):
        other.take_from(average)
    assert other.n_averaged == 0


def evaluate_without_optimizer(tmp_path: Any, stage: int) -> None:
    import deepspeed

    plain = ENGINES["zero3"].plain()
    averaged = {name: value.clone() for name, value in plain.state_dict().items()}
    average = ShardedAverage(plain, EMA(decay=0.5))
    average.update()
    average.save(tmp_path / "average")
    other = ENGINES["zero3"].plain()
    with torch.no_grad():
        for param in filter(lambda param: param.requires_grad, other.parameters()):
            param.mul_(0.5)
    engine, *_ = deepspeed.initialize(
        model=other,
        model_parameters=[],
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 8},
        },
    )
    mine = ShardedAverage(engine, EMA(decay=0.5))
    mine.load(tmp_path / "average")
    x = batch(77)
    with torch.no_grad():
        raw = engine(x).clone()
        with mine.swapped():
            assert torch.equal(engine(x), plain(x))
        assert torch.equal(engine(x), raw)
        mine.copy_to_model()
        assert torch.equal(engine(x), plain(x))
    full = full_of(mine)
    for name in mine.manifest().tensors:
        assert torch.equal(full[name], averaged[name].float()), name
    with pytest.raises(UnsupportedModelError, match="no optimizer"):
        mine.update()


@pytest.mark.parametrize("stage", [0, 3])
def test_deepspeed_engine_without_optimizer(stage: int, tmp_path: Any) -> None:
    """An engine that evaluates: an average is loaded, looked at, and kept; it is never updated, and says so."""
    run_on_ranks(2, evaluate_without_optimizer, kind="deepspeed", tmp_path=tmp_path, stage=stage)
