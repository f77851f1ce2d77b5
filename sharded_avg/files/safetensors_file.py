"""Safetensors files, as a source: one, or the several that a model.safetensors.index.json names.

    SafetensorsFiles  reads a piece at a time, whatever the size of the files
    safetensors_of    the files that a path stands for

The header is read here rather than by the safetensors package: that maps the whole file, so that what was read counts
as this process's memory; and so no package is needed to read a file that anyone might have made.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..shard import Box
from .archive import Record
from .facts import MAX_JSON_BYTES, METADATA_KEY, load_facts, load_json
from .source import AbstractSource, TensorInfo
from .stored import Stored, StoredFile, contiguous_stride

INDEX_SUFFIX = ".safetensors.index.json"
DTYPE_NAMES = {  # of the safetensors format -> of torch
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}


class SafetensorsFiles(AbstractSource):
    """A .safetensors file, its index, or a folder that holds one of these. Raises `CheckpointError` if damaged."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._places: dict[str, tuple[StoredFile, Stored]] = {}
        self.metadata: dict[str, str] = {}
        for file in safetensors_of(Path(path)):
            self._enter(StoredFile(file))
        self.infos = {name: TensorInfo(stored.shape, stored.dtype) for name, (_, stored) in self._places.items()}
        self.facts = {**load_facts(self.metadata.get(METADATA_KEY, "{}")), "format": "safetensors"}

    def _enter(self, file: StoredFile) -> None:
        """Add the tensors of one file, which must lie one behind the other and fill it."""
        what = repr(str(file.path))
        header, start = _header(file)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise CheckpointError(f"the header of {what} is damaged: its metadata are not strings")
        self.metadata.update(metadata)
        last = 0
        for name, entry in sorted(header.items(), key=lambda item: _data_offsets(item[1], what)):
            stored = _stored(entry, start, what)
            if stored.offset - start != last or name in self._places:
                raise CheckpointError(f"{what} is damaged: {name!r} overlaps another tensor, or is twice")
            last += stored.record.nbytes
            self._places[name] = file, stored
        if start + last != file.nbytes:
            raise CheckpointError(f"{what} was cut short: {file.nbytes} bytes, and not {start + last}")

    def read(self, name: str, box: Box | None = None) -> Tensor:
        file, stored = self._places[name]
        return file.read(stored, box)


def safetensors_of(path: Path) -> list[Path]:
    """The files that hold the tensors of a file, an index or a folder; none if it is none of these."""
    if path.is_dir():
        found = sorted(path.glob(f"*{INDEX_SUFFIX}")) or sorted(path.glob("*.safetensors"))
        if len(found) > 1:
            raise ConfigError(f"{str(path)!r} holds {[file.name for file in found]}: name one of these files")
        return safetensors_of(found[0]) if found else []
    if not path.name.endswith(INDEX_SUFFIX):
        return [path] if path.suffix == ".safetensors" else []
    index = load_json(StoredFile(path).path.read_text(encoding="utf-8", errors="replace"), repr(str(path)))
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{str(path)!r} is damaged: it has no weight_map of names to files")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{str(path)!r} names the file {name!r}, which is none of its own folder: not opened")
    return [path.with_name(name) for name in names]


def _header(file: StoredFile) -> tuple[dict[str, Any], int]:
    """The header of a file, and where its tensors begin."""
    what = repr(str(file.path))
    with file.open() as stream:
        prefix = stream.read(8)
        count = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or count > min(MAX_JSON_BYTES, file.nbytes - 8):
            raise CheckpointError(f"{what} is no safetensors file, or was cut short: its header has {count} bytes")
        data = stream.read(count)
    header = load_json(data.decode("utf-8", errors="replace"), f"the header of {what}")
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {what} is damaged: it is no dict")
    return header, 8 + count


def _data_offsets(entry: Any, what: str) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(o) is int and o >= 0 for o in offsets):
        raise CheckpointError(f"{what} is damaged: a tensor lies at {str(offsets)[:50]}")
    return offsets[0], offsets[1]


def _stored(entry: dict[str, Any], start: int, what: str) -> Stored:
    begin, end = _data_offsets(entry, what)
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(dtype, str) or dtype not in DTYPE_NAMES or not isinstance(shape, list):
        raise CheckpointError(f"{what} holds a tensor of dtype {str(dtype)[:50]!r}, which is not known here")
    try:
        sizes = tuple(size if type(size) is int else -1 for size in shape)
        record = Record(start + begin, end - begin, 0)
        stored = Stored(getattr(torch, DTYPE_NAMES[dtype]), sizes, contiguous_stride(sizes), start + begin, record)
    except CheckpointError as error:
        raise CheckpointError(f"{what} is damaged: it has {error}") from error
    if TensorInfo(sizes, stored.dtype).nbytes != record.nbytes:
        raise CheckpointError(f"{what} is damaged: {record.nbytes} bytes for a tensor of shape {sizes}")
    return stored
