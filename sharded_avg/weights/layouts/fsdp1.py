"""FSDP1: parameters concatenated into flat parameters, cut anywhere.

A *unit* is one FullyShardedDataParallel module that has parameters of its own. Its *handle* concatenates them (with
alignment padding between, and padding at the end) into one *flat parameter*, of which each rank keeps an equal piece,
the *local shard*: the only copy that the optimizer updates, fp32 where MixedPrecision computes in less. A parameter
therefore is an Interval of its row-major flattening on each rank, often an empty one. Under NO_SHARD the local shard is
everything, on every rank. What FSDP does not manage (`ignored_states`, buffers, modules outside of it) is a whole Box.

[Note: FSDP1 internals]
FSDP1 has no public way to its shards, so this file, and no other, relies on the following private names. They are
checked at construction (`EngineVersionError`).

    unit    _handle  the handle; None where the module has no parameters of its own
            training_state  SUMMON_FULL_PARAMS: full parameters are shown, so there is nothing to average
            _inter_node_pg  HYBRID_SHARD only: the ranks that hold the same local shard
            _device_handle, _unshard_stream  where full copies are gathered, on a GPU
    handle  flat_param, device  the flat parameter, and where it is computed with
            process_group  the ranks among which it is cut
            uses_sharded_strategy  False: NO_SHARD
            reshard, post_reshard  point the flat parameter and the user's parameters back at the local shard
            _use_sharded_views  point the user's parameters at the local shard, under use_orig_params=True
            _offload_params  True: CPUOffload, with pinned local shards
            _skipped_use_sharded_views  True: SHARD_GRAD_OP left full views on the module after a training forward
            _writeback_orig_params  takes in parameters that the user re-assigned since the last forward
            _training_state  IDLE, except after an exception; then `reshard` would skip the views
            _prefetched  True: the next forward would not gather again
    flat    _local_shard  the local shard; before the first forward it is the flat parameter's data
            _full_param_padded, _full_prec_full_param_padded  full copies, in low and in full precision
            _param_infos, _shared_param_infos  the slots (module, key) that each parameter has, first and further ones
            _shapes, _strides, _shard_param_infos  full shape and strides; what of it lies where in the local shard
            _param_extensions  not None: the parameter was a DTensor
            _params  the user's parameters, under use_orig_params=True
            _is_flat_param, _fsdp_flattened  marks of what FSDP has flattened
    module  HandleTrainingState, TrainingState  of torch.distributed.fsdp._common_utils
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...errors import EngineVersionError, LayoutChangedError, UnsupportedModelError
from ...shard import Box, Interval, Shard
from ...version import requirement
from .. import names
from .base import AbstractLayout

_UNIT_NAMES = ("_handle", "training_state")
_HANDLE_NAMES = (
    *("flat_param", "process_group", "uses_sharded_strategy", "reshard", "post_reshard"),
    *("_use_sharded_views", "_skipped_use_sharded_views", "_writeback_orig_params", "_offload_params"),
    *("_training_state", "_prefetched", "device"),
)
_FLAT_NAMES = (
    *("_param_infos", "_shared_param_infos", "_shapes", "_strides", "_shard_param_infos"),
    *("_param_extensions", "_params"),
)
# Both are freed: FSDP frees the one that it would use next, which `train()` or `eval()` may have changed since.
_FULL_COPIES = ("_full_param_padded", "_full_prec_full_param_padded")


class _Piece(NamedTuple):
    """Where a parameter lies in a flat parameter."""

    unit: int  # position in `Fsdp1Layout._units`
    place: int  # position in the unit's flat parameter, padding not counted
    tied: bool  # a further slot of the same parameter


class _Key(NamedTuple):
    """One key of the unwrapped model's `state_dict()`, and what it stands for."""

    entry: names.Entry  # its slot holds the tensor only if there is no piece
    piece: _Piece | None

    @property
    def identity(self) -> tuple[int, int]:
        """Equal for the names of one tied tensor, and what `_cut` finds a name by."""
        return self.piece[:2] if self.piece is not None else (-1, id(self.entry.tensor))


@dataclass(frozen=True, slots=True, eq=False)
class _Unit:
    """One FSDP module with parameters of its own, and its handle."""

    module: Any
    handle: Any

    @property
    def local(self) -> Tensor:
        """The live local shard, 1-D, padding included."""
        flat = self.handle.flat_param
        shard: Tensor | None = getattr(flat, "_local_shard", None)
        return flat.data if shard is None else shard

    @property
    def requires_grad(self) -> tuple[bool, ...]:
        """For each parameter under use_orig_params=True, otherwise one value for all."""
        flat = self.handle.flat_param
        return tuple([param.requires_grad for param in flat._params or (flat,)])


