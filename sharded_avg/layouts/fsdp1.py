"""FSDP1: parameters concatenated into flat parameters, cut anywhere.

A *unit* is one FullyShardedDataParallel module that has parameters of its own. Its *handle* concatenates them (with
alignment padding between, and padding at the end) into one *flat parameter*, of which each rank keeps an equal piece,
the *local shard*: the only copy that the optimizer updates, fp32 where MixedPrecision computes in less. A parameter
therefore is an Interval of its row-major flattening on each rank, often an empty one. Under NO_SHARD the local shard is
everything, on every rank. What FSDP does not manage (`ignored_states`, buffers, modules outside of it) is a whole Box.

[Note: FSDP1 internals]
FSDP1 has no public way to its shards, so this file, and no other, relies on the following private names. They are
checked at construction (`EngineVersionError`); they have been there, unchanged, from torch 2.6 to 2.13.

    unit    _handle                 the handle; None where the module has no parameters of its own
            training_state          SUMMON_FULL_PARAMS: full parameters are shown, so there is nothing to average
            _inter_node_pg          HYBRID_SHARD only: the ranks that hold the same local shard
            _unshard_stream         where full copies are gathered; exists after the first forward
    handle  flat_param              the flat parameter
            process_group           the ranks among which it is cut
            uses_sharded_strategy   False: NO_SHARD
            reshard, post_reshard   point the flat parameter and the user's parameters back at the local shard
            _use_orig_params        True: the user's parameters are views of it, otherwise they are hidden
            _skipped_use_sharded_views   True: SHARD_GRAD_OP left full views on the module after a training forward
            _writeback_orig_params  takes in parameters that the user re-assigned since the last forward
            _training_state         IDLE, except after an exception; then `reshard` would skip the views
            _prefetched             True: the next forward would not gather again
    flat    _local_shard            the local shard; before the first forward it is the flat parameter's data
            _full_param_padded, _full_prec_full_param_padded   full copies, in low and in full precision
            _param_infos, _shared_param_infos   the slots (module, key) that each parameter has, first and further ones
            _shapes, _strides, _shard_param_infos   full shape and strides; what of it lies where in the local shard
            _param_extensions       not None: the parameter was a DTensor
            _params                 the user's parameters, under use_orig_params=True
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

from .. import names
from ..errors import EngineVersionError, LayoutChangedError, UnsupportedModelError
from ..shard import Box, Interval, Shard
from .base import AbstractLayout

_UNIT_NAMES = ("_handle", "training_state")
_HANDLE_NAMES = (
    "flat_param",
    "process_group",
    "uses_sharded_strategy",
    "reshard",
    "post_reshard",
    "_use_orig_params",
    "_skipped_use_sharded_views",
    "_writeback_orig_params",
    "_training_state",
    "_prefetched",
)
_FLAT_NAMES = (
    "_param_infos",
    "_shared_param_infos",
    "_shapes",
    "_strides",
    "_shard_param_infos",
    "_param_extensions",
    "_params",
)
_FULL_COPIES = ("_full_param_padded", "_full_prec_full_param_padded")


class _Piece(NamedTuple):
    """Where a parameter lies in a flat parameter."""

    unit: int  # position in `Fsdp1Layout._units`
    index: int  # position in the unit's flat parameter, padding not counted
    tied: bool  # a further slot of the same parameter


class _Key(NamedTuple):
    """One key of the unwrapped model's `state_dict()`, and what it stands for."""

    name: str
    piece: _Piece | None  # None: a tensor that FSDP does not manage, found in `slot[key]`
    slot: dict[str, Any]
    key: str
    is_buffer: bool

    @property
    def identity(self) -> tuple[int, int]:
        """Equal for the names of one tied tensor, and what `_cut` finds a name by."""
        return self.piece[:2] if self.piece is not None else (-1, id(self.slot[self.key]))


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
    def local_ptr(self) -> int:
        """Address of the local shard, without making a tensor."""
        flat = self.handle.flat_param
        ptr: int = getattr(flat, "_local_shard", flat).data_ptr()
        return ptr

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
        super().__init__(model)
        _refuse_other_engines(model)
        self._units = _find_units(model)
        self._group = _common_group(self._units)
        self._aliases: dict[str, str] = {}
        self._seen_units: list[tuple[_Unit, int, tuple[bool, ...]]] = []
        self._seen_others: list[tuple[_Key, Tensor, int, bool]] = []
        self.shards()

    @classmethod
    def claims(cls, model: nn.Module) -> bool:
        """Whether any module in `model` is a FullyShardedDataParallel."""
        if "torch.distributed.fsdp" not in sys.modules:
            return False
        return any(isinstance(module, _fsdp_class()) for module in model.modules())

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks that hold the model together: the default group if they are all, else the group that FSDP has."""
        return self._group

    @property
    def aliases(self) -> Mapping[str, str]:
        """Second and further names of tied tensors -> the name that their Shard has."""
        return self._aliases

    def shards(self) -> list[Shard]:
        """This rank's live pieces: flat parameters in memory order, then what FSDP does not manage, then buffers."""
        self._units = _find_units(self.model)
        first: dict[tuple[int, int], _Key] = {}
        self._aliases = {}
        for key in self._keys():
            if first.setdefault(key.identity, key) is not key:
                self._aliases[key.name] = first[key.identity].name
        others = sorted((key for key in first.values() if key.piece is None), key=lambda key: key.is_buffer)
        for key in others:
            _refuse_other(key)
        self._remember(others)
        managed = [shard for number, unit in enumerate(self._units) for shard in _cut(number, unit, first)]
        return managed + [_whole(key) for key in others]

    def is_current(self) -> bool:
        """Whether every local shard and every other tensor is where it was, and as trainable as it was."""
        for unit, ptr, requires_grad in self._seen_units:
            if unit.module._handle is not unit.handle or unit.local_ptr != ptr or unit.requires_grad != requires_grad:
                return False
        for key, tensor, ptr, trainable in self._seen_others:
            now = key.slot.get(key.key)
            if now is not tensor or tensor.data_ptr() != ptr or tensor.requires_grad != trainable:
                return False
        return True

    def release(self) -> None:
        """Free full copies, so that the next forward gathers the local shards again.

        Local, but every rank has to do it before the next forward, as that gathers what was freed. To be called
        between steps; after a forward without backward, or one that raised, it also restores the sharded views.
        """
        for unit in self._units:
            _release(unit)

    def state_keys(self) -> list[str]:
        """Keys of the unwrapped model's `state_dict()` that hold tensors, tied names included, in its order.

        FSDP forgets where in its module a tied or ignored parameter stood: there, biases come last, as in torch.nn.
        """
        return [key.name for key in self._keys()]

    def _keys(self) -> list[_Key]:
        pieces = _pieces_by_slot(self._units)
        found: list[_Key] = []
        for prefix, module in names.walk(self.model):
            for name in _parameter_names(module, pieces, self._units):
                piece = pieces.get(id(module), {}).get(name)
                found.append(_Key(prefix + name, piece, module._parameters, name, is_buffer=False))
            for name, value in module._buffers.items():
                if value is not None and name not in module._non_persistent_buffers_set:
                    found.append(_Key(prefix + name, None, module._buffers, name, is_buffer=True))
        return found

    def _remember(self, others: list[_Key]) -> None:
        self._seen_units = [(unit, unit.local_ptr, unit.requires_grad) for unit in self._units]
        tensors = [(key, key.slot[key.key]) for key in others]
        self._seen_others = [(key, tensor, tensor.data_ptr(), tensor.requires_grad) for key, tensor in tensors]


