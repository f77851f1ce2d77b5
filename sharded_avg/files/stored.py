"""Tensors as they lie in a file, read a piece at a time.

    Stored          dtype, shape and strides of one tensor, and the bytes of the file that hold its elements
    StoredFile      one file: reads Boxes of its Stored tensors, after checking each member's checksum once
    torch_content   what torch.save put into an archive: plain values, with a Stored for each tensor

Nothing is mapped into memory: a file that shrinks while it is read is an error and not a signal, and what was read
does not count as this process's memory.
"""

from __future__ import annotations

import ctypes
import io
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..shard import Box
from .archive import Record, read_record, verify
from .pickles import ClassName, Inert, load_inert

PIECE_BYTES = 32 << 20
_BUFFER_BYTES = 64 << 10
_MAX_ELEMENTS = 2**62
_MAX_PICKLE_BYTES = 1 << 30
_MAX_DEPTH = 100
_REBUILD = {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"}
_PARAMETER = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
_WITH_ATTRIBUTES = "torch._tensor._rebuild_from_type_v2"  # FSDP1 leaves some on the tensors of a full state dict
_TENSORS = {"torch.Tensor", "torch.nn.parameter.Parameter"}
_SETS = {"builtins.set", "__builtin__.set", "builtins.frozenset", "__builtin__.frozenset"}
_PLAIN = {
    "collections.OrderedDict",
    "torch.Size",
    "torch.device",
    "torch.serialization._get_layout",
    "_codecs.encode",  # bytes, in protocol 2
    "_io.BytesIO",  # modules' extra state
}
_BYTES = {f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("bytes", "bytearray")}
STORAGE_DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
    "Untyped": torch.uint8,
}


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor in a file. `offset` is where element 0 lies; strides are in elements, `record` has all of them."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # bytes
    record: Record

    def __post_init__(self) -> None:
        sizes = (*self.shape, *self.stride, self.offset)
        if len(self.shape) != len(self.stride) or not all(is_size(size) for size in sizes):
            raise CheckpointError("a tensor of a shape or strides that cannot be")  # unprinted: they may be anything
        span = covered(self.shape, self.stride)
        room = (self.record.offset + self.record.nbytes - self.offset) // self.dtype.itemsize
        if self.offset < self.record.offset or max(span, prod(self.shape)) > room:
            raise CheckpointError(f"a tensor of shape {self.shape} in {self.record.nbytes} bytes, which cannot be")


def is_size(value: object) -> bool:
    """Whether a number from a file can be a size or an offset."""
    return type(value) is int and 0 <= value < _MAX_ELEMENTS


