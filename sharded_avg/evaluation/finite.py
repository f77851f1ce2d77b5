"""Whether values are finite on every rank: a decision that all ranks take alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from ..averages.state import State
from ..ranks import collective, decided

_NARROW = 1  # bytes an element: 8-bit floats, which torch has no norms for
_CHUNK_NUMEL = 1 << 20


@collective
@torch.no_grad()
def live_is_finite(state: State) -> bool:
    """Collective: all ranks must call. See `ShardedAverage.live_is_finite`."""

    def look() -> bool:
        state.members.refresh()
        return _finite_here(shard.tensor for shard in state.members.averaged)

    return decided(state.group, look, all, "looking for NaN and infinity in the live weights")


@collective
@torch.no_grad()
def all_finite(tensors: Iterable[Tensor], group: dist.ProcessGroup | None) -> bool:
    """Collective: all ranks must call. Whether no rank's `tensors` hold a NaN or an infinity.

    Ranks may bring different tensors, or none; empty ones and integers are finite. One pass over local memory without
    a copy of it, one number from each device to the host, and one word to the other ranks. If a rank cannot look at its
    tensors it raises why, and the others raise `PeerError`.
    """
    return decided(group, lambda: _finite_here(tensors), all, "looking for NaN and infinity")


def _finite_here(tensors: Iterable[Tensor]) -> bool:
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex()):
            real = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
            groups.setdefault((real.device, real.dtype), []).append(real)
    largest: dict[torch.device, list[Tensor]] = {}
    for (device, _), members in groups.items():
        largest.setdefault(device, []).extend(_largest(members))
    # A NaN or an infinity is the largest of everything it is compared with, so one number a device tells.
    flags = [torch.stack(values).isfinite().all() for values in largest.values()]
    return all(map(bool, flags))


def _largest(tensors: list[Tensor]) -> Iterator[Tensor]:
    """The largest magnitude of each tensor, as float64 scalars: NaN where there is a NaN."""
    if tensors[0].element_size() == _NARROW:
        for flat in (tensor.reshape(-1) for tensor in tensors):
            for start in range(0, flat.numel(), _CHUNK_NUMEL):
                yield flat[start : start + _CHUNK_NUMEL].float().abs().amax().double()
    else:
        yield from (norm.double() for norm in torch._foreach_norm(tensors, float("inf")))
