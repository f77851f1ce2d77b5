"""Swaps on every engine: what forward computes inside, and that everything is as it was afterwards, come what may."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sharded_avg import EMA, PeerError, ShardedAverage, SwapError
from sharded_avg.exchange import ways
from sharded_avg.ranks import bounds
from tests.helpers.engines import ENGINES, ONE_PROCESS, Engine, Row, every_engine, run_row
from tests.helpers.models import VARIANTS, batch
from tests.helpers.pool import on_ranks
from tests.helpers.watch import CountBytes, buffers_of, forward, pointers, same, snapshot, trained_with


def expected_forward(row: Row, engine: Engine, average: ShardedAverage) -> Tensor:
    """What a model computes that was loaded with full averaged weights. Buffers differ between ranks: this rank's."""
    loaded = row.plain()
    with average.summon_full_params(rank0_only=False) as full:
        loaded.load_state_dict(full)
    other = row.build(loaded) if row.twin else Engine(loaded.to(engine.own), *[None] * 3, engine.part, engine.own)
    live = buffers_of(engine.model)
    if row.twin:
        forward(other)  # FSDP1 casts buffers at the first forward
    for name, buffer in buffers_of(other.model).items():
        buffer.copy_(live[name])
    return forward(other)


# --- forward -------------------------------------------------------------------------------------------------------


def check_forward(row: Row) -> None:
    engine, average = trained_with(row)
    where = pointers(engine)
    raw = forward(engine)  # leaves unsharded copies behind
    before = snapshot(engine, average)
    with average.swapped() as is_swapped:
        assert is_swapped
        assert pointers(engine) == where
        inside = [forward(engine), forward(engine)]
    assert pointers(engine) == where
    assert same(snapshot(engine, average), before)
    after = forward(engine)
    expected = expected_forward(row, engine, average)  # last: it makes engines forget what they gathered
    assert not torch.equal(raw, expected), "this test could not fail"
    assert torch.equal(inside[0], expected)
    assert torch.equal(inside[1], expected)
    assert torch.equal(after, raw)


@every_engine
def test_forward_computes_with_the_average(row: str, world_size: int) -> None:
    """P60, P62, P73, P86, P90: inside, what a plain model loaded with the average computes; afterwards, raw."""
    run_row(row, world_size, check_forward)


@pytest.mark.own_processes
def test_forward_in_one_process() -> None:
    check_forward(ONE_PROCESS)


# --- failures ------------------------------------------------------------------------------------------------------


class InjectedError(RuntimeError):
    pass


class FailAtCopy(TorchDispatchMode):
    """Raise at the k-th copy, before it or after it (as an interruption between a copy and the next line would)."""

    def __init__(self, k: int, when: str, error: type[BaseException]) -> None:
        super().__init__()
        self.left, self.when, self.error = k, when, error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in ("copy_", "_foreach_copy_", "_to_copy", "cat"):
            return func(*args, **(kwargs or {}))
        self.left -= 1
        if self.left == 0 and self.when == "half" and name == "_foreach_copy_":
            args[0][0].copy_(args[1][0])
        if self.left == 0 and self.when == "half" and name == "cat":
            kwargs["out"][: args[0][0].numel()].copy_(args[0][0])
        if self.left == 0 and self.when != "after":
            raise self.error(self.when)
        result = func(*args, **(kwargs or {}))
        if self.left == 0:
            raise self.error(self.when)
        return result


@contextmanager
def failing(mode: FailAtCopy, *methods: str) -> Iterator[None]:
    """`mode` applies inside these methods of Exchange."""

    def wrapped(name: str) -> Callable[..., None]:
        original = getattr(ways.Exchange, name)

        def method(exchange: Any) -> None:
            with mode:
                original(exchange)

        return method

    patches = [mock.patch.object(ways.Exchange, name, wrapped(name)) for name in methods]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def small_batches() -> Any:
    """Many batches of few elements, so that failures come at all places."""
    return mock.patch.object(ways, "CACHE_BYTES", 256)