# --- reading -------------------------------------------------------------------------------------------------------


def _fsdp_class() -> type[nn.Module]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel


def _find_units(model: nn.Module) -> list[_Unit]:
    """Units in `modules()` order, which is the same on every rank."""
    wrappers: list[Any] = [module for module in model.modules() if isinstance(module, _fsdp_class())]
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
        for index, info in enumerate(flat._param_infos):
            pieces.setdefault(id(info.module), {})[info.param_name] = _Piece(number, index, tied=False)
        for info in flat._shared_param_infos:
            first = pieces[id(info.prim_module)][info.prim_param_name]
            pieces.setdefault(id(info.module), {}).setdefault(info.param_name, first._replace(tied=True))
    return pieces


def _parameter_names(module: nn.Module, pieces: Mapping[int, dict[str, _Piece]], units: list[_Unit]) -> list[str]:
    """Names of the parameters that `module` itself had before FSDP took them out and put views in."""
    managed = pieces.get(id(module), {})
    flat_params = {id(unit.handle.flat_param) for unit in units}
    others = [
        name
        for name, value in module._parameters.items()
        if value is not None and name not in managed and id(value) not in flat_params
    ]
    order_is_lost = managed and (others or any(piece.tied for piece in managed.values()))
    return sorted([*managed, *others], key=lambda name: "bias" in name) if order_is_lost else [*managed, *others]


