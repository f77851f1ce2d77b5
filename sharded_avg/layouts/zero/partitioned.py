"""Stage 3: every rank has an equal stretch of each parameter, padded at the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...shard import Interval
from .engine import need
from .piece import EMPTY, AbstractWeights, Piece


class Partitioned(AbstractWeights):
    """Stage 3: each rank has an equal stretch of each parameter, the last ranks with padding."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._optimizer = engine, engine.optimizer

    def pieces(self) -> list[Piece]:
        pieces, mastered = [], set()
        for params, weights, master in self._groups():
            aliased, offset = weights.data_ptr() == master.data_ptr(), 0
            for param in params:
                size = param.ds_tensor.ds_numel
                pieces.append(_cut(param, None if aliased else master.detach()[offset : offset + size]))
                mastered.add(id(param))
                offset += size
        others = (p for p in self._engine.module.parameters() if hasattr(p, "ds_tensor") and id(p) not in mastered)
        return pieces + [_cut(param, None) for param in others]

    def buffers(self) -> list[Tensor]:
        return [tensor for _, *tensors in self._groups() for tensor in tensors]

    def alive(self) -> bool:
        hook = need(need(self._optimizer, "parameter_offload"), "fwd_pre_hook")
        return hook.id in self._engine.module._forward_pre_hooks

    def release(self) -> None:
        params = self._engine.module.parameters()
        if any(p.ds_status.name != "NOT_AVAILABLE" and not p.ds_persist for p in params if hasattr(p, "ds_status")):
            self._optimizer.empty_partition_cache()

    def publish(self) -> None:
        self._optimizer.empty_partition_cache()
        for param in self._engine.module.parameters():
            if getattr(param, "ds_secondary_tensor", None) is not None:
                param.ds_secondary_tensor = None  # the second partition of hpZ, now stale: made anew at next use
        if persistent := self._optimizer.persistent_parameters:
            with torch.no_grad():
                persistent[0].all_gather(persistent)

    def _groups(self) -> Iterator[tuple[list[Any], Tensor, Tensor]]:
        attributes = ("fp16_groups", "fp16_partitioned_groups_flat", "fp32_partitioned_groups_flat")
        return zip(*(need(self._optimizer, name) for name in attributes), strict=True)


def _cut(param: Any, master: Tensor | None) -> Piece:
    """This rank's Piece of a partitioned parameter; `master` is the padded stretch of its master, if it has one."""
    size = param.ds_tensor.ds_numel
    start = dist.get_rank(param.ds_process_group) * size
    length = max(0, min(size, param.ds_numel - start))
    region = Interval(start, start + length) if length else EMPTY
    weights = param.ds_tensor.detach()[:length]
    tensor, working = (weights, None) if master is None else (master[:length], weights)
    return Piece(param, torch.Size(param.ds_shape), region, tensor, working)
