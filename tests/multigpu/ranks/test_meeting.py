"""The mechanism by itself: what ranks are told when one of them fails, asks for something else, or does not come."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from sharded_avg import CheckpointError, ConfigError, PeerError
from sharded_avg.errors import ReplicaError
from sharded_avg.ranks import (
    Asked,
    all_or_none,
    bounds,
    collective,
    decided,
    gather_objects,
    rendezvous,
    traffic,
    uninterrupted,
)
from tests.helpers.pool import on_ranks


class InjectedError(RuntimeError):
    pass


def keys() -> int:
    """After all are here: how many keys the job's store has."""
    dist.barrier()
    return int(dist.distributed_c10d._get_default_store().num_keys())


def local_part(error: BaseException | None, asked: Asked | None = None) -> None:
    with all_or_none(dist.group.WORLD, "trying", asked):
        if error is not None:
            raise error


@on_ranks(2, 3)
@pytest.mark.parametrize("error", [InjectedError("mine"), MemoryError("mine"), KeyboardInterrupt("mine")], ids=repr)
def test_one_fails(error: BaseException):
    """On any rank, whatever it is: its own there, and its words elsewhere. The next call is as if nothing had been."""
    for culprit in range(dist.get_world_size()):
        mine = dist.get_rank() == culprit
        began = time.monotonic()
        with pytest.raises(type(error) if mine else PeerError, match="mine") as caught:
            local_part(error if mine else None)
        assert mine or f"rank {culprit} failed while trying" in str(caught.value)
        assert time.monotonic() - began < 10
        local_part(None)


@on_ranks(2, 3)
@pytest.mark.parametrize("inside", ["a part", "objects"])
def test_a_meeting_inside_of_a_part_that_one_does_not_come_to(inside: str):
    """It raises with that rank's words, and all ranks go on counting alike."""

    def meet() -> None:
        if inside == "a part":
            local_part(None)
        else:
            gather_objects(dist.group.WORLD, 7)

    for culprit in 10 * list(range(dist.get_world_size())):
        mine = dist.get_rank() == culprit
        began = time.monotonic()
        with pytest.raises(InjectedError if mine else PeerError, match="mine") as caught:  # noqa: SIM117, PT012
            with all_or_none(dist.group.WORLD, "going around"):
                meet()
                if mine:
                    raise InjectedError("mine")
                meet()
        assert mine or f"rank {culprit} failed while going around" in str(caught.value)
        assert time.monotonic() - began < 10
        local_part(None)
        assert gather_objects(dist.group.WORLD, dist.get_rank()) == list(range(dist.get_world_size()))


@on_ranks(2, 3)
def test_ranks_that_ask_for_different_things():
    rank = dist.get_rank()
    with pytest.raises(PeerError, match=r"rank\(s\) \[0\]: swapped\('a'\); rank\(s\) \[1.*\]: swapped\('b'\)"):
        local_part(None, Asked(f"swapped('{'a' if rank == 0 else 'b'}')"))
    with pytest.raises(ReplicaError, match="the same model and average other parameters"):
        local_part(None, Asked("swapped()", model=1, chosen=rank))
    local_part(None, Asked("swapped()", model=rank, chosen=rank))  # each has a part of the model of its own


@on_ranks(2)
def test_ranks_in_different_calls():
    expected = "different calls: rank 0 of the group is naming; rank 1 of the group is trying"
    with pytest.raises(PeerError, match=expected):  # noqa: PT012
        if dist.get_rank() == 0:
            decided(dist.group.WORLD, lambda: 3, lambda said: sum(said), "naming")
        else:
            local_part(None)


@on_ranks(3)
def test_a_rank_that_does_not_come():
    """The bound is ours, and the error has the names; the rank that comes late is told, and the next call works."""
    with mock.patch.object(bounds, "PATIENCE_S", 0.5), pytest.raises(PeerError) as caught:  # noqa: PT012
        if dist.get_rank() == 1:
            time.sleep(2)
        local_part(None)
    assert "ranks [1] did not come while trying" in str(caught.value)
    local_part(None)


@on_ranks(2, 3)
def test_decisions():
    """Rank 0 decides for all: its answer, an error of ours, one of its disk, or its own."""
    size, group = dist.get_world_size(), dist.group.WORLD
    assert decided(group, dist.get_rank, lambda said: said[::-1], "deciding") == list(range(size))[::-1]

    def refuse(said: list[int]) -> None:
        raise ConfigError(f"not {said}")

    def full(said: list[int]) -> None:
        raise OSError("disk is full")

    def interrupted(said: list[int]) -> None:
        raise KeyboardInterrupt("rank 0")

    cases: list[tuple[Callable[[list[int]], None], type[BaseException]]] = [
        (refuse, ConfigError),
        (full, CheckpointError),
        (interrupted, KeyboardInterrupt if dist.get_rank() == 0 else PeerError),
    ]
    for decide, expected in cases:
        with pytest.raises(expected):
            decided(group, dist.get_rank, decide, "deciding")