def _cut(number: int, unit: _Unit, first: Mapping[tuple[int, int], _Key]) -> Iterator[Shard]:
    """A unit's Shards in memory order. A parameter whose module has left the model has no name, hence no Shard."""
    flat, local = unit.handle.flat_param, unit.local
    flags = unit.requires_grad if flat._params is not None else (flat.requires_grad,) * len(flat._shapes)
    for index, (shape, info, trainable) in enumerate(zip(flat._shapes, flat._shard_param_infos, flags, strict=True)):
        key = first.get((number, index))
        if key is None:
            continue
        if info.in_shard and info.numel_in_shard:
            region = Interval(info.intra_param_start_idx, info.intra_param_end_idx + 1)
            piece = local.narrow(0, info.offset_in_shard, info.numel_in_shard)
        else:
            region, piece = Interval(0, 0), local.narrow(0, 0, 0)
        yield Shard(key.name, torch.Size(shape), region, piece, trainable=trainable)


def _whole(key: _Key) -> Shard:
    tensor: Tensor = key.slot[key.key]
    return Shard(
        key.name,
        tensor.shape,
        Box.whole(tensor.shape),
        tensor.detach(),
        trainable=tensor.requires_grad,
        is_buffer=key.is_buffer,
    )


# --- releasing -----------------------------------------------------------------------------------------------------


def _release(unit: _Unit) -> None:
    """Point a unit back at its local shard and free its full copies; nothing to do before the first forward."""
    from torch.distributed.fsdp._common_utils import HandleTrainingState, TrainingState

    module, handle = unit.module, unit.handle
    if module.training_state == TrainingState.SUMMON_FULL_PARAMS:
        raise LayoutChangedError(
            "FullyShardedDataParallel.summon_full_params() is active, so the parameters are not sharded now: "
            "leave that context before using the average"
        )
    if not hasattr(handle.flat_param, "_local_shard"):
        return
    _wait_for_gathers(unit)
    if _is_resharded(unit, HandleTrainingState.IDLE):
        _take_in_reassigned(unit)
    else:
        module.training_state = TrainingState.IDLE
        handle._training_state = HandleTrainingState.IDLE
        # Not FSDP's own `_reshard`: that also notes an event for the rate limiter, one that no gather waits for.
        handle.reshard(free_unsharded_flat_param=handle.uses_sharded_strategy)
        handle.post_reshard()
    _free_full_copies(handle.flat_param)
    handle._prefetched = False


def _is_resharded(unit: _Unit, idle: object) -> bool:
    handle = unit.handle
    at_shard = handle.flat_param.data_ptr() == unit.local_ptr
    return at_shard and handle._training_state == idle and not handle._skipped_use_sharded_views


def _wait_for_gathers(unit: _Unit) -> None:
    """Let the current stream wait for gathers that read the local shard: prefetched ones, after an exception."""
    stream = getattr(unit.module, "_unshard_stream", None)
    if stream is not None and unit.local.device.type != "cpu":
        unit.module._device_handle.current_stream().wait_stream(stream)


def _free_full_copies(flat: Any) -> None:
    """Both precisions: FSDP frees the one that it would use next, which `train()` or `eval()` may have changed."""
    for copy in _FULL_COPIES:
        tensor: Tensor | None = getattr(flat, copy, None)
        if tensor is not None and tensor.untyped_storage().size():
            tensor.untyped_storage().resize_(0)


def _take_in_reassigned(unit: _Unit) -> None:
    """Copy parameters that the user re-assigned (`param.data = ...`) into the local shard, as the next forward would."""
    flat = unit.handle.flat_param
    if flat._params is None:
        return
    home = unit.local.untyped_storage().data_ptr()
    for info, shard_info, param in zip(flat._param_infos, flat._shard_param_infos, flat._params, strict=True):
        moved = shard_info.in_shard and param.untyped_storage().data_ptr() != home
        if moved or info.module._parameters.get(info.param_name, param) is not param:
            unit.handle._writeback_orig_params()
            return


# --- refusing ------------------------------------------------------------------------------------------------------


