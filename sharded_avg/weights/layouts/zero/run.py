"""Parameters laid end to end in replicated weights, cut into equal stretches: one Run for each parameter group.

Run    the parameters, the live weights, and the masters of at least this rank's stretch
Span   a live 1-D tensor and the element of its Run that it begins with
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn

from ....ranks import all_or_none, rank_in, size_of, traffic
from ....shard import Interval
from ..base import STALE
from .piece import EMPTY, Piece

SCRATCH_BYTES = 64 << 20
SPREADING = "spreading weights over the ranks of ZeRO"


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """Elements `[start, start + tensor.numel())` of a Run."""

    start: int
    tensor: Tensor  # 1D


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Parameters end to end; rank r owns `[r * stretch, (r + 1) * stretch)`, the last ranks perhaps less."""

    params: list[tuple[nn.Parameter, int]]  # with the element of the Run where each begins, ascending
    live: list[Span]  # all of the Run, gaps only where the engine pads
    masters: list[Span]  # at least this rank's stretch; `live` itself where there are no masters
    stretch: int

    @property
    def has_whole_masters(self) -> bool:
        """Whether every rank has the masters of the whole Run, apart from `live`."""
        return self.masters is not self.live and _numel(self.masters) == _numel(self.live)

    def of_masters(self) -> Run:
        """The same Run with whole masters in place of the live weights."""
        return Run(self.params, self.masters, self.masters, self.stretch)

    def pieces(self, rank: int) -> Iterator[Piece]:
        """This rank's Piece of every parameter, in memory order."""
        for param, begin in self.params:
            start = max(begin, rank * self.stretch)
            stop = min(begin + param.numel(), (rank + 1) * self.stretch)
            region = Interval(start - begin, stop - begin) if start < stop else EMPTY
            master, live = (view(spans, start, max(start, stop)) for spans in (self.masters, self.live))
            yield Piece(param, param.shape, region, master, None if self.masters is self.live else live)

    def spread(self, group: dist.ProcessGroup) -> None:
        """Collective: all ranks must call. Copy every rank's stretch of `live` to all, `SCRATCH_BYTES` at a time."""
        rank, world_size = rank_in(group), size_of(group)
        with all_or_none(group, SPREADING, left=STALE):
            first = self.live[0].tensor
            size = max(1, min(self.stretch, SCRATCH_BYTES // (first.element_size() * (world_size + 1))))
            sent, received = first.new_empty(size), first.new_empty(world_size * size)
        with traffic(group, SPREADING, STALE) as messages:
            for offset in range(0, self.stretch, size):
                length = min(size, self.stretch - offset)
                with messages.attempt():
                    for place, values in self._cover(rank, offset, length):
                        sent[place : place + values.numel()].copy_(values)
                messages.all_gather(lambda: sent, lambda: received)
                with messages.attempt():
                    for source in range(world_size):
                        for place, values in self._cover(source, offset, length) if source != rank else ():
                            values.copy_(received[source * size + place :][: values.numel()])

    def _cover(self, rank: int, offset: int, length: int) -> Iterator[tuple[int, Tensor]]:
        """The live views inside `[offset, offset + length)` of a rank's stretch, each with its place in there."""
        start = rank * self.stretch + offset
        stop = start + length
        index = max(0, bisect_right(self.live, start, key=lambda span: span.start) - 1)
        while index < len(self.live) and (span := self.live[index]).start < stop:
            low, high = max(start, span.start), min(stop, span.start + span.tensor.numel())
            if low < high:
                yield low - start, span.tensor[low - span.start : high - span.start]
            index += 1


def view(spans: list[Span], start: int, stop: int) -> Tensor:
    """Elements `[start, stop)` of a Run, which lie inside one Span; an empty view if there are none."""
    if start == stop:
        return spans[0].tensor[:0]
    span = spans[bisect_right(spans, start, key=lambda span: span.start) - 1]
    return span.tensor[start - span.start : stop - span.start]


def _numel(spans: list[Span]) -> int:
    return sum(span.tensor.numel() for span in spans)