@on_ranks(2, 3)
def test_small_and_large_objects():
    """What is little goes through the store, the rest by messages; nothing stays in the store."""
    rank, size, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    before = keys()
    for numel in (0, 3, 40_000, 3_000_000):
        mine = bytes([rank]) * (numel + rank)
        expected = [bytes([other]) * (numel + other) for other in range(size)]
        assert gather_objects(group, mine) == expected
        assert decided(group, lambda mine=mine: mine, lambda said: [len(one) for one in said], "x") == [
            len(one) for one in expected
        ]
    assert keys() <= before
    dist.barrier()


class Unpicklable:
    def __reduce__(self) -> Any:
        raise InjectedError("cannot be pickled")


@on_ranks(2)
def test_what_cannot_be_told():
    mine = dist.get_rank() == 1
    with pytest.raises(InjectedError if mine else PeerError, match="cannot be pickled"):
        gather_objects(dist.group.WORLD, Unpicklable() if mine else 3)


@on_ranks(2, 3)
@pytest.mark.parametrize("where", ["before", "call", "after"])
def test_traffic_takes_part_to_its_end(where: str):
    """One rank fails before its second message, in it, or after it: the others have theirs, and all raise."""
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = rank == size - 1
    buffer, sums = torch.full((5,), float(rank)), []
    broadcast = dist.broadcast
    calls = iter([None, InjectedError("in it")]) if mine and where == "call" else iter(())

    def failing(*args: Any, **kwargs: Any) -> Any:
        if (error := next(calls, None)) is not None:
            raise error
        return broadcast(*args, **kwargs)

    expected = InjectedError if mine else PeerError
    with mock.patch.object(dist, "broadcast", failing), pytest.raises(expected), traffic(dist.group.WORLD, "x") as t:  # noqa: PT012
        for source in range(3):
            with t.attempt():
                if mine and where == "before" and source == 1:
                    raise InjectedError("before")
                buffer.fill_(10.0 * source if rank == source % size else -1.0)
            t.send(lambda: buffer, src=source % size, dst=None)
            with t.attempt():
                sums.append(float(buffer.sum()))
                if mine and where == "after" and source == 1:
                    raise InjectedError("after")
    assert mine or size < 3 or sums == [0.0, 50.0, 100.0]
    dist.barrier()  # no rank is left in a message


@contextmanager
def ctrl_c_interrupts() -> Iterator[None]:
    """As in a user's program: pytest's workers, and what they start, ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def interrupting(test: Callable[[], None]) -> Callable[[], None]:
    return functools.wraps(test)(ctrl_c_interrupts()(test))


@on_ranks(2)
@interrupting
def test_interrupted_while_waiting():
    """Ctrl-C on a rank that waits for one that is late: its own there, and the late one is told."""
    first = dist.get_rank() == 0
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    if first:
        timer.start()
    with pytest.raises(KeyboardInterrupt if first else PeerError, match=None if first else "KeyboardInterrupt"):  # noqa: PT012
        if not first:
            time.sleep(1.5)
        local_part(None)
    dist.barrier()


@on_ranks(2)
@interrupting
def test_interrupted_between_two_agreements():
    """It is raised in the next local part, where the others learn of it, and not between."""
    mine, reached = dist.get_rank() == 1, []

    @collective
    def method() -> None:
        local_part(None)
        if mine:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
        reached.append("between")
        local_part(None)
        reached.append("after")

    with pytest.raises(KeyboardInterrupt if mine else PeerError):
        method()
    assert reached == ["between"]
    local_part(None)


@pytest.mark.own_processes
@interrupting
def test_a_second_interruption_is_raised_at_once():
    reached = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        reached.append("first")
        signal.raise_signal(signal.SIGINT)
        reached.append("second")
    assert reached == ["first"]
    with uninterrupted(), all_or_none(None, "trying"):  # in a notebook, say: the first one is not raised here
        reached.append("afterwards")
    assert reached == ["first", "afterwards"]


@pytest.mark.own_processes
@interrupting
def test_interrupted_in_what_then_fails():
    """Ctrl-C is not lost, and not raised in a later call; the error is told with it."""
    with pytest.raises(KeyboardInterrupt) as caught, uninterrupted():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        raise ValueError("of the body")
    assert str(caught.value.__context__) == "of the body"
    with uninterrupted(), all_or_none(None, "trying"):
        pass


@pytest.mark.own_processes
@interrupting
def test_interrupted_in_a_local_part():
    """There, it comes when it comes; and a handler that somebody else has put there stays."""
    reached = []
    with pytest.raises(KeyboardInterrupt), uninterrupted(), all_or_none(None, "trying"):  # noqa: PT012
        reached.append("inside")
        signal.raise_signal(signal.SIGINT)
        reached.append("after it")
    assert reached == ["inside"]
    heard = []
    before = signal.getsignal(signal.SIGINT)
    try:
        with uninterrupted(), all_or_none(None, "trying"):
            signal.signal(signal.SIGINT, lambda *_: heard.append(1))
        signal.raise_signal(signal.SIGINT)
        assert heard == [1]
    finally:
        signal.signal(signal.SIGINT, before)


@on_ranks(2)
def test_rendezvous_gives_up_for_all():
    late = dist.get_rank() == 1
    if late:
        time.sleep(1.5)
    assert rendezvous(dist.group.WORLD, grace_s=0.3 if not late else 30.0) is False
    assert rendezvous(dist.group.WORLD, grace_s=30.0) is True
    local_part(None)
