"""What others do to the model inside a swap, and graphs that reach across its ends, in the hands of engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from sharded_avg import PeerError, ShardedAverage, SwapError
from sharded_avg.errors import ShardedAvgError
from tests.helpers.engines import Engine, Row, loss_of, run_row
from tests.helpers.further import covered_by
from tests.helpers.models import batch
from tests.helpers.watch import forward, same, snapshot, trained_with

ROWS = [
    ("ddp", 2),
    ("fsdp1-full-views", 2),
    ("fsdp1-full-flat", 3),
    ("fsdp1-no_shard-views", 2),
    ("fsdp2", 2),
    ("tp", 2),
    ("zero1-bf16", 2),
    ("zero2", 2),
    ("zero3", 2),
]
engines = pytest.mark.parametrize(
    ("row", "world_size"), covered_by([("ddp", 2), ("fsdp1-full-views", 2), ("fsdp2", 2), ("zero2", 2)], ROWS)
)


def full_of(average: ShardedAverage) -> dict[str, Tensor]:
    with average.summon_full_params(rank0_only=False) as full:
        averaged = {shard.name for shard in average._state.members.averaged}
        return {name: value.clone() for name, value in full.items() if name in averaged}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def load(engine: Engine) -> None:
    engine.model.load_state_dict({key: torch.zeros_like(value) for key, value in engine.model.state_dict().items()})


def write_data(engine: Engine) -> None:
    for parameter in engine.model.parameters():
        local = getattr(parameter, "_local_tensor", parameter)
        local.data.add_(1)


BODIES: dict[str, Callable[[Engine], object]] = {
    "a step": lambda engine: engine.learn(batch(5, engine.part)),
    "data": write_data,
    "half": lambda engine: engine.model.half(),
}


def check_edits(row: Row) -> None:
    """Nobody is told nothing: the average is what it was, or all ranks that hold what was written to say so."""
    for name, body in BODIES.items():
        engine, average = trained_with(row)
        before, raw = full_of(average), snapshot(engine, average)
        told: BaseException | None = None
        try:
            with average.swapped():
                body(engine)
        except ShardedAvgError as error:
            told = error
        all_told: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(all_told, type(told).__name__)
        try:
            unchanged = equal(full_of(average), before)
        except ShardedAvgError:  # an engine whose weights were pulled from under it cannot be read any more
            unchanged = False
        assert unchanged or told is not None, name
        if name == "a step":
            assert isinstance(told, (SwapError, PeerError)), all_told
        del raw


@engines
def test_edits_are_undone_or_told(row: str, world_size: int) -> None:
    """R04: training, writing behind autograd's back and a cast inside a swap."""
    run_row(row, world_size, check_edits)


def evaluate(engine: Engine) -> Tensor:
    """Of the module inside DDP: its own forward sends buffers, and torch 2.11 has backward notice that."""
    model = engine.model.module if isinstance(engine.model, DistributedDataParallel) else engine.model
    with torch.no_grad():
        return model(batch(7, engine.part).to(engine.own or torch.float32)).clone()


def check_teacher(row: Row) -> None:
    """The gradients of a student, with a swap in the middle or before."""
    engine, average = trained_with(row)
    raw, before = forward(engine), snapshot(engine, average)
    engine.model.eval()
    with average.swapped():
        teacher = evaluate(engine)
    found = []
    for in_between in (False, True):
        output = engine.model(batch(8, engine.part).to(engine.own or torch.float32))
        if in_between:
            with average.swapped():
                assert torch.equal(evaluate(engine), teacher)
        loss = loss_of(output) + (output.float() * teacher.float()).mean()
        loss.backward()
        grads = [p.grad for p in engine.model.parameters() if p.grad is not None]
        found.append([grad.to_local().clone() if hasattr(grad, "to_local") else grad.clone() for grad in grads])
        engine.model.zero_grad()
    assert found[0]
    assert same(*found)
    engine.model.train()
    assert same(snapshot(engine, average), before)
    assert torch.equal(forward(engine), raw)


@pytest.mark.parametrize(
    ("row", "world_size"),
    covered_by(
        [("ddp", 2), ("fsdp2", 2)],
        [("ddp", 2), ("ddp", 3), ("fsdp1-full-views", 2), ("fsdp2", 2), ("fsdp2", 3), ("tp", 2)],
    ),
)
def test_a_swap_between_forward_and_backward(row: str, world_size: int) -> None:
    """R07: self-distillation; the gradients are what they are without the swap."""
    run_row(row, world_size, check_teacher)