def _check_internals(owners: list[Any], needed: tuple[str, ...]) -> None:
    missing = sorted({name for owner in owners for name in needed if not hasattr(owner, name)})
    if missing:
        raise EngineVersionError(
            f"FullyShardedDataParallel of torch {torch.__version__} has no {', '.join(missing)}, which its shards are "
            "read through: install torch >= 2.6, <= 2.13, or move to fully_shard (FSDP2)"
        )


def _refuse_other_engines(model: nn.Module) -> None:
    from torch.distributed.fsdp import FSDPModule

    for name, module in model.named_modules():
        if isinstance(module, (DistributedDataParallel, DataParallel, FSDPModule)):
            raise UnsupportedModelError(
                f"module {name!r} is a {type(module).__name__}, in a model that FullyShardedDataParallel also cuts: the "
                "engines would cut or copy the same parameters. Wrap the whole model with one of them"
            )


def _refuse_other(key: _Key) -> None:
    """What FSDP does not manage is kept whole; refuse what is not whole, or belongs elsewhere."""
    tensor = key.slot[key.key]
    if getattr(tensor, "_is_flat_param", False) or getattr(tensor, "_fsdp_flattened", False):
        why = "is managed by a FullyShardedDataParallel that does not contain it. If that one wraps the model, pass the"
        raise UnsupportedModelError(
            f"parameter {key.name!r} {why} outermost module; if the parameter is tied, put all modules that share it "
            "into one FullyShardedDataParallel"
        )
    if hasattr(tensor, "ds_id"):
        raise UnsupportedModelError(f"parameter {key.name!r} belongs to DeepSpeed ZeRO: use one engine for all")
    if is_traceable_wrapper_subclass(tensor):
        raise UnsupportedModelError(
            f"{key.name!r} is a {type(tensor).__name__}, which FullyShardedDataParallel does not manage and which is no "
            "plain tensor. Convert it to one, or use fully_shard (FSDP2) for models with DTensors"
        )
    if tensor.device.type == "meta":
        raise UnsupportedModelError(
            f"{key.name!r} is on the meta device and has no values: initialise it before building the average"
        )


def _refuse_pieces(unit: _Unit) -> None:
    flat = unit.handle.flat_param
    cut = zip(flat._param_infos, flat._shapes, flat._strides, flat._param_extensions, strict=True)
    for info, shape, stride, extension in cut:
        name = f"{info.module_name}.{info.param_name}".lstrip(".")
        if extension is not None:
            raise UnsupportedModelError(
                f"parameter {name!r} was a DTensor when FullyShardedDataParallel took it: only fully_shard (FSDP2) "
                "with tensor parallelism can be averaged"
            )
        if not torch.empty_strided(shape, stride, device="meta").is_contiguous():
            raise UnsupportedModelError(
                f"parameter {name!r} of shape {tuple(shape)} has strides {tuple(stride)}: FullyShardedDataParallel cuts "
                "it in memory order, not in row-major order. Call .contiguous() on it before wrapping"
            )
    if unit.local.device.type == "meta":
        raise UnsupportedModelError("a flat parameter is on the meta device: initialise the model first")


# --- the group -----------------------------------------------------------------------------------------------------


def _common_group(units: list[_Unit]) -> dist.ProcessGroup:
    groups = [_group_of(unit) for unit in units]
    ranks = {frozenset(dist.get_process_group_ranks(group)) for group in groups}
    if len(ranks) > 1:
        raise UnsupportedModelError(
            f"FullyShardedDataParallel modules of one model are spread over different ranks, {sorted(map(sorted, ranks))}"
            ": wrap all of them with the same process_group"
        )
    return groups[0]


def _group_of(unit: _Unit) -> dist.ProcessGroup:
    """The ranks that hold a unit together, replicas included."""
    shard_group: dist.ProcessGroup = unit.handle.process_group
    replicas: dist.ProcessGroup | None = getattr(unit.module, "_inter_node_pg", None)
    group = shard_group
    if replicas is not None and replicas.size() > 1:
        group = replicas
        if shard_group.size() > 1 and shard_group.size() * replicas.size() != dist.get_world_size():
            raise UnsupportedModelError(
                f"HYBRID_SHARD over {shard_group.size()} x {replicas.size()} of {dist.get_world_size()} ranks: no process "
                "group holds exactly these. Let the two groups cover the world"
            )
        if shard_group.size() > 1:
            return _world()
    return _world() if group.size() == dist.get_world_size() else group


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    if world is None:
        raise UnsupportedModelError("the default process group is gone: build the average before destroying it")
    return world
