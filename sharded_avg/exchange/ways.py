"""What one rank does in a swap: three ways to exchange live and averaged values, always undone. All of it is local.

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
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..averages.state import Pair
from ..tensors import coalesce, pack, split

SCRATCH_BYTES = 64 << 20
CACHE_BYTES = 1 << 20  # a CPU exchanges faster through a buffer that stays in its cache
_ATTEMPTS = 3  # at bringing one batch of raw weights back
_SWAPPED = 3  # a mark of InPlace


class Way(ABC):
    """One batch of pairs."""

    @abstractmethod
    def enter(self) -> None:
        """Bring the average into the live tensors."""

    @abstractmethod
    def leave(self) -> None:
        """Bring the raw weights back, from wherever `enter` or an earlier `leave` was interrupted."""


class InPlace(Way):
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


class Rewrite(Way):
    """From the average, and back from the master, which is never written."""

    def __init__(self, target: Tensor, average: Tensor, master: Tensor) -> None:
        self._target, self._average, self._master = target, average, master

    def enter(self) -> None:
        self._target.copy_(self._average)

    def leave(self) -> None:
        self._target.copy_(self._master)


class Stash(Way):
    """From the average, and back from a copy in host memory."""

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
        self._stashes = [Stash(pairs[index].target, pairs[index].average) for index in self._stashed]
        self._exchanges = list(_in_place_ways([pairs[index] for index in self._in_place]))
        self._rewrites = list(_rewrite_ways([pairs[index] for index in self._rewritten]))
        self._begun: list[Way] = []

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
            Stash(pairs[index].target, pairs[index].average, stash.raw)
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


def _in_place_ways(pairs: Sequence[Pair], mark: int = 0) -> Iterator[InPlace]:
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, ...]]] = {}
    for pair in pairs:
        groups.setdefault((pair.target.device, pair.target.dtype), []).append((pair.target, pair.average))
    for (device, dtype), rows in groups.items():
        limit_bytes = CACHE_BYTES if device.type == "cpu" else SCRATCH_BYTES // len(groups)
        batches = list(pack(coalesce(rows), limit_bytes // dtype.itemsize))
        # Allocated before anything is touched, kept until the raw weights are back: leaving cannot run out of memory.
        numel = max((sum(row[0].numel() for row in batch) for batch in batches), default=0)
        buffer = torch.empty(numel, dtype=dtype, device=device)
        for batch in batches:
            live = [row[0] for row in batch]
            pieces = buffer[: sum(map(Tensor.numel, live))].split_with_sizes([tensor.numel() for tensor in live])
            scratch = [piece.view(tensor.shape) for piece, tensor in zip(pieces, live, strict=True)]
            yield InPlace(live, [row[1] for row in batch], scratch, mark)


def _rewrite_ways(pairs: Sequence[Pair]) -> Iterator[Rewrite]:
    for target, average, master in coalesce([(p.target, p.average, p.master) for p in pairs if p.master is not None]):
        yield Rewrite(target, average, master)


def _cast_from_masters(pairs: Sequence[Pair], held: Sequence[int]) -> list[int]:
    """The pairs whose target is its master in a lower dtype, bit for bit, so that it can be restored from it."""
    rows = {i: (pairs[i].target, master) for i in held if (master := pairs[i].master) is not None}
    if all(_is_cast(target, master) for target, master in coalesce(list(rows.values()))):  # a few large comparisons
        return list(rows)
    return [i for i, (target, master) in rows.items() if _is_cast(target, master)]


def _is_cast(target: Tensor, master: Tensor) -> bool:
    """Whether `target` is `master` in its own dtype, so that it can be restored from it."""
    pieces = split((target, master), SCRATCH_BYTES // master.element_size())
    return all(torch.equal(low, high.to(low.dtype).to(low.device)) for low, high in pieces)
