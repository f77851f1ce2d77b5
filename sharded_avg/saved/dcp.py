"""Shards as items of torch.distributed.checkpoint (DCP).

A ShardItem stands for one averaged tensor in a DCP state dict: it writes this rank's pieces as Boxes under the
tensor's own name and full shape, and reads whatever Boxes the plan asks for straight into the store. DCP reshards.

    writing   __create_write_items__ -> one write item for each Box;  __get_tensor_shard__ hands out the values
    reading   __create_chunk_list__  -> the Boxes wanted;             __get_tensor_shard__ hands out the destination

An average that has not started has nothing to write. Its items then write the word NOT_STARTED, so that the keys
exist and a checkpoint saved before the first update can be loaded like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from ..errors import CheckpointError
from ..ranks import everyone, size_of
from ..shard import Box, Patch, Region, patches
from .folder.claims import Piece, apart_error, claim_of, may_be_held_twice, window

NOT_STARTED = "not started"


def chunk_of(box: Box) -> ChunkStorageMetadata:
    """DCP's word for a Box."""
    return ChunkStorageMetadata(offsets=torch.Size(box.offsets), sizes=torch.Size(box.lengths))


class ClaimIndex(MetadataIndex):
    """DCP's index of a piece until its planner has gone through all ranks' plans; then a plain one takes its place.

    DCP looks for duplicates in a dict, and gives each index that it keeps a number, by `dataclasses.replace`.
    """

    claim: Any
    rank: int

    def __new__(
        cls, fqn: str, offset: Sequence[int] | None = None, index: int | None = None, claim: Any = None, rank: int = 0
    ) -> Any:
        if claim is None:
            return MetadataIndex(fqn, offset, index)
        return object.__new__(cls)

    def __init__(
        self, fqn: str, offset: Sequence[int] | None = None, index: int | None = None, claim: Any = None, rank: int = 0
    ) -> None:
        super().__init__(fqn, offset, index)
        object.__setattr__(self, "claim", claim)
        object.__setattr__(self, "rank", rank)

    def __reduce__(self) -> Any:
        return ClaimIndex, (self.fqn, self.offset, self.index, self.claim, self.rank)

    def __eq__(self, other: object) -> bool:
        equal = isinstance(other, MetadataIndex) and (self.fqn, self.offset) == (other.fqn, other.offset)
        if equal and isinstance(other, ClaimIndex) and self.claim != other.claim:
            raise CheckpointError(apart_error([self.fqn], sorted((self.rank, other.rank))))
        return equal

    __hash__ = MetadataIndex.__hash__


class ShardItem(Tensor):
    """One averaged tensor in a DCP state dict.

    DCP takes only tensors apart, so this is one: it has the full shape and dtype and no data, and refuses arithmetic.
    `local` is this rank's average, shaped like the region; `None` before the first update. `destination` finds out,
    when the first byte arrives, where a value that is read goes; it may allocate, and is a plain function, which
    copies of the item share. `writes=False`: another rank writes this piece, which may differ here (a
    buffer of which every rank has its own values). DCP's asynchronous save copies the attributes of a tensor
    subclass, and with `local` the values, before training goes on.
    """

    _patches: dict[tuple[int, ...], Patch]
    _local: Tensor | None
    _destination: Callable[[], Tensor]
    _writes: bool
    is_read: bool  # a load has asked for it

    @staticmethod
    def __new__(
        cls,
        shape: torch.Size,
        region: Region,
        dtype: torch.dtype,
        local: Tensor | None,
        destination: Callable[[], Tensor],
        *,
        writes: bool = True,
    ) -> ShardItem:
        item: ShardItem = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=torch.device("cpu"))
        item._patches = {patch.box.offsets: patch for patch in patches(region, tuple(shape))}
        item._local = local
        item._destination = destination
        item._writes = writes
        item.is_read = False
        return item

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in (torch.ops.aten.new_empty.default, torch.ops.aten.zeros_like.default):  # how DCP begins a copy,
            # whose attributes it sets afterwards; an older one, such as torch 2.8's, calls `copy_`
            return Tensor._make_wrapper_subclass(cls, args[0].shape, dtype=args[0].dtype, device=torch.device("cpu"))
        if func is torch.ops.aten.copy_.default and all(isinstance(item, ShardItem) for item in args[:2]):
            return args[0]._become(args[1])
        if func is torch.ops.aten.copy_.default and not args[0].ndim:
            raise CheckpointError(
                f"dcp.async_save of torch {torch.__version__} copies what has no dimensions as a number, which its "
                "average is not: call average.async_save(folder) beside it, or dcp.save"
            )
        raise CheckpointError(
            f"{func} on an item of ShardedAverage.state_dict(): such items hold pieces, not values. Pass the state "
            "dict to torch.distributed.checkpoint, or use save(), or summon_full_params() for full tensors"
        )

    def _become(self, other: ShardItem) -> ShardItem:
        """With values of its own: training goes on while they are written."""
        vars(self).update(vars(other))
        self._local = None if other._local is None else other._local.detach().clone()
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise CheckpointError(
            "an item of ShardedAverage.state_dict() cannot be pickled: it stands for pieces on several ranks. Use "
            "save() or torch.distributed.checkpoint, or torch.save what summon_full_params() yields"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ShardItem({tuple(self.shape)}, {self.dtype}, boxes={[p.box for p in self._patches.values()]})"

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        self.is_read = False
        if self._local is None:
            return [WriteItem(index=MetadataIndex(fqn), type=WriteItemType.BYTE_IO)]
        size, properties, num_ranks = tuple(self.shape), TensorProperties(dtype=self.dtype), size_of(everyone(None))
        items = []
        for patch in self._patches.values() if self._writes else ():
            index = MetadataIndex(fqn, torch.Size(patch.box.offsets))
            if num_ranks > 1 and may_be_held_twice(patch.box, size, num_ranks):
                claim = claim_of(Piece(fqn, size, patch.box, window(self._local, patch)))
                index = ClaimIndex(fqn, patch.box.offsets, claim=claim, rank=dist.get_rank())
            data = TensorWriteData(chunk_of(patch.box), properties, self.shape)
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        return items

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        self.is_read = True  # only a load asks this
        return [chunk_of(patch.box) for patch in self._patches.values()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor | str:
        if index.offset is None:
            return NOT_STARTED
        local = self._destination() if self.is_read or self._local is None else self._local
        return window(local, self._patches[tuple(index.offset)])
