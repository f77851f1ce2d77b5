"""DTensor parameters: fully_shard (FSDP2, HSDP), tensor parallel, and both at once.

[Note: DTensor tensors]
    sharded_param    the DTensor that the optimizer updates; with fully_shard it is `FSDPParam.sharded_param`, and the
                     module holds it only while it is resharded: after a forward without backward the root's
                     parameters are plain, unsharded tensors
    _local_tensor    its local tensor: a Box of the full tensor, perhaps empty, never padded

[Note: fully_shard internals]
`_fsdp_params` is the only function that touches all but the first; construction fails with the torch version's name if
they are not there.

    DTensor  _local_tensor
    module   _get_fsdp_state  leads to the state
    state    _fsdp_param_groups or _fsdp_param_group  a list since torch 2.11, one optional group before
    group    fsdp_params
    param    sharded_param, _module_info  the latter with `module` and `param_name`
"""

from __future__ import annotations

from operator import is_
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor import Shard as ShardPlacement

from ...errors import EngineVersionError, UnsupportedModelError
from ...ranks import part_group
from ...shard import Box, Shard
from ...version import requirement
from .. import names
from .base import AbstractLayout, addresses, trainable


def _fsdp_modules(model: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _fsdp_params(module: Any) -> list[Any]:
    """The FSDPParams of one fully_shard'ed module."""
    try:
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)  # torch >= 2.11; one optional group before
        if groups is None:
            groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
        params = [param for group in groups for param in group.fsdp_params]
        for param in params:
            _ = param.sharded_param, param._module_info.module, param._module_info.param_name
        return params
    except AttributeError as error:
        raise EngineVersionError(
            f"torch {torch.__version__} keeps its fully_shard state elsewhere than sharded_avg expects ({error}); "
            f"install {requirement('torch')}"
        ) from error


