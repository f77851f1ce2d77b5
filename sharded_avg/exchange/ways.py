"""What one rank does in a swap: three ways to exchange live and averaged values, always undone. All of it is local.

[Note: three ways to swap]
    InPlace    live and average have one dtype: their values are exchanged through a scratch buffer of at most 64 MiB.
               While swapped, the average is in the live tensor and the raw weights are in the arena.
    Rewrite    the engine keeps a master (ZeRO): the low-precision weights are written from the average, and afterwards
               from the master, which is never written. Used where the weights are bit-equal to the cast master.
    Stash      the average is kept in another dtype than the weights, or forward may change them (buffers, embeddings
               with max_norm): the raw values are kept aside, in host memory, so that the average is never rounded.

[Note: marks]
Each way is a few copies in a fixed order, with a mark set after each. An interruption can come between a copy and its
mark, so whatever follows from a mark is right whether or not the next copy has happened.

[Note: what others do to the live tensors meanwhile]
moved      engines move shards, `model.half()` and `param.data = ...` replace them. The tensors of entering are kept and
           still have the averages, so leaving goes through them, and then copies the raw weights on to where the live
           tensors are now, cast if need be.
written    an optimizer step, `load_state_dict`, a quantisation pass. What an InPlace or a Rewrite relies on has another
           fingerprint then, and leaving says so: the average, or the master, is what the block made of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from operator import add, attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from ..tensors import Row, coalesce, pack, split
from .fingerprint import Fingerprint

SCRATCH_BYTES = 64 << 20
CACHE_BYTES = 1 << 20  # a CPU exchanges faster through a buffer that stays in its cache
_ATTEMPTS = 3  # at bringing one batch of raw weights back


class Pair(NamedTuple):
    """What one shard exchanges. All tensors have one shape."""

    name: str
    target: Tensor  # the live tensor that forward reads
    average: Tensor
    master: Tensor | None  # the engine's copy that `target` was cast from
    volatile: bool  # forward may change it


class Way(ABC):
    """One batch of pairs."""

    @abstractmethod
    def enter(self) -> None:
        """Bring the average into the live tensors."""

    @abstractmethod
    def leave(self) -> None:
        """Bring the raw weights back, from wherever `enter` or an earlier `leave` was interrupted."""

    def written(self) -> Sequence[Tensor]:
        """After `leave`: tensors that somebody wrote to in between, so that their values are lost."""
        return ()


class Column:
    """Tensors of one device and dtype that are copied together; few large copies where they allow it."""

    def __init__(self, parts: list[Tensor], whole: Tensor | None = None) -> None:
        """`whole`: the 1-D tensor that the parts are, one after the other."""
        self.parts, self.whole = parts, _joined(parts) if whole is None else whole
        self.is_flat = all(dim == 1 for dim in set(map(Tensor.dim, parts)))

    def copy_(self, source: Column) -> None:
        """Take the values of as many tensors of the same shapes."""
        if self.whole is not None and source.whole is not None:
            self.whole.copy_(source.whole)
        elif self.whole is not None and source.is_flat and self.whole.device == source.parts[0].device:
            torch.cat(source.parts, out=self.whole)
        else:
            torch._foreach_copy_(self.parts, source.parts)


_RAW, _HELD, _BOTH, _SWAPPED = range(4)


class InPlace(Way):
    """Marks: raw | scratch holds the average | and the arena has the raw weights, both have | swapped."""

    def __init__(self, live: list[Tensor], average: list[Tensor], flat: Tensor) -> None:
        """`flat`: 1-D scratch, of as many elements."""
        self._live, self._average = Column(live), Column(average)
        scratch = list(flat.split_with_sizes(list(map(Tensor.numel, live))))
        if not self._live.is_flat:
            scratch = [piece.view(tensor.shape) for piece, tensor in zip(scratch, live, strict=True)]
        self._scratch = Column(scratch, flat)
        self._fingerprint = Fingerprint(flat)
        self._taken: list[Tensor] = []
        self._mark = _RAW

    def _copy(self, to: Column, source: Column, then: int) -> None:
        to.copy_(source)
        self._mark = then

    def enter(self) -> None:
        self._copy(self._scratch, self._average, then=_HELD)
        self._taken = [self._fingerprint.take()]
        self._copy(self._average, self._live, then=_BOTH)
        self._copy(self._live, self._scratch, then=_SWAPPED)

    def leave(self) -> None:
        if self._mark == _SWAPPED:
            self._copy(self._scratch, self._live, then=_BOTH)
            self._taken.append(self._fingerprint.take())
        if self._mark == _BOTH:
            self._copy(self._live, self._average, then=_HELD)
        if self._mark == _HELD:
            self._copy(self._average, self._scratch, then=_RAW)

    def written(self) -> Sequence[Tensor]:
        return () if len({int(taken) for taken in self._taken}) < 2 else self._live.parts


class Rewrite(Way):
    """From the average, and back from the master, which is never written."""

    def __init__(self, target: Tensor, average: Tensor, master: Tensor) -> None:
        self._target, self._average, self._master = target, average, master
        self._fingerprint = Fingerprint(master)
        self._taken: list[Tensor] = []

    def enter(self) -> None:
        self._taken = [self._fingerprint.take()]
        self._target.copy_(self._average)

    def leave(self) -> None:
        self._target.copy_(self._master)
        self._taken.append(self._fingerprint.take())

    def written(self) -> Sequence[Tensor]:
        return () if len({int(taken) for taken in self._taken}) < 2 else [self._master]


class Stash(Way):
    """From the average, and back from a copy in host memory."""

    def __init__(self, target: Tensor, average: Tensor) -> None:
        self._target, self._average = target, average
        self._raw: Tensor | None = None

    def enter(self) -> None:
        self._raw = self._target.to("cpu", copy=True)
        self._target.copy_(self._average)

    def leave(self) -> None:
        if self._raw is not None:
            self._target.copy_(self._raw)
            self._raw = None


class Exchange:
    """The local part of one swap: every method touches this rank's memory only."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = [pair for pair in pairs if pair.target.numel()]
        self.lent: dict[str, Tensor] = {}  # the averages that are in the model while swapped
        in_place: dict[tuple[torch.device, torch.dtype], list[Row]] = {}
        others: list[Pair] = []
        for pair in self.pairs:
            name, target, average, master, volatile = pair
            if master is not None or volatile or (dtype := target.dtype) != average.dtype:
                others.append(pair)
            else:
                self.lent[name] = target
                in_place.setdefault((target.device, dtype), []).append((target, average))
        rewritten, rows = _cast_from_masters(others)
        self._ways: list[Way] = [
            *_in_place_ways(in_place),
            *(Rewrite(*row) for row in rows),
            *(Stash(pair.target, pair.average) for pair in others if pair.name not in rewritten),
        ]
        self._begun: list[Way] = []

    def enter(self) -> None:
        """Bring the average in; if that fails, everything is as before and the error goes on."""
        try:
            for way in self._ways:
                self._begun.append(way)
                way.enter()
        except BaseException:
            self.leave()
            raise

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

    def follow(self, live: Mapping[str, tuple[Tensor, Tensor | None]]) -> set[str]:
        """After `leave`: bring the raw weights to where the live tensors (and their masters) are now, by name.

        Returns which have moved.
        """
        moved: dict[str, Row] = {}
        for pair in self.pairs:
            target, master = live.get(pair.name, (pair.target, pair.master))
            if _place(target) != _place(pair.target) and target.shape == pair.target.shape:
                moved[pair.name] = (target, pair.target if master is None else master)
        for attempt in range(_ATTEMPTS):
            try:
                for target, raw in moved.values():
                    target.copy_(raw)
                break
            except BaseException:
                if attempt == _ATTEMPTS - 1:
                    raise
        return set(moved)

    def written(self) -> list[str]:
        """After `leave`: names of averages, or of masters, that somebody wrote to in between.

        As far as can be known: all that lie in one batch with what was written to.
        """
        stretches = [_stretch(tensor) for way in self._ways for tensor in way.written()]
        found = []
        for pair in self.pairs if stretches else ():
            here = (pair.target if pair.master is None else pair.master).data_ptr()
            if any(start <= here < stop for start, stop in stretches):
                found.append(pair.name)
        return found


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _stretch(tensor: Tensor) -> tuple[int, int]:
    """The addresses that a tensor lies between."""
    extent = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.data_ptr(), tensor.data_ptr() + extent * tensor.element_size()


