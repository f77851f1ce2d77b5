"""What a collective method is made of, but for its traffic: local parts, and decisions.

all_or_none     a local part: all ranks go through it, or none
decided         every rank tells what it has, rank 0 decides, and all get the one answer
gather_objects  every rank gets what all have
rendezvous      whether all ranks are here, asked by one that does not wait for ever
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..errors import CheckpointError, ShardedAvgError
from . import bounds
from .groups import comm_device, rank_in, size_of
from .interrupts import collective, interruptible, uninterrupted
from .meeting import UNDONE, Asked, agree, answer_of, meet, place_taken
from .traffic import traffic

Said = TypeVar("Said")
Answer = TypeVar("Answer")

_SMALL_BYTES = 1 << 14  # of one rank, and of all: what goes through the store
_ALL_SMALL_BYTES = 1 << 20


class Part:
    """A local part under way: what this rank asks the others for, once it knows."""

    asked: Asked | None = None


@contextmanager
def all_or_none(
    group: dist.ProcessGroup | None,
    doing: str,
    asked: Asked | None = None,
    left: str = UNDONE,
    *,
    to_its_end: bool = False,
) -> Iterator[Part]:
    """Collective: all ranks must call. What the body does is local, and may fail on one rank: then all ranks raise.

    They also do if ranks `asked` for different things; the body may set that in what is yielded. `left` says in what
    state a rank is that has not failed itself. What undoes something is done `to_its_end`: Ctrl-C comes after it.
    """
    part, error = Part(), None
    part.asked = asked
    with uninterrupted():
        with place_taken(group, doing) as point:
            try:
                with nullcontext() if to_its_end else interruptible():
                    yield part
            except BaseException as failure:
                error = failure
        agree(group, error, doing, part.asked, left, point)


def attempted(call: Callable[[], Said]) -> tuple[Said | None, BaseException | None]:
    """What a local call gives, or how it fails: for one whose failure the others are told where all meet next."""
    try:
        return call(), None
    except BaseException as failure:
        return None, failure


@collective
def rendezvous(group: dist.ProcessGroup | None, *, grace_s: float) -> bool:
    """Collective: all ranks must call. Wait until every rank is here; False on all of them if one gave up.

    A rank gives up after `grace_s` seconds. Ctrl-C, which is raised when ranks have met, leaves it no more than
    `LEAVING_GRACE_S`: what they meet for is that weights are left as they were, and a second one ends the waiting.
    """
    verdict = meet(group, None, lambda _: None, None, "waiting for all", grace_s, bounds.LEAVING_GRACE_S)
    return verdict.failed is None and not verdict.absent


@collective
def gather_objects(
    group: dist.ProcessGroup | None, value: Any, doing: str = "telling each other what they hold"
) -> list[Any]:
    """Collective: all ranks must call. The picklable values of all ranks, in rank order."""
    if size_of(group) == 1:
        return [value]
    blob, error = _pickled(lambda: value)
    verdict = meet(group, _small(blob), _look, error, doing)
    sizes, blobs = answer_of(verdict, error, group, doing)
    if blobs is None:
        blobs = _exchanged(group, blob, sizes, None, doing)
    with all_or_none(group, doing):
        values = [pickle.loads(one) for one in blobs]
    return values


@collective
def decided(
    group: dist.ProcessGroup | None,
    say: Callable[[], Said],
    decide: Callable[[list[Said]], Answer],
    doing: str,
) -> Answer:
    """Collective: all ranks must call. `say` runs on every rank, then `decide` on rank 0, on what all have said.

    If `say` fails on a rank, that rank raises its error and the others `PeerError`. An error of this package's that
    `decide` raises is raised on all ranks; any other is rank 0's own, and one of the file system's, or of a storage
    backend's, a `CheckpointError` on all.
    """

    def run(values: list[Said]) -> Answer:
        try:
            with interruptible():
                return decide(values)
        except ShardedAvgError:
            raise
        except Exception as failure:
            raise CheckpointError(f"{doing} failed: {failure!r}") from failure

    if size_of(group) == 1:
        with interruptible():
            said = say()
        return run([said])
    blob, error = _pickled(say)

    def look(all_said: list[tuple[int, bytes | None]]) -> tuple[list[int] | None, Answer | None]:
        sizes, blobs = _look(all_said)
        return (sizes, None) if blobs is None else (None, run([pickle.loads(one) for one in blobs]))

    sizes, answer = answer_of(meet(group, _small(blob), look, error, doing), error, group, doing)
    if sizes is None:
        return answer  # type: ignore[no-any-return]
    blobs = _exchanged(group, blob, sizes, 0, doing)
    verdict = meet(group, None, lambda _: run([pickle.loads(one) for one in blobs]), None, doing)
    return answer_of(verdict, None, group, doing)  # type: ignore[no-any-return]


def _pickled(make: Callable[[], Any]) -> tuple[bytes, BaseException | None]:
    try:
        with interruptible():
            return pickle.dumps(make()), None
    except BaseException as failure:
        return b"", failure


def _small(blob: bytes) -> tuple[int, bytes | None]:
    return len(blob), blob if len(blob) <= _SMALL_BYTES else None


def _look(all_said: list[tuple[int, bytes | None]]) -> tuple[list[int], list[bytes] | None]:
    """How much each rank has, and all of it, if that is little."""
    sizes = [size for size, _ in all_said]
    blobs = [blob for _, blob in all_said if blob is not None]
    return sizes, blobs if len(blobs) == len(sizes) and sum(sizes) <= _ALL_SMALL_BYTES else None


def _exchanged(
    group: dist.ProcessGroup | None, blob: bytes, sizes: list[int], dst: int | None, doing: str
) -> list[bytes]:
    """Collective: all ranks must call. What all ranks have, on `dst` or on all; elsewhere nothing."""
    me = rank_in(group)
    with all_or_none(group, doing):
        buffer = torch.empty(max(sizes), dtype=torch.uint8, device=comm_device(group))
        mine = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
        received = [bytearray(size) for size in sizes] if dst in (None, me) else []
    with traffic(group, doing) as messages:
        for rank, size in enumerate(sizes):
            with messages.attempt():
                if rank == me:
                    buffer[:size].copy_(mine)
            messages.send(partial(_first, buffer, size), src=rank, dst=dst)
            with messages.attempt():
                if received:
                    torch.frombuffer(received[rank], dtype=torch.uint8).copy_(buffer[:size])
    return [bytes(one) for one in received]


def _first(buffer: torch.Tensor, size: int) -> torch.Tensor:
    return buffer[:size]
