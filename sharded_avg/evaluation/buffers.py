"""Buffers while a block lasts: the mean over the ranks of what each rank has of its own. Leaving is local."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..ranks import (
    all_or_none,
    comm_device,
    everyone,
    gather_objects,
    interruptible,
    size_of,
    traffic,
    uninterrupted,
)
from ..tensors import is_dtensor
from ..weights import names
from ..weights.buffers import left_live
from .kept import Kept, is_writable, require_module

_BUCKET_NUMEL = 8 << 20  # 64 MiB of float64


@contextmanager
def averaged_buffers(model: nn.Module, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Collective: all ranks must call. Inside, floating-point buffers are their mean over the ranks of `group`.

    For buffers that each rank has of its own, such as BatchNorm statistics. Persistent buffers are summed in float64
    and rounded once to their own dtype; integers, non-persistent buffers, DTensors and state of torch's own modules
    whose mean means nothing (docs/guide.md) stay as they are. Each rank's own values are back bit for bit on leaving,
    which is local: a rank that leaves by an exception waits for no other.

    Args:
        model: a plain module, one that DDP or FSDP wraps, or a DeepSpeedEngine.
        group: the ranks to average over; by default all ranks of the job.

    Raises `UnsupportedModelError` if ranks have different buffers, and `PeerError` if another rank failed; everything
    is as before then. While it is entered it needs 8 bytes an element, beside the values that it keeps.
    """
    group, doing, kept = everyone(group), "averaging buffers over the ranks", Kept()
    with uninterrupted():
        try:
            with all_or_none(group, doing):
                require_module(model)
                unique, _ = names.split_ties([entry for entry in names.entries(model) if entry.is_buffer])
                left = left_live(model)
                entries = [entry for entry in unique if entry.name not in left and _can_be_averaged(entry.tensor)]
                for entry in entries:
                    kept.buffer(entry.slot, entry.key)
                live = [entry.tensor.detach() for entry in entries]
                sums = _laid_end_to_end(live, group)
            mine = [(e.name, tuple(e.tensor.shape), e.tensor.dtype) for e in entries]
            tables = gather_objects(group, mine, doing)
            with all_or_none(group, doing):
                _refuse_differences(tables)
            if size_of(group) > 1:
                with traffic(group, doing) as messages:
                    for start in range(0, sums.numel(), _BUCKET_NUMEL):
                        messages.all_reduce(partial(_bucket, sums, start))
            with all_or_none(group, doing):
                _write_means(live, sums, group)
                kept.no_sync(model)
            del sums
            with interruptible():
                yield
        finally:
            kept.put_back()


def _bucket(sums: Tensor, start: int) -> Tensor:
    return sums[start : start + _BUCKET_NUMEL]


def _can_be_averaged(buffer: Tensor) -> bool:
    return buffer.is_floating_point() and not is_dtensor(buffer) and is_writable(buffer)


@torch.no_grad()
def _laid_end_to_end(live: Sequence[Tensor], group: dist.ProcessGroup | None) -> Tensor:
    """A copy of all elements in row-major order, where they can travel (1-D, float64)."""
    device = comm_device(group, live[0].device if live else None)
    flat = torch.empty(sum(map(Tensor.numel, live)), dtype=torch.float64, device=device)
    for tensor, window in _windows(live, flat):
        window.copy_(tensor)
    return flat


def _windows(live: Sequence[Tensor], flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    start = 0
    for tensor in live:
        yield tensor, flat[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()


@torch.no_grad()
def _write_means(live: Sequence[Tensor], sums: Tensor, group: dist.ProcessGroup | None) -> None:
    sums.div_(size_of(group))
    for tensor, window in _windows(live, sums):
        tensor.copy_(window)


def _refuse_differences(ranks: Sequence[list[tuple[object, ...]]]) -> None:
    """All ranks see the same tables, so all raise or none does."""
    for rank, rows in enumerate(ranks):
        if rows != ranks[0]:
            mine, theirs = set(ranks[0]), set(rows)
            raise UnsupportedModelError(
                f"buffers cannot be averaged over ranks that have different ones: rank {rank} of the group has "
                f"{sorted(map(str, theirs - mine)) or 'another order'} where rank 0 has "
                f"{sorted(map(str, mine - theirs)) or 'none of these'}. Pass as `group` the ranks that hold the same "
                "part of the model"
            )