def check_failed_enter(row: Row) -> None:
    """One rank fails at its k-th copy, for every k."""
    engine, average = trained_with(row)
    culprit, raw, before = dist.get_world_size() - 1, forward(engine), snapshot(engine, average)
    for when in ("before", "half", "after"):
        k, step = 0, 1
        while step:
            k += step
            mode = FailAtCopy(k, when, InjectedError)
            context = failing(mode, "enter") if dist.get_rank() == culprit else nullcontext()
            failed = None
            with small_batches(), context:
                try:
                    with average.swapped():
                        pass
                except (InjectedError, PeerError) as error:
                    failed = type(error)
            assert failed in (None, InjectedError if dist.get_rank() == culprit else PeerError)
            assert same(snapshot(engine, average), before), f"{when}, copy {k}"
            step = max(1, k // 3) if failed is not None else 0  # all of the first, then fewer
        assert k > 1, "nothing failed"
    assert torch.equal(forward(engine), raw)


def check_failed_leave(row: Row) -> None:
    """A copy back fails once, on one rank: it is made good, that rank hears of it, and so do the others."""
    engine, average = trained_with(row)
    culprit, raw, before = 0, forward(engine), snapshot(engine, average)
    for error, when in ((InjectedError, "before"), (InjectedError, "half"), (KeyboardInterrupt, "after")):
        k, failed = 0, True
        while failed:
            k += max(1, k // 2)
            mode, failed = FailAtCopy(k, when, error), False
            told = error if dist.get_rank() == culprit else PeerError
            context = failing(mode, "leave") if dist.get_rank() == culprit else nullcontext()
            with small_batches(), context:
                try:
                    with average.swapped():
                        pass
                except told:
                    failed = True
            assert same(snapshot(engine, average), before), f"{when}, copy {k}"
            assert failed == said_by(culprit, failed)
        assert k > 1, "nothing failed"
    assert torch.equal(forward(engine), raw)


def said_by(rank: int, value: Any) -> Any:
    values = [value]
    dist.broadcast_object_list(values, src=rank)
    return values[0]


def forward_and_fail(engine: Engine, average: ShardedAverage) -> None:
    with average.swapped():
        forward(engine)
        raise InjectedError("evaluation")


def check_failed_body(row: Row) -> None:
    engine, average = trained_with(row)
    raw, before = forward(engine), snapshot(engine, average)  # DDP broadcasts buffers at each forward
    with pytest.raises(InjectedError, match="evaluation"):
        forward_and_fail(engine, average)
    assert same(snapshot(engine, average), before)
    assert torch.equal(forward(engine), raw)
    assert average.update(unscheduled=True)


def check_failures(row: Row) -> None:
    for check in (check_failed_body, check_failed_enter, check_failed_leave):
        check(row)


@every_engine
def test_failures_leave_everything_as_it_was(row: str, world_size: int) -> None:
    """P67, L6: in the body, in bringing averages in (all ranks raise), in bringing weights back; at any copy."""
    run_row(row, world_size, check_failures)


def check_refusals(row: Row) -> None:
    engine = row.start()
    average = VARIANTS["ema"].build(engine.model)
    raw = forward(engine)
    with average.swapped() as is_swapped:
        assert not is_swapped
        assert torch.equal(forward(engine), raw)
    engine.learn(batch(0, engine.part))
    average.update()
    before = snapshot(engine, average)
    refused: list[Callable[[], object]] = [
        lambda: average.swapped().__enter__(),
        average.update,
        lambda: average.load("nowhere"),
        lambda: average.load_state_dict({}),
        average.copy_to_model,
        lambda: average.summon_full_params(writeback=True).__enter__(),
    ]
    with average.swapped():
        for call in refused:
            with pytest.raises(SwapError, match="swapped"):
                call()
    assert same(snapshot(engine, average), before)
    assert average.n_averaged == 1


@pytest.mark.parametrize("row", ["ddp", "fsdp1-full-views", "fsdp2"])
@on_ranks(2)
def test_what_cannot_be_done_inside(row: str) -> None:
    """P03, P10: nothing is swapped before the first update, nothing nested, and no update inside."""
    check_refusals(ENGINES[row])


@pytest.mark.own_processes
def test_what_cannot_be_done_inside_one_process() -> None:
    check_refusals(ONE_PROCESS)


def fail_or_stay(average: ShardedAverage, stay_s: float) -> None:
    with average.swapped():
        if dist.get_rank() == 1:
            raise InjectedError("on this rank only")
        time.sleep(stay_s)


def check_lonely_failure(row: Row) -> None:
    """Rank 1 fails in its body; the others come too late."""
    engine, average = trained_with(row)
    lonely = dist.get_rank() == 1
    started = time.monotonic()
    expected = InjectedError if lonely else PeerError
    with mock.patch.object(bounds, "LEAVING_GRACE_S", 1.0), pytest.raises(expected) as caught:
        fail_or_stay(average, stay_s=2.5)
    assert time.monotonic() - started < 10
    notes = getattr(caught.value, "__notes__", ["restart from a checkpoint"])
    assert not lonely or "restart from a checkpoint" in notes[0]
    dist.barrier()  # no rank is left in a collective
    del engine


def check_failure_within_grace(row: Row) -> None:
    """Rank 1 fails in its body; the others come in time and are told, and everything is as it was."""
    engine, average = trained_with(row)
    raw, before = forward(engine), snapshot(engine, average)  # DDP broadcasts buffers at each forward
    lonely = dist.get_rank() == 1
    with pytest.raises(InjectedError if lonely else PeerError, match="on this rank only"):
        fail_or_stay(average, stay_s=0.3)
    assert same(snapshot(engine, average), before)
    assert torch.equal(forward(engine), raw)


def check_one_failure(row: Row) -> None:
    check_failure_within_grace(row)
    check_lonely_failure(row)


@pytest.mark.parametrize(("row", "world_size"), [("ddp", 2), ("ddp", 3), ("zero1-bf16", 2)])
def test_failure_of_one_rank_does_not_hang(row: str, world_size: int) -> None:
    """P67: where weights are replicated, leaving needs the others; a rank waits for them for a while, not for ever."""
    run_row(row, world_size, check_one_failure)


# --- scratch, buffers, precision -----------------------------------------------------------------------------------


@pytest.mark.own_processes
@pytest.mark.parametrize("cache_bytes", [ways.CACHE_BYTES, ways.SCRATCH_BYTES], ids=["cpu", "gpu"])
def test_scratch_is_bounded(cache_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 MiB are exchanged through 64 MiB at most."""
    monkeypatch.setattr(ways, "CACHE_BYTES", cache_bytes)
    model = nn.Linear(5 << 10, 5 << 10, bias=False)
    average = ShardedAverage(model, EMA(decay=0.9))
    average.update()
    with CountBytes() as count, average.swapped():
        pass
    sums = (100 << 20) // 100  # one number for each row of what is exchanged, twice
    assert 0 < count.nbytes <= cache_bytes + sums
    assert cache_bytes <= 64 << 20


class Normed(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 5, dtype=dtype)
        self.norm = nn.BatchNorm1d(5, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.mix(x))


def step(model: nn.Module, number: int) -> None:
    dtype = next(model.parameters()).dtype
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(batch(number).to(dtype)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.own_processes
def test_averaged_buffers_are_restored() -> None:
    """P40, P47, P90: a train-mode forward inside changes BatchNorm's buffers, and neither raw ones nor averages."""
    model = Normed()
    average = ShardedAverage(model, EMA(decay=0.9), buffers="average")
    expected: Tensor | None = None
    for number in range(3):
        step(model, number)
        average.update()
        mean = model.norm.running_mean.clone()
        expected = mean if expected is None else torch.lerp(expected, mean, 1 - 0.9)
    raw = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with average.summon_full_params() as full:
        before = {name: tensor.clone() for name, tensor in full.items()}
    assert torch.equal(before["norm.running_mean"], expected)
    with average.swapped():
        assert torch.equal(model.norm.running_mean, expected)
        assert model.norm.num_batches_tracked == 3
        model(batch(9))
        assert not torch.equal(model.norm.running_mean, expected)
    raw["norm.num_batches_tracked"] += 1  # an integer: the live one
    assert all(torch.equal(buffer, raw[name]) for name, buffer in model.named_buffers())
    with average.summon_full_params() as full:
        assert all(torch.equal(full[name], before[name]) for name in before if "tracked" not in name)


@pytest.mark.own_processes
@pytest.mark.parametrize("dtype", [torch.float32, None])
def test_validation_does_not_round_the_average(dtype: torch.dtype | None) -> None:
    """L12: a bf16 model with an fp32 average; and with one in bf16, which is exchanged in place."""
    model = Normed(torch.bfloat16)
    average = ShardedAverage(model, EMA(decay=0.9), dtype=dtype)
    for number in range(3):
        step(model, number)
        average.update()
    raw = {name: param.clone() for name, param in model.named_parameters()}
    with average.summon_full_params() as full:
        before = {name: tensor.clone() for name, tensor in full.items()}
    weight = before["mix.weight"]
    assert weight.dtype == dtype or torch.bfloat16
    assert dtype is None or not torch.equal(weight, weight.bfloat16().float()), "nothing to round"
    with average.swapped():
        assert torch.equal(model.mix.weight, weight.bfloat16())
        with average.summon_full_params() as full:
            assert all(torch.equal(full[name], before[name]) for name in before)
    assert all(torch.equal(param, raw[name]) for name, param in model.named_parameters())
    with average.summon_full_params() as full:
        assert all(torch.equal(full[name], before[name]) for name in before)
