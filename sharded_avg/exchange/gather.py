"""Full tensors from pieces, a bucket at a time, on whatever ranks want them.

    Item    one rank's piece of one named tensor: a region and the local values
    Parcel  a region of at most one bucket, the rank that owns it, and its place in that bucket
    bucket  parcels of at most 64 MiB together; what one rank owns of a bucket travels as one message

All ranks exchange their tables of regions first, and then follow the same list of buckets; which engine cut the tensor
does not matter here. Where ranks hold equal regions (replicas), the lowest rank owns it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UnsupportedModelError
from ..ranks import Traffic, all_or_none, collective, comm_device, gather_objects, rank_in, traffic
from ..shard import Box, Region, put, take

BUCKET_BYTES = 64 << 20
_ALIGN_BYTES = 16


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """This rank's piece of one tensor: `values` is shaped like the region."""

    name: str
    shape: torch.Size
    region: Region
    values: Tensor
    kind: str = ""  # the same on all ranks that have a piece of this tensor


@dataclass(frozen=True, slots=True)
class _Row:
    """What other ranks need to know of an Item."""

    name: str
    shape: tuple[int, ...]
    region: Region
    dtype: torch.dtype
    kind: str


@dataclass(frozen=True, slots=True)
class _Parcel:
    row: _Row
    part: Region  # of the full tensor
    owner: int  # group rank
    start: int  # bytes from the start of the owner's message
    nbytes: int


def split_region(region: Region, limit: int) -> Iterator[Region]:
    """Cut a region into regions of at most `limit` elements."""
    if region.numel <= limit:
        if region.numel:
            yield region
    elif not isinstance(region, Box):
        for start in range(region.start, region.stop, limit):
            yield replace(region, start=start, stop=min(start + limit, region.stop))
    else:
        dim = next(d for d, length in enumerate(region.lengths) if length > 1)
        half = region.lengths[dim] // 2
        for offset, length in ((0, half), (half, region.lengths[dim] - half)):
            offsets, lengths = list(region.offsets), list(region.lengths)
            offsets[dim] += offset
            lengths[dim] = length
            yield from split_region(Box(tuple(offsets), tuple(lengths)), limit)


def local_part(values: Tensor, region: Region, part: Region) -> Tensor:
    """The elements of `part` (inside `region`) among the `values` of `region`."""
    if isinstance(region, Box) and isinstance(part, Box):
        inner = tuple(a - b for a, b in zip(part.offsets, region.offsets, strict=True))
        return take(values, Box(inner, part.lengths))
    if isinstance(region, Box) or isinstance(part, Box) or type(region) is not type(part):
        raise TypeError(f"a part of {region} must be of its kind, not {part}")
    return values[part.start - region.start : part.stop - region.start]


def _tables(group: dist.ProcessGroup | None, items: Sequence[Item]) -> list[list[_Row]]:
    # A tensor without elements is whole on every rank: nothing moves, but its key belongs into the result.
    held = [item for item in items if item.region.numel or not item.shape.numel()]
    mine = [_Row(i.name, tuple(i.shape), i.region, i.values.dtype, i.kind) for i in held]
    return gather_objects(group, mine)


def _owned(tables: list[list[_Row]]) -> list[tuple[int, _Row]]:
    """Each region once, with its lowest holder; the rows of one tensor stay together, in the order of first sight."""
    by_name: dict[str, dict[Region, tuple[int, _Row]]] = {}
    for rank, table in enumerate(tables):
        for row in table:
            by_name.setdefault(row.name, {}).setdefault(row.region, (rank, row))
    for name, regions in by_name.items():
        kinds = {(row.shape, row.dtype, row.kind) for _, row in regions.values()}
        if len(kinds) > 1:
            raise UnsupportedModelError(
                f"ranks have different things under the name {name!r}: {sorted(map(str, kinds))}. Nothing was "
                "gathered. Give all ranks the same model, the same `include` and the same parameters to train"
            )
        covered = sum(region.numel for region in regions)
        numel = torch.Size(next(iter(regions.values()))[1].shape).numel()
        if covered != numel:
            raise UnsupportedModelError(
                f"the pieces of {name!r} on all ranks have {covered} elements together, but the tensor has {numel}: "
                "ranks disagree about how the model is cut. Is every rank of the model's process group in this call?"
            )
    return [owned for regions in by_name.values() for owned in regions.values()]


