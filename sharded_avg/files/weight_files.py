"""Single files of full tensors, as sources.

    TorchFile         what torch.save wrote: `content` is the whole object with a Stored for each tensor
    SafetensorsFiles  one .safetensors file, or the several that a model.safetensors.index.json names

Both read a piece at a time, whatever the size of the file, and run nothing of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..shard import Box
from .archive import Record, is_archive, read_record, records
from .source import AbstractSource, TensorInfo
from .stored import Stored, StoredFile, contiguous_stride, torch_content

INDEX_SUFFIX = ".safetensors.index.json"
METADATA_KEY = "sharded_avg"  # facts: in the header of a safetensors file, and beside the tensors of a torch file
_MAX_JSON_BYTES = 256 << 20
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
_DTYPES = {name: getattr(torch, there) for name, there in DTYPE_NAMES.items()}


class TorchFile(AbstractSource):
    """A file of torch.save, in the zip format that torch has written since 1.6.

    `content` is the saved object: dicts, lists and plain values, with a Stored in place of each tensor, none of them
    read yet. As a source it has every tensor of a flat or nested dict, under its keys joined by dots.
    Raises `CheckpointError` for what is damaged, or needs classes beyond tensors and plain values; with `foreign`, a
    word stands in the place of each object of such a class.
    """

    def __init__(self, path: str | os.PathLike[str], *, foreign: bool = False) -> None:
        self._file = StoredFile(path)
        what = repr(str(path))
        try:
            with self._file.open() as file:
                if not is_archive(file):
                    raise CheckpointError(
                        f"{what} is not a file that torch.save writes today. If torch.load opens it, save it again"
                    )
                members = records(file, 0, self._file.nbytes)
                self.content: Any = torch_content(file, members, what=what, foreign=foreign)
                self._facts = _facts_member(file, members, what)
        except OSError as error:
            raise CheckpointError(f"{what} cannot be read: {error}") from error
        except CheckpointError as error:
            raise CheckpointError(f"{error}" if what in str(error) else f"{what} is damaged: {error}") from error
        self._tensors = dict(flat_tensors(self.content))

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(tuple(stored.shape), stored.dtype) for name, stored in self._tensors.items()}

    def read(self, name: str, box: Box | None = None) -> Tensor:
        return self._file.read(self._tensors[name], box)

    def ties(self) -> dict[str, str]:
        """Further names of one and the same tensor -> its first name."""
        first: dict[Stored, str] = {}
        named = {
            name: first.setdefault(stored, name) for name, stored in self._tensors.items() if 0 not in stored.shape
        }
        return {name: original for name, original in named.items() if name != original}

    def read_stored(self, stored: Stored) -> Tensor:
        """One tensor of `content`."""
        return self._file.read(stored)

    @property
    def facts(self) -> Mapping[str, Any]:
        return {**self._facts, "format": "torch"}


def _facts_member(file: BinaryIO, members: Mapping[str, Record], what: str) -> dict[str, Any]:
    """What `write_torch` put beside the tensors; torch.load does not look at it."""
    if METADATA_KEY not in members:
        return {}
    return _facts(read_record(file, members[METADATA_KEY], max_bytes=_MAX_JSON_BYTES).decode(errors="replace"))


def _facts(text: str) -> dict[str, Any]:
    facts = load_json(text, "what a file says about its average")
    aliases = facts.get("aliases", {}) if isinstance(facts, dict) else None
    if not isinstance(aliases, dict) or not isinstance(facts.get("average", ""), str):
        raise CheckpointError("what a file says about its average is damaged: it is not what this package writes")
    return {str(key): value for key, value in facts.items()}


def flat_tensors(content: Any, prefix: str = "") -> Iterator[tuple[str, Stored]]:
    """Every Stored of nested dicts, lists and tuples, under its keys joined by dots."""
    if isinstance(content, Stored):
        yield prefix, content
    elif isinstance(content, (dict, list, tuple)):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from flat_tensors(value, f"{prefix}.{key}" if prefix else str(key))


class SafetensorsFiles(AbstractSource):
    """A .safetensors file, its index, or a folder that holds one of these.

    The header is read here rather than by the safetensors package: that maps the whole file, so that what was read
    counts as this process's memory; and so no package is needed to read a file that anyone might have made.
    Raises `CheckpointError` for what is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._places: dict[str, tuple[StoredFile, Stored]] = {}
        self.metadata: dict[str, str] = {}
        for file in safetensors_of(Path(path)):
            self._enter(StoredFile(file))

    def _enter(self, file: StoredFile) -> None:
        header, start = _header(file)
        self.metadata.update(_strings(header.pop("__metadata__", {}), file))
        last = 0
        for name, entry in sorted(header.items(), key=lambda item: _begin(item[1], file)):
            stored = _stored(entry, start, file)
            if stored.offset - start != last or name in self._places:
                raise CheckpointError(f"{str(file.path)!r} is damaged: {name!r} overlaps another tensor, or is twice")
            last += stored.record.nbytes
            self._places[name] = file, stored
        if start + last != file.nbytes:
            raise CheckpointError(f"{str(file.path)!r} was cut short: {file.nbytes} bytes, and not {start + last}")

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(stored.shape, stored.dtype) for name, (_, stored) in self._places.items()}

    def read(self, name: str, box: Box | None = None) -> Tensor:
        file, stored = self._places[name]
        return file.read(stored, box)

    @property
    def facts(self) -> Mapping[str, Any]:
        return {**_facts(self.metadata.get(METADATA_KEY, "{}")), "format": "safetensors"}


