"""Stage 3: every rank has an equal stretch of each parameter, padded at the end."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ....errors import UnsupportedModelError
from ....ranks import all_or_none, comm_device, size_of, traffic
from ....shard import Interval
from ..base import STALE
from .engine import STAGE_3_EVALUATION, is_a, need, never_steps
from .piece import EMPTY, AbstractWeights, Piece
from .run import SPREADING

_PARAMETER_ATTRIBUTES = (
    "ds_tensor",
    "ds_shape",
    "ds_numel",
    "ds_process_group",
    "ds_status",
    "ds_persist",
    "ds_secondary_tensor",
)


class Partitioned(AbstractWeights):
    """Stage 3: each rank has an equal stretch of each parameter, the last ranks with padding."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._optimizer = engine, engine.optimizer
        self._files: dict[int, Tensor] = {}  # by sub-group, 1D: its masters, where DeepSpeed keeps them in a file
        for name in ("persistent_parameters", "empty_partition_cache"):
            need(self._optimizer, name)
        for param in self._params():
            for name in _PARAMETER_ATTRIBUTES:
                need(param, name)
        self.group = self._group()

    def _group(self) -> dist.ProcessGroup:
        """The parameters' own: with `mesh_param` it is not the engine's `seq_data_parallel_group`."""
        groups: list[dist.ProcessGroup] = [param.ds_process_group for param in self._params()]
        groups = groups or [need(self._engine, "seq_data_parallel_group")]
        ranks = dist.get_process_group_ranks(groups[0])
        others = [group for group in dict.fromkeys(groups) if dist.get_process_group_ranks(group) != ranks]
        if others:
            raise UnsupportedModelError(
                f"cannot average this DeepSpeed engine: some parameters are divided among the ranks {ranks} and others "
                f"among {dist.get_process_group_ranks(others[0])}; divide all of them among the same ranks"
            )
        return groups[0]

    def pieces(self) -> list[Piece]:
        late = [tuple(param.shape) for param in self._engine.module.parameters() if not hasattr(param, "ds_id")]
        if late:
            raise UnsupportedModelError(
                f"{len(late)} parameters (shapes {late[:3]}) were added to the module after deepspeed.initialize, so "
                "ZeRO-3 neither partitions nor trains them; add modules and adapters first, then initialize the engine"
            )
        pieces, mastered = [], set()
        for params, weights, master in self._groups():
            aliased, offset = weights.data_ptr() == master.data_ptr(), 0
            for param in params:
                size = param.ds_tensor.ds_numel
                pieces.append(_cut(param, None if aliased else master.detach()[offset : offset + size]))
                mastered.add(id(param))
                offset += size
        others = (param for param in self._params() if id(param) not in mastered)
        return pieces + [_cut(param, None) for param in others]

    def buffers(self) -> list[Tensor]:
        return [tensor for _, *tensors in self._groups() for tensor in tensors]

    def alive(self) -> bool:
        idle = is_a(self._optimizer, STAGE_3_EVALUATION)
        hook = need(self._optimizer if idle else need(self._optimizer, "parameter_offload"), "fwd_pre_hook")
        return hook.id in self._engine.module._forward_pre_hooks

    def release(self) -> None:
        if any(param.ds_status.name != "NOT_AVAILABLE" and not param.ds_persist for param in self._params()):
            self._optimizer.empty_partition_cache()

    def publish(self) -> None:
        """Collective: all ranks must call. Drop what was gathered, and gather anew what stays gathered.

        Not by DeepSpeed's own all_gather: a rank that fails in the middle of that leaves the others waiting.
        """
        with torch.no_grad():
            try:
                gathered = self._gathered()
            except BaseException:  # which all ranks know of: what one of them still has whole is waited for, too
                self._optimizer.empty_partition_cache()
                raise
            for one in gathered:  # cannot fail: a forward would wait for ranks that have it already
                one.param.data = one.whole
                one.param.ds_status = type(one.param.ds_status).AVAILABLE

    def _gathered(self) -> list[_Gathered]:
        """Collective: all ranks must call. What stays gathered, whole."""
        with all_or_none(self.group, SPREADING, left=STALE):
            self._optimizer.empty_partition_cache()
            for param in self._params():
                param.ds_secondary_tensor = None  # the second partition of hpZ, now stale: made anew at next use
            gathered = [_Gathered(param, self.group) for param in self._optimizer.persistent_parameters]
        if gathered:
            with traffic(self.group, SPREADING, STALE) as messages:
                for one in gathered:
                    messages.all_gather(partial(getattr, one, "sent"), partial(getattr, one, "received"))
                    with messages.attempt():
                        if one.whole.device != one.received.device:
                            one.whole.copy_(one.received[: one.whole.numel()].view(one.whole.shape))
        return gathered

    def replicas(self) -> list[tuple[nn.Parameter, Tensor]]:
        persistent = self._optimizer.persistent_parameters
        return [(param, param.detach()) for param in persistent if param.ds_status.name == "AVAILABLE"]

    def _params(self) -> list[Any]:
        return [param for param in self._engine.module.parameters() if hasattr(param, "ds_id")]

    def _groups(self) -> Iterator[tuple[list[Any], Tensor, Tensor]]:
        if never_steps(self._engine):
            return iter(())
        attributes = ("fp16_groups", "fp16_partitioned_groups_flat", "fp32_partitioned_groups_flat")
        groups = zip(*(need(self._optimizer, name) for name in attributes), strict=True)
        return ((*rest, self._in_file(index, master)) for index, (*rest, master) in enumerate(groups))

    def _in_file(self, index: int, master: Tensor) -> Tensor:
        """A sub-group's masters; see the Note on masters in files."""
        if not getattr(self._optimizer, "swap_optimizer", False):
            return master
        if not need(self._optimizer, "_swappable_optimizer_subgroup")(index):
            return master
        if index not in self._files:
            info = need(need(self._optimizer, "optimizer_swapper"), "swap_params_info")[need(master, "ds_id")]
            path, numel = need(info, "get_swap_paths")()[0], need(info, "numel")()
            self._files[index] = torch.from_file(path, shared=True, size=numel, dtype=master.dtype)
        return self._files[index]


class _Gathered:
    """Memory for one parameter that all ranks are to have whole."""

    def __init__(self, param: Any, group: dist.ProcessGroup) -> None:
        self.param, part = param, param.ds_tensor.detach()
        device = comm_device(group, param.device)
        self.sent = part.to(device)
        self.received = torch.empty(size_of(group) * part.numel(), dtype=part.dtype, device=device)
        shape, numel = torch.Size(param.ds_shape), param.ds_numel
        is_here = device == param.device
        self.whole = (
            self.received[:numel].view(shape) if is_here else torch.empty(shape, dtype=part.dtype, device=param.device)
        )


def _cut(param: Any, master: Tensor | None) -> Piece:
    """This rank's Piece of a partitioned parameter; `master` is the padded stretch of its master, if it has one."""
    size = param.ds_tensor.ds_numel
    start = dist.get_rank(param.ds_process_group) * size
    length = max(0, min(size, param.ds_numel - start))
    region = Interval(start, start + length) if length else EMPTY
    weights = param.ds_tensor.detach()[:length]
    tensor, working = (weights, None) if master is None else (master[:length], weights)
    return Piece(param, torch.Size(param.ds_shape), region, tensor, working)