class Fsdp1Layout(AbstractLayout):
    """Layout of a model that contains `FullyShardedDataParallel` modules: as the outermost, nested, or inside others.

    See [Note: FSDP1 internals].
    """

    def __init__(self, model: nn.Module) -> None:
        """Raises `UnsupportedModelError` for what cannot be cut, `EngineVersionError` for an unknown torch."""
        self.model = model
        self._seen_units: list[tuple[_Unit, int, tuple[bool, ...]]] = []
        self._seen_others: list[tuple[names.Entry, Tensor, int, bool]] = []
        self.shards()

    @classmethod
    def claims(cls, model: nn.Module) -> bool:
        """Whether any module in `model` is a FullyShardedDataParallel."""
        return "torch.distributed.fsdp" in sys.modules and any(_wrappers(model))

    def shards(self) -> list[Shard]:
        """This rank's live pieces: flat parameters in memory order, then what FSDP does not manage, then buffers."""
        _refuse_other_engines(self.model)
        self._units = _find_units(self.model)
        self.group = _common_group(self._units)
        first: dict[tuple[int, int], names.Entry] = {}
        self.aliases = aliases = {}
        for entry, identity in ((key.entry, key.identity) for key in self._keys()):
            if first.setdefault(identity, entry) is not entry:
                aliases[entry.name] = first[identity].name
        others = [entry for (unit, _), entry in first.items() if unit < 0]
        others.sort(key=lambda entry: entry.is_buffer)
        self._seen_units = [(unit, unit.local.data_ptr(), unit.requires_grad) for unit in self._units]
        tensors = [(entry, entry.tensor) for entry in others]
        self._seen_others = [(entry, tensor, tensor.data_ptr(), tensor.requires_grad) for entry, tensor in tensors]
        managed = [shard for number, unit in enumerate(self._units) for shard in _cut(number, unit, first)]
        return managed + [_whole(entry) for entry in others]

    def is_current(self) -> bool:
        """Whether every local shard and every other tensor is where it was, and as trainable as it was."""
        for unit, ptr, flags in self._seen_units:
            if unit.module._handle is not unit.handle or unit.local.data_ptr() != ptr or unit.requires_grad != flags:
                return False
        for entry, tensor, ptr, trainable in self._seen_others:
            now = entry.slot.get(entry.key)
            if now is not tensor or tensor.data_ptr() != ptr or tensor.requires_grad != trainable:
                return False
        return True

    def release(self) -> None:
        """Free full copies, so that the next forward gathers the local shards again.

        Local, but on every rank or on none: the next forward gathers what was freed. To be called between steps;
        after a forward without backward, or one that raised, it also restores the sharded views.
        """
        for unit in self._units:
            _release(unit)

    def state_keys(self) -> list[str]:
        """Keys of the unwrapped model's `state_dict()` that hold tensors, tied names included, in its order.

        FSDP forgets where in its module a tied or ignored parameter stood: there, biases come last, as in torch.nn.
        """
        return [key.entry.name for key in self._keys()]

    def _keys(self) -> list[_Key]:
        pieces = _pieces_by_slot(self._units)
        flat_params = {id(unit.handle.flat_param) for unit in self._units}
        found: list[_Key] = []
        for prefix, module in names.walk(self.model):
            managed = pieces.get(id(module), {})
            for key in _parameter_keys(module, managed, flat_params):
                entry = names.Entry(prefix + key, module._parameters, key, is_buffer=False)
                found.append(_Key(entry, managed.get(key)))
            for key, value in module._buffers.items():
                if value is not None and key not in module._non_persistent_buffers_set:
                    found.append(_Key(names.Entry(prefix + key, module._buffers, key, is_buffer=True), None))
        return found


def _wrappers(model: nn.Module) -> Iterator[Any]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return (module for module in model.modules() if isinstance(module, FullyShardedDataParallel))


def _find_units(model: nn.Module) -> list[_Unit]:
    """Units in `modules()` order, which is the same on every rank."""
    wrappers = list(_wrappers(model))
    _check_internals(wrappers, _UNIT_NAMES)
    units = [_Unit(wrapper, wrapper._handle) for wrapper in wrappers if wrapper._handle is not None]
    for unit in units:
        _check_internals([unit.handle], _HANDLE_NAMES)
        _check_internals([unit.handle.flat_param], _FLAT_NAMES)
        _refuse_pieces(unit)
    return units