def _buckets(owned: Iterable[tuple[int, _Row]]) -> Iterator[list[_Parcel]]:
    bucket: list[_Parcel] = []
    filled: dict[int, int] = {}  # owner -> bytes
    total = 0
    for owner, row in owned:
        for part in split_region(row.region, BUCKET_BYTES // row.dtype.itemsize):
            nbytes, start = part.numel * row.dtype.itemsize, filled.get(owner, 0)
            if total + nbytes > BUCKET_BYTES:
                yield bucket
                bucket, filled, total, start = [], {}, 0, 0
            bucket.append(_Parcel(row, part, owner, start, nbytes))
            filled[owner] = -(-(start + nbytes) // _ALIGN_BYTES) * _ALIGN_BYTES
            total += filled[owner] - start
    if bucket:
        yield bucket


def _window(message: Tensor, parcel: _Parcel) -> Tensor:
    shape = parcel.part.lengths if isinstance(parcel.part, Box) else (parcel.part.numel,)
    return message[parcel.start : parcel.start + parcel.nbytes].view(parcel.row.dtype).view(shape)


@collective
def gather(
    group: dist.ProcessGroup | None, items: Sequence[Item], *, rank0_only: bool, device: torch.device | None
) -> dict[str, Tensor]:
    """Collective: all ranks must call. Full tensors by name, on rank 0 of the group or on all ranks; {} elsewhere.

    `device`: where the full tensors are put; `None` is where each piece lives. Beside the result, a rank holds at most
    one bucket (64 MiB) at a time. Raises `UnsupportedModelError` if the pieces do not cover a tensor.
    """
    doing = "gathering full tensors"
    tables = _tables(group, items)
    with all_or_none(group, doing):
        buckets = list(_buckets(_owned(tables)))
        mine = {item.name: item for item in items}
        full: dict[str, Tensor] = {}
        if rank_in(group) == 0 or not rank0_only:
            for row in (row for table in tables for row in table):
                if row.name not in full:
                    where = device if device is not None else mine[row.name].values.device
                    full[row.name] = torch.empty(row.shape, dtype=row.dtype, device=where)
        room = _room(group, (messages for bucket in buckets for messages in _messages(bucket).values()))
    with traffic(group, doing) as messages:
        for bucket in buckets:
            _move_bucket(messages, bucket, mine, full, rank0_only, room)
    return full


def _messages(bucket: Iterable[_Parcel]) -> dict[int, list[_Parcel]]:
    """What each owner sends of a bucket, in rank order."""
    by_owner: dict[int, list[_Parcel]] = {}
    for parcel in bucket:
        by_owner.setdefault(parcel.owner, []).append(parcel)
    return dict(sorted(by_owner.items()))


def _nbytes(parcels: Sequence[_Parcel]) -> int:
    return parcels[-1].start + parcels[-1].nbytes


def _message(room: Tensor, parcels: Sequence[_Parcel]) -> Tensor:
    return room[: _nbytes(parcels)]


def _room(group: dist.ProcessGroup | None, messages: Iterable[Sequence[_Parcel]]) -> Tensor:
    """Memory for the longest of these messages."""
    return torch.empty(max(map(_nbytes, messages), default=0), dtype=torch.uint8, device=comm_device(group))


def _move_bucket(
    messages: Traffic,
    bucket: list[_Parcel],
    mine: dict[str, Item],
    full: dict[str, Tensor],
    rank0_only: bool,
    room: Tensor,
) -> None:
    group = messages.group
    me = rank_in(group) if group is not None else 0
    for owner, parcels in _messages(bucket).items():
        if group is None or (owner == 0 and rank0_only):
            with messages.attempt():
                if me == owner and full:
                    for parcel in parcels:
                        put(full[parcel.row.name], parcel.part, _values(mine, parcel))
            continue
        if rank0_only and me not in (0, owner):
            continue
        with messages.attempt():
            if me == owner:
                for parcel in parcels:
                    _window(room, parcel).copy_(_values(mine, parcel))
        messages.send(partial(_message, room, parcels), src=owner, dst=0 if rank0_only else None)
        with messages.attempt():
            if full:
                for parcel in parcels:
                    put(full[parcel.row.name], parcel.part, _window(room, parcel))


def _values(mine: dict[str, Item], parcel: _Parcel) -> Tensor:
    item = mine[parcel.row.name]
    return local_part(item.values, item.region, parcel.part)


@collective
def scatter(
    group: dist.ProcessGroup | None, items: Sequence[Item], full: dict[str, Tensor], *, rank0_only: bool
) -> None:
    """Collective: all ranks must call. Write full tensors back into every rank's pieces, from rank 0 or each its own.

    `full` holds every name of `items` where it is read; what they are must have been checked.
    """
    doing, left = "writing edited averages back", "The average may hold a part of the edits: load() a saved one"
    if group is None or not rank0_only:
        with all_or_none(group, doing, left=left):
            for item in items:
                if item.region.numel and full:
                    item.values.copy_(take(full[item.name], item.region))
        return
    me = rank_in(group)
    tables = _tables(group, items)
    with all_or_none(group, doing):
        mine = {item.name: item for item in items}
        buckets = [
            (rank, bucket)
            for rank, table in enumerate(tables)
            if me in (0, rank)
            for bucket in _buckets((rank, row) for row in table)
        ]
        room = _room(group, (bucket for _, bucket in buckets))
    with traffic(group, doing, left) as messages:
        for rank, bucket in buckets:
            with messages.attempt():
                if me == 0:
                    for parcel in bucket:
                        _window(room, parcel).copy_(take(full[parcel.row.name], parcel.part))
            messages.send(partial(_message, room, bucket), src=0, dst=rank)
            with messages.attempt():
                if me == rank and messages.error is None:
                    for parcel in bucket:
                        _values(mine, parcel).copy_(_window(room, parcel))
