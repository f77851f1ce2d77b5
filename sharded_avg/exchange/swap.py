"""The exchange of live and averaged values, always undone.

[Note: three ways to swap]
    InPlace    live and average have one dtype: their values are exchanged through a scratch buffer of at most 64 MiB.
               While swapped, the average is in the live tensor and the raw weights are in the arena.
    Rewrite    the engine keeps a master (ZeRO): the low-precision weights are written from the average, and afterwards
               from the master, which is never written. Used where the weights are bit-equal to the cast master.
    Stash      the average is kept in another dtype than the weights, or they are a buffer that forward may change:
               the raw values are kept aside, in host memory, so that the average is never rounded.

[Note: marks]
Each way is a few copies in a fixed order, with a mark set after each. An interruption can come between a copy and its
mark, so whatever follows from a mark is right whether or not the next copy has happened; see the comments there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from ..averages.state import Pair, State, swapped_models
from ..errors import PeerError, SwapError
from ..ranks import agree, rendezvous
from ..tensors import coalesce, pack, split
from ..weights.layouts.base import AbstractLayout

SCRATCH_BYTES = 64 << 20
RENDEZVOUS_GRACE_S = 30.0  # for a rank that failed
PATIENCE_S = 1800.0  # for one that did not: others may still be evaluating
_ATTEMPTS = 3  # at bringing one batch of raw weights back
_CACHE_BYTES = 1 << 20  # a CPU exchanges faster through a buffer that stays in its cache


_SWAPPED = 3  # a mark of _InPlace


class _Way(ABC):
    @abstractmethod
    def enter(self) -> None:
        """Bring the average into the live tensors."""

    @abstractmethod
    def leave(self) -> None:
        """Bring the raw weights back, from wherever `enter` or an earlier `leave` was interrupted."""


class _InPlace(_Way):
    """Marks: 0 raw | 1 scratch has raw | 2 live has average | 3 swapped | 4 scratch has average | 5 live is raw."""

    def __init__(self, live: list[Tensor], average: list[Tensor], scratch: list[Tensor], mark: int) -> None:
        self._live, self._average, self._scratch = live, average, scratch
        self._mark = mark

    def _copy(self, to: list[Tensor], source: list[Tensor], then: int) -> None:
        torch._foreach_copy_(to, source)
        self._mark = then

    def enter(self) -> None:
        self._copy(self._scratch, self._live, then=1)
        self._copy(self._live, self._average, then=2)
        self._copy(self._average, self._scratch, then=_SWAPPED)

    def leave(self) -> None:
        if self._mark == _SWAPPED:
            self._copy(self._scratch, self._live, then=4)
        if self._mark == 4:  # the arena has the raw weights, and keeps them until mark 5
            self._copy(self._live, self._average, then=5)
        if self._mark == 5:
            self._copy(self._average, self._scratch, then=0)
        # What follows undoes an `enter` that did not come to its end.
        if self._mark == 2:  # live has the average; the arena may have lost it already
            self._copy(self._average, self._live, then=1)
        if self._mark == 1:  # scratch has the raw weights; live may have lost them already
            self._copy(self._live, self._scratch, then=0)


class _Rewrite(_Way):
    def __init__(self, target: Tensor, average: Tensor, master: Tensor) -> None:
        self._target, self._average, self._master = target, average, master

    def enter(self) -> None:
        self._target.copy_(self._average)

    def leave(self) -> None:
        self._target.copy_(self._master)


class _Stash(_Way):
    def __init__(self, target: Tensor, average: Tensor, raw: Tensor | None = None) -> None:
        self._target, self._average, self.raw = target, average, raw

    def enter(self) -> None:
        self.raw = self._target.to("cpu", copy=True)
        self._target.copy_(self._average)

    def leave(self) -> None:
        if self.raw is not None:
            self._target.copy_(self.raw)
            self.raw = None


class Exchange:
    """The local part of one swap: `enter` and `leave` touch this rank's memory only."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._places = _places(pairs)
        held = [index for index, pair in enumerate(pairs) if pair.target.numel()]
        self._in_place = [index for index in held if pairs[index].in_place]
        self._rewritten = _cast_from_masters(pairs, held)
        self._stashed = [index for index in held if index not in {*self._in_place, *self._rewritten}]
        self._stashes = [_Stash(pairs[index].target, pairs[index].average) for index in self._stashed]
        self._exchanges = list(_in_place_ways([pairs[index] for index in self._in_place]))
        self._rewrites = list(_rewrite_ways([pairs[index] for index in self._rewritten]))
        self._begun: list[_Way] = []

    def enter(self) -> None:
        """Bring the average in; if that fails, everything is as before and the error goes on."""
        try:
            for way in (*self._exchanges, *self._rewrites, *self._stashes):
                self._begun.append(way)
                way.enter()
        except BaseException:
            self.leave()
            raise

    def move_to(self, pairs: Sequence[Pair]) -> None:
        """Between `enter` and `leave`: the engine may have moved the live tensors, with the averages in them."""
        if _places(pairs) == self._places:
            return
        self._exchanges = list(_in_place_ways([pairs[index] for index in self._in_place], mark=_SWAPPED))
        self._rewrites = list(_rewrite_ways([pairs[index] for index in self._rewritten]))
        self._stashes = [
            _Stash(pairs[index].target, pairs[index].average, stash.raw)
            for index, stash in zip(self._stashed, self._stashes, strict=True)
        ]
        self._begun = [*self._exchanges, *self._rewrites, *self._stashes]

    def leave(self) -> None:
        """Bring the raw weights back. An error or interruption (Ctrl-C) is raised when all that can be back are."""
        failure: BaseException | None = None
        while self._begun:
            way = self._begun[-1]
            for _ in range(_ATTEMPTS):  # a way goes on from where it was interrupted
                try:
                    way.leave()
                    break
                except BaseException as error:
                    failure = failure or error
            self._begun.pop()
        if failure is not None:
            raise failure