def _joined(parts: list[Tensor]) -> Tensor | None:
    """The 1-D tensor that these are, one after the other, if they are."""
    if any(left.data_ptr() + left.nbytes != right.data_ptr() for left, right in pairwise(parts[:2])):
        return None  # as most often where they are not
    starts = list(map(Tensor.data_ptr, parts))
    ends = list(map(add, starts, map(attrgetter("nbytes"), parts)))
    if starts[1:] != ends[:-1] or set(map(Tensor.dim, parts)) != {1} or not all(map(Tensor.is_contiguous, parts)):
        return None
    if len({part.untyped_storage().data_ptr() for part in (parts[0], parts[-1])}) > 1:
        return None
    return parts[0].as_strided((sum(map(Tensor.numel, parts)),), (1,))


def _in_place_ways(groups: Mapping[tuple[torch.device, torch.dtype], list[Row]]) -> Iterator[InPlace]:
    for (device, dtype), rows in groups.items():
        limit_bytes = CACHE_BYTES if device.type == "cpu" else SCRATCH_BYTES // len(groups)
        columns = [list(zip(*batch, strict=True)) for batch in pack(coalesce(rows), limit_bytes // dtype.itemsize)]
        # Allocated before anything is touched, kept until the raw weights are back: leaving cannot run out of memory.
        sizes = [sum(map(Tensor.numel, live)) for live, _ in columns]
        buffer = torch.empty(max(sizes, default=0), dtype=dtype, device=device)
        for (live, average), numel in zip(columns, sizes, strict=True):
            yield InPlace(list(live), list(average), buffer[:numel])


def _cast_from_masters(pairs: Sequence[Pair]) -> tuple[set[str], list[Row]]:
    """The pairs whose target is its master in a lower dtype, bit for bit, so that it can be restored from it."""
    rows: dict[str, Row] = {p.name: (p.target, p.average, p.master) for p in pairs if p.master is not None}
    joined = coalesce(list(rows.values()))
    if not all(_is_cast(target, master) for target, _, master in joined):  # a few large comparisons
        rows = {name: row for name, row in rows.items() if _is_cast(row[0], row[2])}
        joined = coalesce(list(rows.values()))
    return set(rows), joined


def _is_cast(target: Tensor, master: Tensor) -> bool:
    pieces = split((target, master), SCRATCH_BYTES // master.element_size())
    return all(torch.equal(low, high.to(low.dtype).to(low.device)) for low, high in pieces)
