"""What one rank holds.

A Shard is a live local tensor plus the Region of the full tensor that it fills. Layouts make Shards; stores, swaps
and checkpoints use them and never ask which layout did.

    Box       n-D rectangle of the full tensor           DTensor: FSDP2, TP, HSDP; whole tensors
    Interval  [start, stop) of the row-major flattening  FSDP1, ZeRO 1/2/3, partitioned DDP
    Stretch   an Interval of what slices along one dim   DeepSpeed's AutoTP with ZeRO
              leave of the full tensor

Any may be empty: a rank that holds nothing of a parameter still has a Shard for it, so that every rank knows every
name and takes the same decisions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Box:
    """An n-D rectangle of a full tensor: `offsets[d] <= index[d] < offsets[d] + lengths[d]`."""

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def whole(cls, shape: torch.Size | tuple[int, ...]) -> Box:
        """The Box that covers a full tensor of `shape`."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        return prod(self.lengths)


@dataclass(frozen=True, slots=True)
class Interval:
    """Elements `start <= i < stop` of the row-major flattening of a full tensor."""

    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Stretch:
    """Elements `start <= i < stop` of the row-major flattening of slices of a full tensor, side by side along `dim`.

    Slices are (offset, length) along `dim`, in the order in which the cut tensor has them.
    """

    dim: int
    slices: tuple[tuple[int, int], ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start

    def cut_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what the slices leave of a full tensor of `shape`."""
        return (*shape[: self.dim], sum(length for _, length in self.slices), *shape[self.dim + 1 :])


Region = Box | Interval | Stretch


@dataclass(frozen=True, slots=True)
class Patch:
    """A Box and where its elements lie in the local tensor: all of it, or `[start, stop)` of a 1-D one."""

    box: Box
    start: int
    stop: int


def boxes_of_interval(interval: Interval, shape: tuple[int, ...]) -> Iterator[Patch]:
    """Cut an Interval of a row-major tensor of `shape` (n-D) into at most 2n-1 Boxes, in memory order."""
    for box, start, stop in _cut(interval.start, interval.stop, tuple(shape)):
        yield Patch(box, start - interval.start, stop - interval.start)


def _cut(start: int, stop: int, shape: tuple[int, ...]) -> Iterator[tuple[Box, int, int]]:
    if start >= stop:
        return
    if not shape:
        yield Box((), ()), start, stop
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows are [first, last)
    if first > last:  # begins and ends inside one row
        yield from _inside_row(last, start, stop, shape)
        return
    yield from _inside_row(first - 1, start, first * row, shape)
    if first < last:
        yield Box((first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:])), first * row, last * row
    yield from _inside_row(last, last * row, stop, shape)


def _inside_row(index: int, start: int, stop: int, shape: tuple[int, ...]) -> Iterator[tuple[Box, int, int]]:
    base = index * prod(shape[1:])
    for box, a, b in _cut(start - base, stop - base, shape[1:]):
        yield Box((index, *box.offsets), (1, *box.lengths)), a + base, b + base


def _patches_of_stretch(stretch: Stretch, shape: tuple[int, ...]) -> Iterator[Patch]:
    for patch in boxes_of_interval(Interval(stretch.start, stretch.stop), stretch.cut_shape(shape)):
        yield from _moved_to_slices(patch, stretch)


def _moved_to_slices(patch: Patch, stretch: Stretch) -> Iterator[Patch]:
    """A Patch of the cut tensor as Patches of the full one: each lies in one slice, and in one piece in memory."""
    dim, (offsets, lengths) = stretch.dim, (patch.box.offsets, patch.box.lengths)
    begin, end, place = offsets[dim], offsets[dim] + lengths[dim], 0
    found = []
    for offset, length in stretch.slices:
        low, high = max(begin, place), min(end, place + length)
        if low < high:
            found.append((low, high, offset + low - place))
        place += length
    outer = next((d for d in range(dim) if lengths[d] > 1), None)
    if len(found) > 1 and outer is not None:  # rows that are apart in memory if each is cut into slices
        rows, size = lengths[outer], (patch.stop - patch.start) // lengths[outer]
        for row in range(rows):
            box = Box(
                (*offsets[:outer], offsets[outer] + row, *offsets[outer + 1 :]),
                (*lengths[:outer], 1, *lengths[outer + 1 :]),
            )
            start = patch.start + row * size
            yield from _moved_to_slices(Patch(box, start, start + size), stretch)
        return
    size = (patch.stop - patch.start) // (end - begin)
    for low, high, offset in found:
        box = Box((*offsets[:dim], offset, *offsets[dim + 1 :]), (*lengths[:dim], high - low, *lengths[dim + 1 :]))
        yield Patch(box, patch.start + (low - begin) * size, patch.start + (high - begin) * size)


def patches(region: Region, shape: tuple[int, ...]) -> list[Patch]:
    """The Boxes of a region, each with its place in the local tensor; none for an empty region."""
    if region.numel == 0:
        return []
    if isinstance(region, Box):
        return [Patch(region, 0, region.numel)]
    if isinstance(region, Stretch):
        return list(_patches_of_stretch(region, tuple(shape)))
    return list(boxes_of_interval(region, tuple(shape)))


def take(full: Tensor, region: Region) -> Tensor:
    """The elements of `full` in `region`: a view of `full` for a Box, 1-D for others.

    A copy for an Interval if `full` is not contiguous, and for a Stretch.
    """
    if isinstance(region, Interval):
        return full.reshape(-1)[region.start : region.stop]
    if isinstance(region, Stretch):
        boxes = patches(region, tuple(full.shape))
        return torch.cat([take(full, patch.box).reshape(-1) for patch in boxes]) if boxes else full.new_empty(0)
    for dim, (offset, length) in enumerate(zip(region.offsets, region.lengths, strict=True)):
        full = full.narrow(dim, offset, length)
    return full


def put(full: Tensor, region: Region, values: Tensor) -> None:
    """Write `values` (shaped like the region) into `full`, which must be contiguous."""
    if isinstance(region, Stretch):
        for patch in patches(region, tuple(full.shape)):
            take(full, patch.box).copy_(values[patch.start : patch.stop].view(patch.box.lengths))
    elif region.numel:
        target = full.view(-1)[region.start : region.stop] if isinstance(region, Interval) else take(full, region)
        target.copy_(values)


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """One rank's live piece of one parameter or buffer.

    `tensor` holds the values that are averaged: shaped like `region.lengths` for a Box, 1-D otherwise.
    `working` is set where forward computes with another, low-precision copy of the same elements (ZeRO: `tensor` is
    the fp32 master partition, `working` the bf16 one); it has the shape of `tensor`.
    """

    name: str  # fully qualified, without wrapper prefixes; the first name of a tied parameter
    shape: torch.Size  # of the full tensor
    region: Region
    tensor: Tensor
    working: Tensor | None = None
    trainable: bool = True  # the parameter requires grad
    is_buffer: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes with or keeps for this parameter."""
        return self.tensor.dtype if self.working is None else self.working.dtype

    @property
    def target(self) -> Tensor:
        """The tensor that forward reads."""
        return self.tensor if self.working is None else self.working

    def stand_in(self) -> Tensor:
        """A meta tensor with the full shape, the dtype and `requires_grad`: the same on every rank."""
        meta = torch.empty(self.shape, dtype=self.dtype, device="meta")
        return meta.requires_grad_(self.trainable) if self.trainable else meta
