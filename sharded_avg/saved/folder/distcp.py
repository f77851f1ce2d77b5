"""What torch.distributed.checkpoint (DCP) finds in a folder, written without its planner.

    write_pieces   one rank's file: an archive of torch.save for each piece, one after the other
    index_of       the index of all ranks' files, which DCP reads first; written last

A save of many small tensors is mostly overhead: DCP plans, copies and pickles each of them several times.
"""

from __future__ import annotations

import errno
import io
import os
import pickle
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import torch

from ...errors import CheckpointError
from ...files.stored import bytes_of
from ...files.tensor_archive import LARGEST_BYTES, frame_of
from ...shard import Box
from .claims import Piece

_LOST = {errno.EIO, errno.ENOSPC, errno.EDQUOT}  # others say that there is no disk behind this stream


class Written(NamedTuple):
    """Where a piece, or an object (`box` is `None`), lies in the folder."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    box: Box | None
    file: str
    offset: int
    nbytes: int


def write_pieces(stream: BinaryIO, file: str, pieces: Iterable[Piece], objects: Mapping[str, Any]) -> list[Written]:
    """Write one rank's file, called `file` in the folder; the result is what `index_of` needs of it."""
    found, position = [], 0
    for piece in pieces:
        values = piece.values.detach().to("cpu").contiguous()
        nbytes = values.numel() * values.element_size()
        if nbytes > LARGEST_BYTES:
            torch.save(values.clone() if values.untyped_storage().nbytes() > nbytes else values, stream)
            size = stream.tell() - position
        else:
            parts = frame_of(values.dtype, tuple(values.shape)).around(bytes_of(values))
            stream.writelines(parts)
            size = sum(map(len, parts))
        found.append(Written(piece.key, piece.shape, values.dtype, piece.box, file, position, size))
        position += size
    for key, value in objects.items():
        archive = io.BytesIO()
        torch.save(value, archive)
        stream.write(archive.getbuffer())
        found.append(Written(key, (), None, None, file, position, archive.tell()))
        position += archive.tell()
    return found


def index_of(ranks: Sequence[Sequence[Written]]) -> bytes:
    """The index of what each rank has written. Raises `CheckpointError` unless every tensor is whole."""
    from torch.distributed.checkpoint import metadata as dcp  # a second to import, for rank 0 only
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    tensors: dict[str, dcp.TensorStorageMetadata | dcp.BytesStorageMetadata] = {}
    places: dict[dcp.MetadataIndex, _StorageInfo] = {}
    properties: dict[torch.dtype, dcp.TensorProperties] = {}
    sizes: dict[tuple[int, ...], torch.Size] = {}  # one object for equal ones, which a pickle writes once

    def size_of(values: tuple[int, ...]) -> torch.Size:
        return sizes.setdefault(values, torch.Size(values))

    for item in (item for written in ranks for item in written):
        place = _StorageInfo(item.file, item.offset, item.nbytes)
        if item.box is None or item.dtype is None:
            tensors[item.key] = dcp.BytesStorageMetadata()
            places[dcp.MetadataIndex(item.key)] = place
            continue
        if item.dtype not in properties:
            properties[item.dtype] = dcp.TensorProperties(dtype=item.dtype)
        entry = tensors.get(item.key)
        if entry is None:
            entry = dcp.TensorStorageMetadata(properties[item.dtype], size_of(item.shape), [])
            tensors[item.key] = entry
        if not isinstance(entry, dcp.TensorStorageMetadata) or tuple(entry.size) != item.shape:
            raise CheckpointError(f"{item.key!r} has another shape on another rank: {item.shape}")
        offsets = size_of(item.box.offsets)
        places[dcp.MetadataIndex(item.key, offsets, len(entry.chunks))] = place
        entry.chunks.append(dcp.ChunkStorageMetadata(offsets, size_of(item.box.lengths)))
    for key, entry in tensors.items():
        if isinstance(entry, dcp.TensorStorageMetadata):
            covered = sum(chunk.sizes.numel() for chunk in entry.chunks)
            if covered != entry.size.numel():
                raise CheckpointError(
                    f"the pieces of {key!r} that ranks hold have {covered} elements, and {tuple(entry.size)} has "
                    f"{entry.size.numel()}: they are cut in different ways, or a rank is missing"
                )
    paths = {key: tuple(key.split(".", 1)) for key in tensors}
    whole = dcp.Metadata(tensors, paths, places)
    if hasattr(whole, "storage_meta"):
        whole.storage_meta = dcp.StorageMeta()
    if hasattr(whole, "version"):
        whole.version = "1.0.0"
    return pickle.dumps(whole)


def sync(stream: BinaryIO) -> None:
    """Through to the disk, where there is one."""
    stream.flush()
    try:
        os.fsync(stream.fileno())
    except (AttributeError, io.UnsupportedOperation):  # a stream to somewhere else
        return
    except OSError as failure:
        if failure.errno in _LOST:
            raise
