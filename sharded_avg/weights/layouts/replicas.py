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

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors as _joined  # private, and older than DistributedDataParallel

from ...errors import PeerError, ReplicaError
from ...ranks import agree, comm_device
from ...tensors import chunk_numel
from .base import AbstractLayout

Named = Sequence[tuple[str, Tensor]]

_PRIME = (1 << 61) - 1
_MOST_NAMES = 5  # in an error
_INTEGERS = {1: torch.uint8, 2: torch.int16}  # by itemsize; wider ones are looked at as int32
_factors: dict[torch.device, Tensor] = {}  # odd, so that no bit of an element is lost; another one for each place


@contextmanager
def equal_replicas(layout: AbstractLayout, doing: str, but: Container[str] = ()) -> Iterator[None]:
    """Collective: all ranks must call. The body prepares, locally; then all ranks go on, or none.

    Raises what the body raised, `PeerError` on the other ranks, and `ReplicaError` on all ranks if replicas differ,
    other than those in `but`.
    """
    error: BaseException | None = None
    try:
        yield
    except BaseException as failure:
        error = failure
    if not layout.publishes:
        agree(layout.group, error, doing)
        return
    names = differing_replicas(layout, error, doing, but)
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
    layout: AbstractLayout,
    error: BaseException | None = None,
    doing: str = "comparing replicas",
    but: Container[str] = (),
) -> list[str]:
    """Collective: all ranks must call. Names of the replicas that are not equal, bit for bit, on all ranks.

    Those in `but` are not looked at. After a swap that ended without some ranks, replicas are known to differ, and what
    their owners have is right: then none is named. An `error` of this rank is raised, and `PeerError` elsewhere.
    """
    if not layout.publishes:
        agree(layout.group, error, doing)
        return []
    replicas: Named = []
    cut = values = 0
    try:
        if error is None:
            replicas = [(name, tensor) for name, tensor in layout.replicas() if name not in but]
            cut, values = _cut_of(replicas), digest([tensor for _, tensor in replicas])
    except BaseException as failure:
        error = failure
    failed, stale, *apart = _spread(layout, [error is not None, layout.has_stale_replicas, cut, values])
    if error is not None:
        raise error
    if failed[0]:
        raise PeerError(f"another rank failed while {doing}; the cause is in the traceback of that rank")
    if stale[0] or not any(low != high for high, low in apart):
        return []
    if apart[0][0] != apart[0][1]:
        raise ReplicaError(
            f"{doing}: ranks that hold the model together average other parameters, or parameters of other sizes or "
            "memory formats: here it is "
            f"{len(replicas)} tensors with {sum(tensor.numel() for _, tensor in replicas)} elements. Nothing was "
            "changed. Give all ranks the same model, the same `include` and the same parameters to train"
        )
    each = _spread(layout, [digest([tensor]) for _, tensor in replicas])
    return list(dict.fromkeys(n for (n, _), (high, low) in zip(replicas, each, strict=True) if high != low))


def _spread(layout: AbstractLayout, values: Sequence[int]) -> list[tuple[int, int]]:
    """Collective: all ranks must call. The largest and the smallest of each value over the ranks; one small message.

    Where several sets of ranks publish, each among itself, those of the set in which the value differs most.
    """
    mine, num_sets = layout.replica_set
    both = torch.full((num_sets, 2, len(values)), torch.iinfo(torch.int64).min, dtype=torch.int64)
    both[mine] = torch.tensor([values, [-value for value in values]], dtype=torch.int64)
    both = both.to(comm_device(layout.group))
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=layout.group)
    of_sets = [[(high, -low) for high, low in zip(*each, strict=True)] for each in both.tolist()]
    return [max(pairs, key=lambda pair: (pair[0] - pair[1], pair)) for pairs in zip(*of_sets, strict=True)]


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