def box_of(param: DTensor, name: str) -> Box:
    """The Box of the full tensor that this rank's local tensor fills."""
    lengths, offsets = list(param.shape), [0] * param.ndim
    coordinate = param.device_mesh.get_coordinate()
    if coordinate is None:
        return Box(tuple(offsets), (0,) * param.ndim) if param.ndim else Box((), ())
    for mesh_axis in _cutting_order(param, name):
        placement: Any = param.placements[mesh_axis]
        dim, num_chunks = placement.dim, param.device_mesh.size(mesh_axis)
        chunk = -(-lengths[dim] // num_chunks)  # torch.chunk: full chunks first, then a rest, then empty ones
        start = min(chunk * coordinate[mesh_axis], lengths[dim])
        offsets[dim] += start
        lengths[dim] = min(chunk, lengths[dim] - start)
    box = Box(tuple(offsets), tuple(lengths))
    local = param._local_tensor
    if box.numel != local.numel() or (box.numel and box.lengths != tuple(local.shape)):
        raise UnsupportedModelError(
            f"{name!r}: this rank's local tensor has shape {tuple(local.shape)}, but placements {param.placements} on "
            f"mesh {tuple(param.device_mesh.shape)} of shape {tuple(param.shape)} should give {box.lengths}. "
            "sharded_avg handles placements that cut as torch.chunk does; re-distribute this parameter with Shard(dim)"
        )
    return box


def _cutting_order(param: DTensor, name: str) -> list[int]:
    """Mesh axes in the order in which they cut the tensor: a strided axis cuts what later axes have left."""
    plain, strided = [], []
    for mesh_axis, placement in enumerate(param.placements):
        if isinstance(placement, Partial) or not (isinstance(placement, Replicate) or hasattr(placement, "dim")):
            raise UnsupportedModelError(
                f"{name!r} has placement {placement}: its values exist on no rank. Only Shard and Replicate can be "
                "averaged; redistribute the parameter first"
            )
        split_factor = getattr(placement, "split_factor", 1)
        if isinstance(placement, ShardPlacement) and not hasattr(placement, "split_factor"):
            plain.append(mesh_axis)
        elif not isinstance(placement, Replicate):
            _check_split(param, name, mesh_axis, split_factor)
            strided.append(mesh_axis)
    return plain + strided


def _check_split(param: DTensor, name: str, mesh_axis: int, split_factor: int) -> None:
    """A strided axis leaves a Box only if its split factor is what the plain axes after it cut the same dim into."""
    placements: tuple[Any, ...] = param.placements
    later = [i for i in range(mesh_axis + 1, len(placements)) if not isinstance(placements[i], Replicate)]
    same_dim = [i for i in later if placements[i].dim == placements[mesh_axis].dim]
    product = 1
    for i in same_dim:
        product *= param.device_mesh.size(i)
    if product != split_factor:
        raise UnsupportedModelError(
            f"{name!r} has placements {placements} on mesh {tuple(param.device_mesh.shape)}: the local tensor is not "
            "one rectangle of the full tensor. Apply tensor parallelism before fully_shard, on a mesh (dp, tp)"
        )


class DTensorLayout(AbstractLayout):
    """DTensor parameters, and plain ones that every rank holds whole."""

    def __init__(self, model: nn.Module) -> None:
        self.model = names.unwrap(model)
        self._fsdp = _fsdp_modules(model)
        self.release()
        self._index()
        self.group = self._find_group()

    @classmethod
    def claims(cls, model: nn.Module) -> bool:
        return any(isinstance(p, DTensor) for p in model.parameters()) or bool(_fsdp_modules(model))

    def _index(self) -> None:
        """Find every tensor's slot, and for a fully_shard'ed one the FSDPParam that keeps the DTensor."""
        self._params = {
            (id(param._module_info.module._parameters), param._module_info.param_name): param
            for module in self._fsdp
            for param in _fsdp_params(module)
        }
        self._entries, self.aliases = names.split_ties(names.entries(self.model))
        keys = [(id(entry.slot), entry.key) for entry in self._entries]
        self._owners = [self._params.get(key) for key in keys]

    def _tensors(self) -> list[Tensor | None]:
        """The live DTensor or plain tensor of each entry, whether or not its module is resharded."""
        return [
            owner.sharded_param if owner is not None else entry.slot.get(entry.key)
            for owner, entry in zip(self._owners, self._entries, strict=True)
        ]

    def _find_group(self) -> dist.ProcessGroup:
        ranks = set()
        for tensor in self._tensors():
            if isinstance(tensor, DTensor):
                ranks |= set(tensor.device_mesh.mesh.flatten().tolist())
        if len(ranks) == dist.get_world_size() or not ranks:
            return dist.group.WORLD  # type: ignore[return-value]
        for tensor in self._tensors():  # a 1-D mesh on part of the job has the group already
            mesh = tensor.device_mesh if isinstance(tensor, DTensor) else None
            if mesh is not None and mesh.ndim == 1 and set(mesh.mesh.flatten().tolist()) == ranks:
                return mesh.get_group()
        return part_group(sorted(ranks))

    def release(self) -> None:
        for module in self._fsdp:
            module.reshard()

    def shards(self) -> list[Shard]:
        self._index()
        self._seen = self._tensors()
        self._here = [tensor for tensor in self._seen if tensor is not None]
        shards = [
            _shard(entry, tensor) for entry, tensor in zip(self._entries, self._seen, strict=True) if tensor is not None
        ]
        self._pointers, self._flags = addresses(map(_local, self._here)), trainable(self._here)
        return shards

    def is_current(self) -> bool:
        return (
            all(map(is_, self._tensors(), self._seen))
            and addresses(map(_local, self._here)) == self._pointers
            and trainable(self._here) == self._flags
        )


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _shard(entry: names.Entry, tensor: Tensor) -> Shard:
    if isinstance(tensor, DTensor):
        region, local = box_of(tensor, entry.name), tensor._local_tensor
        if not region.numel:
            local = local.reshape(region.lengths)
    else:
        region, local = Box.whole(tensor.shape), tensor
    return Shard(
        entry.name, tensor.shape, region, local.detach(), trainable=tensor.requires_grad, is_buffer=entry.is_buffer
    )