def _pieces_by_slot(units: list[_Unit]) -> dict[int, dict[str, _Piece]]:
    """id(module) -> name of each parameter that FSDP took out of it -> where it went; in flat order, tied ones last."""
    pieces: dict[int, dict[str, _Piece]] = {}
    for number, unit in enumerate(units):
        flat = unit.handle.flat_param
        for place, info in enumerate(flat._param_infos):
            pieces.setdefault(id(info.module), {})[info.param_name] = _Piece(number, place, tied=False)
        for info in flat._shared_param_infos:
            first = pieces[id(info.prim_module)][info.prim_param_name]
            pieces.setdefault(id(info.module), {}).setdefault(info.param_name, first._replace(tied=True))
    return pieces


def _parameter_keys(module: nn.Module, managed: Mapping[str, _Piece], flat_params: set[int]) -> list[str]:
    """Names of the parameters that `module` itself had before FSDP took them out and put views in."""
    registered = {key: value for key, value in module._parameters.items() if value is not None}
    others = [key for key, value in registered.items() if key not in managed and id(value) not in flat_params]
    order_is_lost = managed and (others or any(piece.tied for piece in managed.values()))
    return sorted([*managed, *others], key=lambda key: "bias" in key) if order_is_lost else [*managed, *others]


def _cut(number: int, unit: _Unit, first: Mapping[tuple[int, int], names.Entry]) -> Iterator[Shard]:
    """A unit's Shards in memory order. A parameter whose module has left the model has no name, hence no Shard."""
    flat, local = unit.handle.flat_param, unit.local
    flags = unit.requires_grad if flat._params is not None else (flat.requires_grad,) * len(flat._shapes)
    for place, (shape, info, trainable) in enumerate(zip(flat._shapes, flat._shard_param_infos, flags, strict=True)):
        entry = first.get((number, place))
        if entry is None:
            continue
        if info.in_shard and info.numel_in_shard:
            region = Interval(info.intra_param_start_idx, info.intra_param_end_idx + 1)
            piece = local.narrow(0, info.offset_in_shard, info.numel_in_shard)
        else:
            region, piece = Interval(0, 0), local.narrow(0, 0, 0)
        yield Shard(entry.name, torch.Size(shape), region, piece, trainable=trainable)


def _release(unit: _Unit) -> None:
    """Point a unit back at its local shard and free its full copies; nothing to do before the first forward."""
    from torch.distributed.fsdp._common_utils import HandleTrainingState, TrainingState

    module, handle, flat = unit.module, unit.handle, unit.handle.flat_param
    if module.training_state == TrainingState.SUMMON_FULL_PARAMS:
        raise LayoutChangedError(
            "FullyShardedDataParallel.summon_full_params() is active, so the parameters are not sharded now: "
            "leave that context before using the average"
        )
    if not hasattr(flat, "_local_shard"):
        _pin_early(unit)
        return
    if handle.device.type != "cpu":  # gathers that were prefetched for a forward that then raised still read the shard
        module._device_handle.current_stream().wait_stream(module._unshard_stream)
    at_shard = flat.data_ptr() == unit.local.data_ptr() and handle._training_state == HandleTrainingState.IDLE
    if at_shard and not handle._skipped_use_sharded_views:
        _take_in_reassigned(unit)
    else:
        module.training_state = TrainingState.IDLE
        handle._training_state = HandleTrainingState.IDLE
        # Not FSDP's own `_reshard`: that also notes an event for the rate limiter, one that no gather waits for.
        handle.reshard(free_unsharded_flat_param=handle.uses_sharded_strategy)
        handle.post_reshard()
    for copy in (getattr(flat, name, None) for name in _FULL_COPIES):
        if copy is not None and copy.untyped_storage().size():
            copy.untyped_storage().resize_(0)
    handle._prefetched = False


def _pin_early(unit: _Unit) -> None:
    """Pin an offloaded local shard, which FSDP would do at the first forward by moving it, maybe amid a swap."""
    flat = unit.handle.flat_param
    if unit.handle._offload_params and not flat.is_pinned():
        flat.data = flat.data.pin_memory()
        if flat._params is not None:
            unit.handle._use_sharded_views()


def _take_in_reassigned(unit: _Unit) -> None:
    """Copy parameters that the user re-assigned (`param.data = ...`) into the local shard, as the next forward does."""
    flat = unit.handle.flat_param
    if flat._params is None:
        return
    home = unit.local.untyped_storage().data_ptr()
    for info, shard_info, param in zip(flat._param_infos, flat._shard_param_infos, flat._params, strict=True):
        moved = shard_info.in_shard and param.untyped_storage().data_ptr() != home
        if moved or info.module._parameters.get(info.param_name, param) is not param:
            unit.handle._writeback_orig_params()
            return


