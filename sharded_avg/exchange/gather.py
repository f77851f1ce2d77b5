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

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UnsupportedModelError
from ..ranks import agree, comm_device, gather_objects, rank_in, send
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


@dataclass(frozen=True, slots=True)
class _Row:
    """What other ranks need to know of an Item."""

    name: str
    shape: tuple[int, ...]
    region: Region
    dtype: torch.dtype


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
    mine = [_Row(i.name, tuple(i.shape), i.region, i.values.dtype) for i in held]
    return gather_objects(group, mine)


def _owned(tables: list[list[_Row]]) -> list[tuple[int, _Row]]:
    """Each region once, with its lowest holder; the rows of one tensor stay together, in the order of first sight."""
    by_name: dict[str, dict[Region, tuple[int, _Row]]] = {}
    for rank, table in enumerate(tables):
        for row in table:
            by_name.setdefault(row.name, {}).setdefault(row.region, (rank, row))
    for name, regions in by_name.items():
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


def gather(
    group: dist.ProcessGroup | None, items: Sequence[Item], *, rank0_only: bool, device: torch.device | None
) -> dict[str, Tensor]:
    """Collective: all ranks must call. Full tensors by name, on rank 0 of the group or on all ranks; {} elsewhere.

    `device`: where the full tensors are put; `None` is where each piece lives. Beside the result, a rank holds at most
    one bucket (64 MiB) at a time. Raises `UnsupportedModelError` if the pieces do not cover a tensor.
    """
    owned = _owned(_tables(group, items))
    mine = {item.name: item for item in items}
    keeps = rank_in(group) == 0 or not rank0_only
    full, error = {}, None
    try:
        for _, row in owned if keeps else ():
            if row.name not in full:
                where = device if device is not None else mine[row.name].values.device
                full[row.name] = torch.empty(row.shape, dtype=row.dtype, device=where)
    except Exception as failure:  # out of memory here must not leave the others waiting
        error = failure
    agree(group, error, "allocating full tensors")
    for bucket in _buckets(owned):
        _move_bucket(group, bucket, mine, full, rank0_only)
    return full


def _move_bucket(
    group: dist.ProcessGroup | None,
    bucket: list[_Parcel],
    mine: dict[str, Item],
    full: dict[str, Tensor],
    rank0_only: bool,
) -> None:
    me = rank_in(group) if group is not None else 0
    by_owner: dict[int, list[_Parcel]] = {}
    for parcel in bucket:
        by_owner.setdefault(parcel.owner, []).append(parcel)
    for owner, parcels in sorted(by_owner.items()):
        if group is None or (owner == 0 and rank0_only):
            if me == owner and full:
                for parcel in parcels:
                    put(full[parcel.row.name], parcel.part, _values(mine, parcel))
            continue
        if rank0_only and me not in (0, owner):
            continue
        message = torch.empty(parcels[-1].start + parcels[-1].nbytes, dtype=torch.uint8, device=comm_device(group))
        if me == owner:
            for parcel in parcels:
                _window(message, parcel).copy_(_values(mine, parcel))
        send(message, group=group, src=owner, dst=0 if rank0_only else None)
        if full:
            for parcel in parcels:
                put(full[parcel.row.name], parcel.part, _window(message, parcel))


def _values(mine: dict[str, Item], parcel: _Parcel) -> Tensor:
    item = mine[parcel.row.name]
    return local_part(item.values, item.region, parcel.part)


def scatter(
    group: dist.ProcessGroup | None, items: Sequence[Item], full: dict[str, Tensor], *, rank0_only: bool
) -> None:
    """Collective: all ranks must call. Write full tensors back into every rank's pieces, from rank 0 or each its own.

    `full` holds every name of `items` where it is read; shapes must have been checked.
    """
    if group is None or not rank0_only:
        for item in items:
            if item.region.numel and full:
                item.values.copy_(take(full[item.name], item.region))
        return
    me = rank_in(group)
    mine = {item.name: item for item in items}
    tables = _tables(group, items)
    for rank, table in enumerate(tables):
        if me not in (0, rank):
            continue
        for bucket in _buckets((rank, row) for row in table):
            _return_bucket(group, bucket, mine, full, rank)


def _return_bucket(
    group: dist.ProcessGroup, bucket: list[_Parcel], mine: dict[str, Item], full: dict[str, Tensor], rank: int
) -> None:
    message = torch.empty(bucket[-1].start + bucket[-1].nbytes, dtype=torch.uint8, device=comm_device(group))
    if rank_in(group) == 0:
        for parcel in bucket:
            _window(message, parcel).copy_(take(full[parcel.row.name], parcel.part))
    if rank != 0:
        send(message, group=group, src=0, dst=rank)
    if rank_in(group) == rank:
        for parcel in bucket:
            _values(mine, parcel).copy_(_window(message, parcel))