def _places(pairs: Sequence[Pair]) -> list[tuple[object, ...]]:
    """Where the tensors of each pair lie, and how."""
    return [
        (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        for pair in pairs
        for tensor in (pair.target, pair.average, pair.master)
        if tensor is not None and tensor.numel()
    ]


def _in_place_ways(pairs: Sequence[Pair], mark: int = 0) -> Iterator[_InPlace]:
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, ...]]] = {}
    for pair in pairs:
        groups.setdefault((pair.target.device, pair.target.dtype), []).append((pair.target, pair.average))
    for (device, dtype), rows in groups.items():
        limit_bytes = _CACHE_BYTES if device.type == "cpu" else SCRATCH_BYTES // len(groups)
        batches = list(pack(coalesce(rows), limit_bytes // dtype.itemsize))
        # Allocated before anything is touched, kept until the raw weights are back: leaving cannot run out of memory.
        numel = max((sum(row[0].numel() for row in batch) for batch in batches), default=0)
        buffer = torch.empty(numel, dtype=dtype, device=device)
        for batch in batches:
            live = [row[0] for row in batch]
            yield _InPlace(live, [row[1] for row in batch], _carve(buffer, live), mark)


def _rewrite_ways(pairs: Sequence[Pair]) -> Iterator[_Rewrite]:
    for target, average, master in coalesce([(p.target, p.average, p.master) for p in pairs if p.master is not None]):
        yield _Rewrite(target, average, master)


def _cast_from_masters(pairs: Sequence[Pair], held: Sequence[int]) -> list[int]:
    """The pairs whose target is its master in a lower dtype, bit for bit, so that it can be restored from it."""
    rows = {i: (pairs[i].target, master) for i in held if (master := pairs[i].master) is not None}
    if all(_is_cast(target, master) for target, master in coalesce(list(rows.values()))):  # a few large comparisons
        return list(rows)
    return [i for i, (target, master) in rows.items() if _is_cast(target, master)]


def _carve(buffer: Tensor, like: list[Tensor]) -> list[Tensor]:
    pieces, start = [], 0
    for tensor in like:
        pieces.append(buffer[start : start + tensor.numel()].view(tensor.shape))
        start += tensor.numel()
    return pieces


def _is_cast(target: Tensor, master: Tensor) -> bool:
    """Whether `target` is `master` in its own dtype, so that it can be restored from it."""
    pieces = split((target, master), SCRATCH_BYTES // master.element_size())
    return all(torch.equal(low, high.to(low.dtype).to(low.device)) for low, high in pieces)


@torch.inference_mode(False)  # scratch that is made under inference mode could not be written after it
@torch.no_grad()
def _entered(layout: AbstractLayout, pairs: Callable[[], Sequence[Pair]]) -> Exchange:
    """Collective: all ranks must call. Exchange locally on every rank, or on none."""
    exchange, error = None, None
    try:
        layout.release()
        exchange = Exchange(pairs())
        exchange.enter()
    except BaseException as failure:
        error = failure
    try:
        agree(layout.group, error, "swapping the average in")
    except BaseException:
        if exchange is not None:
            exchange.leave()
        raise
    if exchange is None:
        raise SwapError("the exchange was not built, yet no error was reported")
    return exchange


@contextmanager
def swapped(state: State, name: str | None) -> Iterator[bool]:
    """Collective: all ranks must call. See `ShardedAverage.swapped`."""
    state.refuse_while_swapped("swapped()")
    name = state.resolve(name)
    if not state.histories[name].n_averaged:
        yield False
        return
    with swapped_in(state.layout, partial(state.pairs, name)):
        state.swapped = name
        swapped_models.add(state.layout.model)
        try:
            yield True
        finally:
            state.swapped = None
            swapped_models.discard(state.layout.model)


@contextmanager
def swapped_in(layout: AbstractLayout, pairs: Callable[[], Sequence[Pair]]) -> Iterator[None]:
    """Collective: all ranks must call. The model computes with averages inside, and with the raw weights after.

    `pairs()` reads the live tensors anew, always in one order: an engine may move them in its first forward.

    If bringing the averages in fails on any rank, all ranks are restored and raise.
    """
    exchange = _entered(layout, pairs)
    error: BaseException | None = None
    try:
        _publish(layout)
        yield
    except BaseException as failure:
        error = failure
        raise
    finally:
        try:
            _left(layout, exchange, pairs)
        finally:
            _republish(layout, error)


@torch.inference_mode(False)
@torch.no_grad()
def _publish(layout: AbstractLayout) -> None:
    layout.publish()


@torch.inference_mode(False)
@torch.no_grad()
def _left(layout: AbstractLayout, exchange: Exchange, pairs: Callable[[], Sequence[Pair]]) -> None:
    try:
        layout.release()
        exchange.move_to(pairs())
    finally:
        exchange.leave()


@torch.inference_mode(False)
@torch.no_grad()
def _republish(layout: AbstractLayout, error: BaseException | None) -> None:
    """Spread the raw weights to every replica; a rank whose peers do not come gives up instead of waiting for ever."""
    if not layout.publishes:
        return
    layout.has_stale_replicas = True
    if rendezvous(layout.group, grace_s=RENDEZVOUS_GRACE_S if error is not None else PATIENCE_S):
        layout.publish()
        layout.has_stale_replicas = False
        return
    if error is None:
        raise PeerError(
            f"another rank left the swap with an error more than {RENDEZVOUS_GRACE_S:.0f} s before this one, and is "
            "gone: the replicated weights of this rank still hold averages outside its own part. Restart from a "
            "checkpoint; the cause is in the traceback of that rank"
        )
    if hasattr(error, "add_note"):  # Python >= 3.11
        error.add_note(
            f"sharded_avg: other ranks did not leave the swap within {RENDEZVOUS_GRACE_S:.0f} s, so the replicated "
            "weights of this rank still hold averages outside its own part. Restart from a checkpoint."
        )