def _check_internals(owners: list[Any], needed: tuple[str, ...]) -> None:
    missing = sorted({name for owner in owners for name in needed if not hasattr(owner, name)})
    if missing:
        raise EngineVersionError(
            f"FullyShardedDataParallel of torch {torch.__version__} has no {', '.join(missing)}, which its shards are "
            f"read through: install {requirement('torch')}, or move to fully_shard (FSDP2)"
        )


def _refuse_other_engines(model: nn.Module) -> None:
    from torch.distributed.fsdp import FSDPModule

    for name, module in model.named_modules():
        if isinstance(module, (DistributedDataParallel, DataParallel, FSDPModule)):
            raise UnsupportedModelError(
                f"module {name!r} is a {type(module).__name__} in a model that has FullyShardedDataParallel modules: "
                "wrap the whole model with one of them"
            )


def _refuse_pieces(unit: _Unit) -> None:
    """What was cut, but not into Intervals of a row-major tensor."""
    flat = unit.handle.flat_param
    if flat.device.type == "meta":
        raise UnsupportedModelError("a flat parameter is on the meta device: initialise the model before averaging it")
    cut = zip(flat._param_infos, flat._shapes, flat._strides, flat._param_extensions, strict=True)
    for info, shape, stride, extension in cut:
        name = f"{info.module_name}.{info.param_name}".lstrip(".")
        if extension is not None:
            raise UnsupportedModelError(
                f"parameter {name!r} was a DTensor when FullyShardedDataParallel took it: tensor parallelism can be "
                "averaged together with fully_shard (FSDP2)"
            )
        if not torch.empty_strided(shape, stride, device="meta").is_contiguous():
            raise UnsupportedModelError(
                f"parameter {name!r} of shape {tuple(shape)} has strides {tuple(stride)}, and "
                "FullyShardedDataParallel cuts in memory order: call .contiguous() on it before wrapping"
            )


def _whole(entry: names.Entry) -> Shard:
    """What FSDP does not manage is kept whole; refuse what is not whole, or belongs to someone else."""
    tensor: Any = entry.tensor
    if getattr(tensor, "_is_flat_param", False) or getattr(tensor, "_fsdp_flattened", False):
        raise UnsupportedModelError(
            f"parameter {entry.name!r} is managed by a FullyShardedDataParallel that does not contain it: pass the "
            "outermost module, and put all modules that share a tied parameter into one FullyShardedDataParallel"
        )
    if is_traceable_wrapper_subclass(tensor):
        raise UnsupportedModelError(
            f"{entry.name!r} is a {type(tensor).__name__} that FullyShardedDataParallel does not manage: make it a "
            "plain tensor, or use fully_shard (FSDP2), which cuts into DTensors"
        )
    if tensor.device.type == "meta":
        raise UnsupportedModelError(f"{entry.name!r} is on the meta device: initialise it before averaging the model")
    trainable, is_buffer = tensor.requires_grad, entry.is_buffer
    return Shard(entry.name, tensor.shape, Box.whole(tensor.shape), tensor.detach(), None, trainable, is_buffer)


def _common_group(units: list[_Unit]) -> dist.ProcessGroup:
    """The one set of ranks that all units are held by."""
    if not units:
        raise UnsupportedModelError("no FullyShardedDataParallel of the model has a parameter: pass the plain module")
    groups = [_group_of(unit) for unit in units]
    ranks = sorted({tuple(sorted(dist.get_process_group_ranks(group))) for group in groups})
    if len(ranks) > 1:
        raise UnsupportedModelError(
            f"FullyShardedDataParallel modules of the model lie on different ranks, {ranks}: give all of them the same "
            "process_group"
        )
    return groups[0]


def _group_of(unit: _Unit) -> dist.ProcessGroup:
    """The ranks that hold a unit together, replicas included."""
    cut: dist.ProcessGroup = unit.handle.process_group
    replicas: dist.ProcessGroup | None = getattr(unit.module, "_inter_node_pg", None)
    num_replicas = 1 if replicas is None else replicas.size()
    world = dist.group.WORLD
    if world is not None and cut.size() * num_replicas == world.size():
        return world
    if replicas is None or num_replicas == 1:
        return cut
    if cut.size() == 1:
        return replicas
    raise UnsupportedModelError(
        f"HYBRID_SHARD over {num_replicas} x {cut.size()} ranks of {dist.get_world_size()}: no process group holds "
        "exactly these. Let the two groups cover the world"
    )
