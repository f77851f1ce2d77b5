"""One pass over memory: how aligned tensors are grouped before elementwise work.

A Row is a tuple of tensors of one shape that are worked on together, for example (live, average) or (live, first
average, second average). Rows are

    flattened   to 1-D in memory order, where all tensors of the row are dense with the same strides
    coalesced   with the next row, where each tensor continues the memory of its neighbour (FlatParameters, ZeRO
                partitions): thousands of parameters become a few calls
    split       into pieces of a bounded number of elements, so that a scratch buffer is small and stays in cache

Grouping happens once; the work itself allocates nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import compress
from operator import add, and_, attrgetter, eq

import torch
from torch import Tensor

Row = tuple[Tensor, ...]


def is_dtensor(tensor: object) -> bool:
    """Whether it is a DTensor; does not import torch.distributed.tensor, which takes seconds, to find out."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a stretch of memory without gaps or overlap, in any order of dims."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether several elements are one place in memory: after `expand`, say, or in sliding windows."""
    if tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:  # perhaps; dims that interleave need not meet
            return len(set(_offsets(tensor).tolist())) < tensor.numel()
        reach += stride * (size - 1)
    return False


def overlapping(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """Two tensors that share a part of their memory but not all of it, if there are any; neither overlaps itself."""
    storages = [tensor.untyped_storage().data_ptr() for tensor in tensors]
    if len(set(storages)) == len(storages):
        return None
    spans: dict[int, list[tuple[int, int, int]]] = {}  # by storage: first byte, last byte, index
    for index, (storage, tensor) in enumerate(zip(storages, tensors, strict=True)):
        if tensor.numel():
            start, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes - 1
            if not tensor.is_contiguous():
                reach = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
                last = start + (reach + 1) * tensor.element_size() - 1
            spans.setdefault(storage, []).append((start, last, index))
    for together in spans.values():
        together.sort()
        furthest = together[0]
        for span in together[1:]:
            if span[0] <= furthest[1]:
                left, right = tensors[furthest[2]], tensors[span[2]]
                same = span[0] == furthest[0] and left.stride() == right.stride() and left.shape == right.shape
                if not same and bool(torch.isin(_bytes(left), _bytes(right)).any()):
                    return furthest[2], span[2]
            furthest = max(furthest, span, key=lambda one: one[1])
    return None


def _offsets(tensor: Tensor) -> Tensor:
    """Where each element lies, counted in elements from the first."""
    offsets = torch.zeros((), dtype=torch.int64)
    for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
        offsets = offsets.unsqueeze(-1) + torch.arange(size) * stride
    return offsets.flatten()


def _bytes(tensor: Tensor) -> Tensor:
    """The address of each element; of any two of different size, the smaller decides."""
    return tensor.data_ptr() + _offsets(tensor) * tensor.element_size()


def flatten(row: Row) -> Row:
    """The same elements as 1-D views in memory order, or the row itself if its tensors are laid out differently."""
    first = row[0]
    if all(map(Tensor.is_contiguous, row)):
        return row if first.ndim == 1 else tuple([tensor.view(-1) for tensor in row])
    strides = {tuple(s for s, n in zip(t.stride(), t.shape, strict=True) if n != 1) for t in row}
    if len(strides) != 1 or not is_dense(first):
        return row
    return tuple(t.as_strided((t.numel(),), (1,)) for t in row)


def _continues(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of which one ends where the other starts can be one."""
    return (
        left.ndim == right.ndim == 1
        and left.dtype == right.dtype
        and left.device == right.device
        and left.is_contiguous()
        and right.is_contiguous()
        and left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
    )


def coalesce(rows: Sequence[Row]) -> list[Row]:
    """Join neighbouring rows whose tensors all lie one after the other in memory; empty rows vanish."""
    flat = _flattened(rows)
    touching = _touching(flat)
    if not any(touching):  # as most often where rows are many
        return flat
    groups: list[list[Row]] = []
    for index, (row, touches) in enumerate(zip(flat, touching, strict=True)):
        if touches and all(_continues(a, b) for a, b in zip(flat[index - 1], row, strict=True)):
            groups[-1].append(row)
        else:
            groups.append([row])
    joined = []
    for group in groups:
        if len(group) > 1:
            numel = sum(row[0].numel() for row in group)
            group[0] = tuple(t.as_strided((numel,), (1,)) for t in group[0])
        joined.append(group[0])
    return joined


# The next two go through columns, in loops that run in C: rows may be thousands, each of a few elements.


def _flattened(rows: Sequence[Row]) -> list[Row]:
    """`flatten` of each, without the empty ones."""
    if not rows:
        return []
    first, *others = zip(*rows, strict=True)
    full = compress(rows, map(Tensor.numel, first))
    if not all(all(map(Tensor.is_contiguous, column)) for column in (first, *others)):
        return list(map(flatten, full))
    dims = compress(map(Tensor.dim, first), map(Tensor.numel, first))
    return [
        row if dim == 1 else tuple([tensor.view(-1) for tensor in row]) for row, dim in zip(full, dims, strict=True)
    ]


def _touching(rows: Sequence[Row]) -> list[bool]:
    """Of each row, whether its tensors begin where those of the row before it end."""
    touching = [index > 0 for index in range(len(rows))]
    for column in zip(*rows, strict=True):
        starts = list(map(Tensor.data_ptr, column))
        ends = map(add, starts, map(attrgetter("nbytes"), column))
        touching[1:] = map(and_, touching[1:], map(eq, starts[1:], ends))
        if not any(touching):
            break
    return touching


def split(row: Row, limit: int) -> Iterator[Row]:
    """Cut a row into rows of at most `limit` elements, along its first dims."""
    first = row[0]
    if first.numel() <= limit:
        yield row
    elif first.ndim == 1:
        for start in range(0, first.numel(), limit):
            yield tuple(t[start : start + limit] for t in row)
    else:
        for parts in zip(*(t.unbind(0) for t in row), strict=True):
            yield from split(parts, limit)


def pack(rows: Sequence[Row], limit: int) -> Iterator[list[Row]]:
    """Group rows into lists of at most `limit` elements together, cutting long rows."""
    batch: list[Row] = []
    size = 0
    for whole, whole_numel in zip(rows, [row[0].numel() for row in rows], strict=True):
        for row in (whole,) if whole_numel <= limit else split(whole, limit):
            numel = whole_numel if row is whole else row[0].numel()
            if size + numel > limit:
                yield batch
                batch, size = [], 0
            batch.append(row)
            size += numel
    if batch:
        yield batch


def chunk_numel(device: torch.device) -> int:
    """Elements that one piece of chunked work should have: 1 MiB of fp32 stays in a core's cache, 16 MiB in a GPU's."""
    return 1 << 18 if device.type == "cpu" else 1 << 22