def covered(shape: Sequence[int], stride: Sequence[int]) -> int:
    """How many elements of the storage a strided tensor reaches over."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a row-major tensor."""
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, to read into or write from; keep the tensor alive meanwhile."""
    count = tensor.numel() * tensor.dtype.itemsize
    return memoryview((ctypes.c_char * count).from_address(tensor.data_ptr())).cast("B") if count else memoryview(b"")


class StoredFile:
    """An ordinary file with Stored tensors in it. Raises `CheckpointError` for anything that is not one."""

    _kept: Any = None

    def __init__(self, path: str | os.PathLike[str], nbytes: int | None = None) -> None:
        """`nbytes`: given for a file that is not on a disk."""
        self.path = Path(path)
        self._verified: set[Record] = set()
        if nbytes is not None:
            self.nbytes = nbytes
            return
        try:
            status = self.path.stat()
        except OSError as error:
            raise CheckpointError(f"{str(path)!r} cannot be read: {error.strerror}") from error
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{str(path)!r} is not an ordinary file")
        self.nbytes = status.st_size

    def open(self) -> BinaryIO:
        """The file, unbuffered."""
        return open(self.path, "rb", buffering=0)

    @contextmanager
    def reading(self) -> Iterator[BinaryIO]:
        """The file, open meanwhile, or for as long as it is kept open."""
        if self._kept is not None:
            yield self._kept
        else:
            with self.open() as file:
                yield file

    @contextmanager
    def kept_open(self) -> Iterator[None]:
        """For many small reads of parts that lie together."""
        with self.open() as file, io.BufferedReader(file, _BUFFER_BYTES) as self._kept:  # type: ignore[type-var]
            try:
                yield
            finally:
                self._kept = None

    def read(self, stored: Stored, box: Box | None = None) -> Tensor:
        """The elements of `box`, or all of them. Raises `CheckpointError` if the bytes have changed."""
        box = Box.whole(stored.shape) if box is None else box
        full = torch.empty(box.lengths, dtype=stored.dtype)
        self.read_into(full, stored, box)
        return full

    def read_into(self, target: Tensor, stored: Stored, box: Box) -> None:
        """As `read`, into a CPU tensor of the same dtype and the shape of the Box."""
        if not box.numel:
            return
        start = sum(offset * step for offset, step in zip(box.offsets, stored.stride, strict=True))
        try:
            with self.reading() as file:
                if stored.record not in self._verified:
                    verify(file, stored.record)
                    self._verified.add(stored.record)
                _fill(file, target, stored.offset + start * stored.dtype.itemsize, stored.stride)
        except OSError as error:
            raise CheckpointError(f"{str(self.path)!r} cannot be read: {error}") from error
        except CheckpointError as error:
            raise CheckpointError(f"{str(self.path)!r} is damaged: {error}") from error


def _fill(file: BinaryIO, target: Tensor, offset: int, stride: tuple[int, ...]) -> None:
    """Read a strided tensor that begins at byte `offset`, with at most PIECE_BYTES beside it."""
    shape, itemsize = target.shape, target.dtype.itemsize
    wanted = contiguous_stride(shape)
    runs_on = all(size == 1 or step == want for size, step, want in zip(shape, stride, wanted, strict=True))
    if target.is_contiguous() and runs_on:
        _read_exactly(file, offset, bytes_of(target))
        return
    span = covered(shape, stride)
    if span * itemsize <= PIECE_BYTES:
        buffer = torch.empty(span, dtype=target.dtype)
        _read_exactly(file, offset, bytes_of(buffer))
        target.copy_(buffer.as_strided(shape, stride))
        return
    dim = max((d for d in range(len(shape)) if shape[d] > 1), key=lambda d: stride[d])
    half = shape[dim] // 2
    _fill(file, target.narrow(dim, 0, half), offset, stride)
    _fill(file, target.narrow(dim, half, shape[dim] - half), offset + half * stride[dim] * itemsize, stride)


def _read_exactly(file: BinaryIO, offset: int, target: memoryview) -> None:
    file.seek(offset)
    while target.nbytes:
        count = file.readinto(target[: 1 << 30])  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError("it ends early: it was cut short, or is still being written")
        target = target[count:]


def torch_content(file: BinaryIO, members: dict[str, Record], *, what: str, foreign: bool = False) -> Any:
    """The object that torch.save wrote: plain values, and a Stored for each tensor.

    Opening runs nothing of the file, and reads no tensor. Raises `CheckpointError` for classes that a file of weights
    does not need; with `foreign`, a word stands in the place of their objects instead.
    """
    if "data.pkl" not in members:
        raise CheckpointError(f"{what} is not a file of torch.save: it has no data.pkl")
    if "byteorder" in members and read_record(file, members["byteorder"], max_bytes=16) != b"little":
        raise CheckpointError(f"{what} was written on a big-endian machine, whose numbers are not read here")
    data = read_record(file, members["data.pkl"], max_bytes=_MAX_PICKLE_BYTES)

    def storage(pid: Any) -> _Storage:
        if isinstance(pid, tuple) and len(pid) == 5 and isinstance(pid[1], ClassName) and isinstance(pid[2], str):
            record = members.get(f"data/{pid[2]}")
            dtype = STORAGE_DTYPES.get(pid[1].kind.rpartition(".")[2].removesuffix("Storage"))
            if pid[0] == "storage" and record is not None and dtype is not None:
                return _Storage(dtype, record)
        raise CheckpointError(f"{what} is damaged: it describes a storage that is not in it")

    def admits(module: str, name: str) -> bool:
        return foreign or _admits(module, name)  # a foreign class is neither looked up nor called

    content = load_inert(data, admits, what=what, persistent=storage)
    return _Making(what, max_values=100_000 + 4 * len(data)).made(content)


_ADMITTED = _REBUILD | _PARAMETER | _SETS | _PLAIN | _BYTES | _TENSORS | {_WITH_ATTRIBUTES}


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: torch.dtype
    record: Record


def _admits(module: str, name: str) -> bool:
    kind = f"{module}.{name}"
    is_storage = module in {"torch", "torch.storage"} and name.removesuffix("Storage") in STORAGE_DTYPES
    is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
    return is_storage or is_dtype or kind in _ADMITTED


class _Making:
    """Puts tensors in place of their descriptions.

    A small pickle can describe an endless value, by naming one list twice in another, and so on: that is refused.
    """

    def __init__(self, what: str, max_values: int) -> None:
        self._what = what
        self._left = max_values
        self._objects: dict[int, Any] = {}  # so that bytes which are named a million times are there once

    def made(self, value: Any, depth: int = 0) -> Any:
        self._left -= 1
        if depth > _MAX_DEPTH or self._left < 0:
            raise CheckpointError(f"{self._what} holds more values, or deeper nested, than a file of weights does")
        if isinstance(value, dict):
            keys = [key.kind if isinstance(key, (Inert, ClassName)) else key for key in value]
            return {key: self.made(entry, depth + 1) for key, entry in zip(keys, value.values(), strict=True)}
        if isinstance(value, (list, tuple)):
            return type(value)(self.made(entry, depth + 1) for entry in value)
        if isinstance(value, Inert):
            if id(value) not in self._objects:
                self._objects[id(value)] = _object(value, self._what)
            return self._objects[id(value)]
        return getattr(torch, value.kind.rpartition(".")[2], value.kind) if isinstance(value, ClassName) else value


def _object(inert: Inert, what: str) -> Any:
    try:
        if inert.kind in _REBUILD:
            return _tensor(inert)
        if inert.kind in _PARAMETER:
            return _tensor(inert.args[0])
        if inert.kind == _WITH_ATTRIBUTES and inert.args[1].kind in _TENSORS:
            return _object(Inert(inert.args[0].kind, inert.args[2]), what)
        if inert.kind == "torch.Size":
            return tuple(inert.args[0])
        if inert.kind in _SETS:
            return list(inert.args[0])
        if inert.kind == "_codecs.encode":
            return _bytes(inert)
        if inert.kind in _BYTES:
            content = _bytes(inert.args[0] if inert.args else b"")
            return bytearray(content) if inert.kind.endswith("bytearray") else bytes(content)
        if inert.kind == "_io.BytesIO":
            return io.BytesIO(_bytes(inert.state[0]))
    except (CheckpointError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{what} is damaged: it describes {error}") from error
    return inert.args[0] if inert.args and isinstance(inert.args[0], str) else inert.kind


def _bytes(content: Any) -> bytes | bytearray:
    """What bytes are made of: bytes, or, in protocol 2, a text in latin1; never a number, which would be a length."""
    if isinstance(content, Inert) and content.kind == "_codecs.encode":
        content = content.args[0].encode("latin1")
    elif isinstance(content, Inert) and content.kind in _BYTES and not content.args:
        content = b""
    if not isinstance(content, (bytes, bytearray)):
        raise CheckpointError(f"bytes made of a {type(content).__name__}")
    return content


def _tensor(inert: Inert) -> Stored:
    storage, offset, shape, stride = inert.args[:4]
    dtype = storage.dtype
    if inert.kind.endswith("_v3"):
        dtype = getattr(torch, inert.args[6].kind.rpartition(".")[2])
    if not isinstance(shape, tuple) or not isinstance(stride, tuple) or not is_size(offset):
        raise CheckpointError("a tensor of a shape or strides that cannot be")
    return Stored(dtype, shape, stride, storage.record.offset + offset * dtype.itemsize, storage.record)
