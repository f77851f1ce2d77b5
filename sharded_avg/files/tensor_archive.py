"""The archive that torch.save writes for one tensor, of which a DCP folder has one for each piece.

Frame   all of it but the values: the same for every tensor of one shape and dtype, so it is made once, and one look
        tells whether an archive is of this kind
"""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections import OrderedDict
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple

import torch

from ..shard import Box
from .archive import Record
from .stored import STORAGE_DTYPES, contiguous_stride

LARGEST_BYTES = 1 << 30  # of values; beyond that, sizes may want the 64 bits that torch.save writes itself
_STORAGE_NAMES = {dtype: name for name, dtype in STORAGE_DTYPES.items() if name != "Untyped"}
_LOCAL, _ENTRY, _END = struct.Struct("<4sHHHHHIIIHH"), struct.Struct("<4sHHHHHHIIIHHHHHII"), struct.Struct("<4s4H2IH")
_DATE = 0x21  # 1 January 1980, the first day of a zip file
_ALIGNMENT = 64


class Frame(NamedTuple):
    """An archive of one tensor but for its values, and for their checksum at the two places that are left out."""

    before: bytes
    between: bytes
    after: bytes
    end: bytes

    @property
    def nbytes(self) -> int:
        """Without the values."""
        return sum(map(len, self)) + 8

    def around(self, values: memoryview) -> tuple[bytes | memoryview, ...]:
        """The whole archive, in parts."""
        checksum = struct.pack("<I", zlib.crc32(values))
        return self.before, checksum, self.between, values, self.after, checksum, self.end

    def find(self, file: BinaryIO, start: int, nbytes: int) -> Record | None:
        """Where the values lie, if this frame begins at `start` of the file, around `nbytes` of values."""
        file.seek(start)
        front = file.read(len(self.before) + 4 + len(self.between))
        at = start + len(front)
        file.seek(at + nbytes)
        back = file.read(len(self.after) + 4 + len(self.end))
        checksum = front[len(self.before) : len(self.before) + 4]
        mine = front == self.before + checksum + self.between and back == self.after + checksum + self.end
        return Record(at, nbytes, int.from_bytes(checksum, "little")) if mine else None


@lru_cache(maxsize=4096)
def frame_of(dtype: torch.dtype, shape: tuple[int, ...]) -> Frame:
    """The archive that torch.save writes for a contiguous tensor; its values are the last member."""
    nbytes = Box.whole(shape).numel * dtype.itemsize
    members = [("data.pkl", _pickled(dtype, shape)), ("byteorder", b"little"), ("version", b"3\n")]
    written, entries = b"", b""
    for name, data in [*members, ("data/0", None)]:
        full = f"archive/{name}".encode()
        size, checksum = (nbytes, 0) if data is None else (len(data), zlib.crc32(data))
        begin = len(written) + _LOCAL.size + len(full) + 4
        num_pad = -begin % _ALIGNMENT
        extra = b"" if data is not None else struct.pack("<2sH", b"FB", num_pad) + b"Z" * num_pad
        common = (0, 0, 0, _DATE, checksum, size, size, len(full))
        entries += _ENTRY.pack(b"PK\x01\x02", 20, 20, *common, 0, 0, 0, 0, 0, len(written)) + full
        at = len(written) + 14  # of the checksum, in the last member's header
        written += _LOCAL.pack(b"PK\x03\x04", 20, *common, len(extra)) + full + extra + (data or b"")
    end = _END.pack(b"PK\x05\x06", 0, 0, 4, 4, len(entries), len(written) + nbytes, 0)
    last = len(entries) - _ENTRY.size - len(b"archive/data/0") + 16
    return Frame(written[:at], written[at + 4 :], entries[:last], entries[last + 4 :] + end)


class _Storage(NamedTuple):
    """Stands for a storage in a pickle."""

    dtype: torch.dtype
    numel: int


class _Tensor(NamedTuple):
    """Stands for a tensor in a pickle."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class _Pickler(pickle.Pickler):
    """Writes what torch.save writes about a tensor, without the tensor."""

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        name = _STORAGE_NAMES.get(obj.dtype)
        if name is None:  # dtypes younger than typed storages
            return "storage", torch.UntypedStorage, "0", "cpu", obj.numel * obj.dtype.itemsize
        return "storage", getattr(torch, f"{name}Storage"), "0", "cpu", obj.numel

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _Tensor):
            return NotImplemented
        storage = _Storage(obj.dtype, Box.whole(obj.shape).numel)
        args: tuple[Any, ...] = (storage, 0, obj.shape, contiguous_stride(obj.shape), False, OrderedDict())
        if obj.dtype in _STORAGE_NAMES:
            return torch._utils._rebuild_tensor_v2, args
        return torch._utils._rebuild_tensor_v3, (*args, obj.dtype)


def _pickled(dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, protocol=2).dump(_Tensor(dtype, shape))
    return stream.getvalue()
