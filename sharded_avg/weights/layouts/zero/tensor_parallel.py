"""AutoTP: parameters cut over tensor-parallel ranks, before ZeRO divides what is left among data-parallel ones.

DeepSpeed tells, for its universal checkpoints, how each parameter was cut: along which dim, into how long parts, and,
where a layer holds several matrices side by side (fused queries, keys and values), how each of those was. What it cuts
in no way that can be said so, it marks; then there is no average.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from ....errors import UnsupportedModelError
from ....shard import Interval, Region, Stretch
from .engine import need, uses_autotp

_META = "ds_autotp_universal_checkpoint_meta"


@dataclass(frozen=True, slots=True)
class Cut:
    """What this tensor-parallel rank has of a parameter."""

    shape: torch.Size  # of the full tensor
    dim: int
    slices: tuple[tuple[int, int], ...]  # (offset, length) along `dim`
    is_even: bool  # every tensor-parallel rank has as much of it

    def region(self, part: Interval) -> Region:
        """Where a part of the flattened cut tensor lies in the full one."""
        return Stretch(self.dim, self.slices, part.start, part.stop) if part.numel else part


def replica_set_of(engine: Any) -> tuple[int, int]:
    """Which of the tensor-parallel ranks this is, and how many there are."""
    return (need(engine, "mpu").get_model_parallel_rank(), engine.mp_world_size) if uses_autotp(engine) else (0, 1)


def cuts_of(engine: Any) -> dict[int, Cut]:
    """By `id`, the parameters that are cut; others are whole on every tensor-parallel rank.

    Raises `UnsupportedModelError` where DeepSpeed does not say how, the same on all ranks.
    """
    if not uses_autotp(engine):
        return {}
    rank, _ = replica_set_of(engine)
    cuts = {}
    described = False
    for name, param in need(engine, "module").named_parameters():
        meta = getattr(param, _META, None)
        described = described or meta is not None
        if meta is None and getattr(param, "tensor_model_parallel", False):
            raise UnsupportedModelError(_undescribed(name, "this version of DeepSpeed does not say how it is cut"))
        if meta is not None and not meta.get("replicated"):
            local = torch.Size(getattr(param, "ds_shape", param.shape))
            cuts[id(param)] = _cut(name, meta, rank, local)
    if not described:
        raise UnsupportedModelError(
            "cannot average this DeepSpeed engine: AutoTP is on, and no parameter says how it was cut: no layer "
            "fits tensor_parallel.partition_config, or this version of DeepSpeed does not say it (0.19.8 does). Name "
            "the layers, use a newer DeepSpeed, data parallelism only, or FSDP2 with tensor "
            "parallelism"
        )
    return cuts


def _cut(name: str, meta: Mapping[str, Any], rank: int, local: torch.Size) -> Cut:
    shape, dim, sizes = meta.get("original_shape"), meta.get("partition_dim"), meta.get("sub_param_sizes")
    widths: Any = meta.get("sub_param_shard_widths") if sizes is not None else [meta.get("partition_sizes")]
    if shape is None or dim is None or not widths or any(width is None for width in widths):
        why = (meta.get("conversion") or {}).get("unsupported_reason") or "its layout is not a few slices along one dim"
        raise UnsupportedModelError(_undescribed(name, why))
    sizes = [shape[dim]] if sizes is None else sizes
    begins = list(accumulate(sizes, initial=0))[: len(sizes)]
    slices = tuple(
        (begin + sum(width[:rank]), width[rank])
        for begin, size, width in zip(begins, sizes, widths, strict=True)
        if size
    )
    cut = Cut(torch.Size(shape), dim, slices, is_even=all(len(set(width)) == 1 for width in widths))
    whole = all(sum(width) == size for size, width in zip(sizes, widths, strict=True)) and sum(sizes) == shape[dim]
    if not whole or Stretch(dim, slices, 0, 0).cut_shape(tuple(shape)) != tuple(local):
        raise UnsupportedModelError(_undescribed(name, f"what it says does not give the shape {tuple(local)} here"))
    return cut


def refuse_uneven(engine: Any, cuts: Mapping[int, Cut]) -> None:
    """Stages 0 to 2 lay all parameters end to end: whole ones are divided alike only if cut ones have one size."""
    params = dict(need(engine, "module").named_parameters())
    uneven = [name for name, param in params.items() if id(param) in cuts and not cuts[id(param)].is_even]
    if uneven and any(id(param) not in cuts for param in params.values()):
        raise UnsupportedModelError(
            f"cannot average this DeepSpeed engine: AutoTP cuts {uneven[0]!r} into parts of several sizes, so that "
            "tensor-parallel ranks divide the parameters that they all have differently; use stage 3, or a size that "
            "the number of tensor-parallel ranks divides"
        )


def _undescribed(name: str, why: str) -> str:
    return (
        f"cannot average this DeepSpeed engine: AutoTP cuts {name!r}, and {why}; leave that layer out of "
        "tensor_parallel.partition_config, or use data parallelism only, or FSDP2 with tensor parallelism"
    )