def safetensors_of(path: Path) -> list[Path]:
    """The files that hold the tensors of a file, an index or a folder; none if it is none of these."""
    if path.is_dir():
        found = sorted(path.glob(f"*{INDEX_SUFFIX}")) or sorted(path.glob("*.safetensors"))
        if len(found) > 1:
            raise ConfigError(f"{str(path)!r} holds {[file.name for file in found]}: name one of these files")
        return safetensors_of(found[0]) if found else []
    if path.name.endswith(INDEX_SUFFIX):
        return _files_of_index(path)
    return [path] if path.suffix == ".safetensors" else []


def _files_of_index(path: Path) -> list[Path]:
    index = load_json(StoredFile(path).path.read_text(encoding="utf-8", errors="replace"), repr(str(path)))
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{str(path)!r} is damaged: it has no weight_map of names to files")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{str(path)!r} names the file {name!r}, which is none of its own folder: not opened")
    return [path.with_name(name) for name in names]


def load_json(text: str, what: str) -> Any:
    """JSON as the standard has it, without NaN; raises `CheckpointError` for anything else."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is damaged: it is no JSON ({error})") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _header(file: StoredFile) -> tuple[dict[str, Any], int]:
    what = repr(str(file.path))
    with file.open() as stream:
        prefix = stream.read(8)
        count = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or count > min(_MAX_JSON_BYTES, file.nbytes - 8):
            raise CheckpointError(f"{what} is no safetensors file, or was cut short: its header has {count} bytes")
        data = stream.read(count)
    header = load_json(data.decode("utf-8", errors="replace"), f"the header of {what}")
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {what} is damaged: it is no dict")
    return header, 8 + count


def _begin(entry: Any, file: StoredFile) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(o) is int and o >= 0 for o in offsets):
        raise CheckpointError(f"{str(file.path)!r} is damaged: a tensor lies at {str(offsets)[:50]}")
    return offsets[0], offsets[1]


def _stored(entry: dict[str, Any], start: int, file: StoredFile) -> Stored:
    begin, end = _begin(entry, file)
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(dtype, str) or dtype not in _DTYPES or not isinstance(shape, list):
        raise CheckpointError(
            f"{str(file.path)!r} holds a tensor of dtype {str(dtype)[:50]!r}, which is not known here"
        )
    try:
        sizes = tuple(size if type(size) is int else -1 for size in shape)
        record = Record(start + begin, end - begin, 0)
        stored = Stored(_DTYPES[dtype], sizes, contiguous_stride(sizes), start + begin, record)
    except CheckpointError as error:
        raise CheckpointError(f"{str(file.path)!r} is damaged: it has {error}") from error
    if TensorInfo(sizes, stored.dtype).nbytes != record.nbytes:
        raise CheckpointError(f"{str(file.path)!r} is damaged: {record.nbytes} bytes for a tensor of shape {sizes}")
    return stored


def _strings(metadata: Any, file: StoredFile) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"the header of {str(file.path)!r} is damaged: its metadata are not strings")
    return metadata
