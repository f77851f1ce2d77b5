"""Whether ranks that should hold equal values do, before the values of one are spread over the others.

[Note: going back is exact because replicas are equal]
Where every rank has all of a parameter, each averages a part of it, and `publish` sends the parts to all: first of the
average, afterwards of the raw weights. No rank keeps the raw values of the other parts; they come back from whoever
has them. So replicas that differ, on purpose or by accident, would be one rank's for good. A pass over the weights and
one small exchange find that out before anything is written.

    replicas   what `AbstractLayout.replicas()` names: the tensors that `publish` overwrites
    digest     62 bits of the values of some tensors: equal bits give equal digests; a NaN equals itself
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors as _joined  # private, and older than DistributedDataParallel

from ...errors import ReplicaError
from ...ranks import Asked, all_or_none, decided
from ...ranks.together import Part
from ...tensors import chunk_numel
from .base import AbstractLayout

Named = Sequence[tuple[str, Tensor]]

_PRIME = (1 << 61) - 1
_MOST_NAMES = 5  # in an error
_INTEGERS = {1: torch.uint8, 2: torch.int16}  # by itemsize; wider ones are looked at as int32
_factors: dict[torch.device, Tensor] = {}  # odd, so that no bit of an element is lost; another one for each place


@contextmanager
def equal_replicas(
    layout: AbstractLayout, doing: str, but: Container[str] = (), asked: Asked | None = None
) -> Iterator[Part]:
    """Collective: all ranks must call. As `all_or_none`; where `layout` publishes, replicas are compared, too.

    Raises `ReplicaError` on all ranks if replicas differ, other than those in `but`.
    """
    with all_or_none(layout.group, doing, asked) as part:
        yield part
    names = differing_replicas(layout, doing, but)
    if names:
        shown = ", ".join(map(repr, names[:_MOST_NAMES])) + (", ..." if len(names) > _MOST_NAMES else "")
        raise ReplicaError(
            f"{doing}: {len(names)} parameter(s) that {dist.get_world_size(layout.group)} ranks hold together differ "
            f"from rank to rank ({shown}), and each rank would end up with the values of another. Nothing was changed. "
            "If they should be equal, find out why not (a step under no_sync(), a parameter that the wrapper does not "
            "know of, weights loaded on one rank) and broadcast them from one rank. If they should differ, tell the "
            "wrapper to ignore them, leave them out with include=, or build the average from the module inside the "
            "wrapper: each rank then keeps its own, whole"
        )


@torch.no_grad()
def differing_replicas(
    layout: AbstractLayout, doing: str = "comparing replicas", but: Container[str] = ()
) -> list[str]:
    """Collective: all ranks must call. Names of the replicas that are not equal, bit for bit, on all ranks.

    Those in `but` are not looked at. After a swap that ended without some ranks, replicas are known to differ, and what
    their owners have is right: then none is named.
    """
    if not layout.publishes:
        return []
    replicas: list[tuple[str, Tensor]] = []

    own_set, _ = layout.replica_set

    def look() -> _Look:
        replicas.extend((name, tensor) for name, tensor in layout.replicas() if name not in but)
        values = digest([tensor for _, tensor in replicas])
        return _Look(layout.has_stale_replicas, own_set, _cut_of(replicas), values)

    def are_equal(looks: list[_Look]) -> bool:
        if any(look.is_stale for look in looks):
            return True
        if len({(look.own_set, look.cut) for look in looks}) > len({look.own_set for look in looks}):
            raise ReplicaError(
                f"{doing}: ranks that hold the model together average other parameters, or parameters of other sizes "
                f"or memory formats: on one of them it is {len(replicas)} tensors with "
                f"{sum(tensor.numel() for _, tensor in replicas)} elements. Nothing was changed. Give all ranks the "
                "same model, the same `include` and the same parameters to train"
            )
        return len({(look.own_set, look.values) for look in looks}) == len({look.own_set for look in looks})

    if decided(layout.group, look, are_equal, doing):
        return []

    def name_them(each: list[tuple[int, list[int]]]) -> list[str]:
        sets = {own_set for own_set, _ in each}
        columns = zip(*([(own_set, value) for value in values] for own_set, values in each), strict=True)
        pairs = zip(replicas, columns, strict=True)
        return list(dict.fromkeys(name for (name, _), column in pairs if len(set(column)) > len(sets)))

    return decided(layout.group, lambda: (own_set, [digest([t]) for _, t in replicas]), name_them, doing)


class _Look(NamedTuple):
    """What a rank says of its replicas, which are compared inside each set of ranks that publishes."""

    is_stale: bool
    own_set: int
    cut: int
    values: int


def _cut_of(replicas: Named) -> int:
    """A digest of names, sizes and memory formats: ranks that differ in these would not understand each other."""
    sizes = array("q", [2 * tensor.numel() + tensor.is_contiguous() for _, tensor in replicas])
    return zlib.crc32(sizes.tobytes(), zlib.crc32("\0".join(name for name, _ in replicas).encode()))


def digest(tensors: Sequence[Tensor]) -> int:
    """Of the values of tensors, in their order and in row-major order, whatever their dtypes and devices."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    total = 1
    for (device, _), alike in kinds.items():
        factors, sums = _factors_on(device), []
        for piece in _pieces(alike, factors.numel() // 4):  # a complex128 is four int32
            real = torch.view_as_real(piece).view(-1) if piece.is_complex() else piece
            # Each line can be undone, so no bit of an element is lost; none is linear together with the next, so
            # values that changed places are noticed, also round ones, whose low bits are zero.
            mixed = real.view(_INTEGERS.get(real.element_size(), torch.int32)).to(torch.int32)
            mixed = mixed ^ (mixed >> 15)
            mixed *= factors[: mixed.numel()]
            mixed ^= mixed >> 15
            sums.append(mixed.sum())
        for part in torch.stack(sums).tolist():  # the only wait for the device
            total = (total * 1_000_003 + part) % _PRIME
    return total


def _pieces(tensors: Sequence[Tensor], limit: int) -> Iterator[Tensor]:
    """All elements in 1-D pieces of at most `limit`; small tensors are copied together."""
    batch: list[Tensor] = []
    room = limit
    for tensor in tensors:
        numel = tensor.numel()
        if numel > room and batch:
            yield _joined(batch)  # type: ignore[no-untyped-call]
            batch, room = [], limit
        if numel > limit:
            flat = tensor.detach().reshape(-1)
            yield from (flat[start : start + limit] for start in range(0, numel, limit))
        else:
            batch.append(tensor)
            room -= numel
    if batch:
        yield _joined(batch)  # type: ignore[no-untyped-call]


def _factors_on(device: torch.device) -> Tensor:
    if device not in _factors:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(-(1 << 30), 1 << 30, (chunk_numel(device),), generator=generator, dtype=torch.int32)
        _factors[device] = (2 * drawn + 1).to(device)
    return _factors[device]
