"""Sources written to files, a slab at a time.

    write_safetensors         one file, or the several of a given size that model.safetensors.index.json names
    write_torch               one file that torch.load(weights_only=True) reads
    appearing                 a file that has its name only when it is whole

Each holds one slab (source.SLAB_BYTES) at a time, whatever the size of the tensors. The writers are our own because
the libraries' want whole tensors, or all of them, in memory: `safetensors.torch.save_file` and `torch.save`.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..shard import Box
from .facts import METADATA_KEY
from .safetensors_file import DTYPE_NAMES, INDEX_SUFFIX
from .source import AbstractSource, slabs
from .stored import STORAGE_DTYPES, bytes_of, contiguous_stride

_ALIGNMENT = 64
_DTYPE_CODES = {getattr(torch, name): code for code, name in DTYPE_NAMES.items()}
_STORAGE_NAMES = {dtype: name for name, dtype in STORAGE_DTYPES.items() if name != "Untyped"}


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, which becomes `path` at the end, or is removed if the body raises."""
    incoming = path.with_name(f".{path.name}.incoming-{os.getpid()}")
    try:
        yield incoming
        _flush(incoming)
        os.replace(incoming, path)
    finally:
        incoming.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_safetensors(
    source: AbstractSource, path: Path, facts: Mapping[str, Any], *, max_file_bytes: int | None = None
) -> None:
    """Write one file at `path`, or, with `max_file_bytes`, a folder as the Hugging Face ecosystem reads it.

    A tensor that is larger than `max_file_bytes` gets a file of its own. Raises `ConfigError` for a dtype that the
    format lacks, and for a folder that already has weights of that kind.
    """
    lacking = sorted({str(info.dtype) for info in source.infos.values() if info.dtype not in _DTYPE_CODES})
    if lacking:
        raise ConfigError(f"the safetensors format has no {lacking}: pass --dtype, or write a torch file")
    metadata = {"format": "pt", METADATA_KEY: json.dumps(dict(facts))}
    if max_file_bytes is None:
        with appearing(path) as incoming:
            _write_one(source, list(source.infos), incoming, metadata)
    else:
        _write_several(source, path, metadata, max_file_bytes)


def _write_one(source: AbstractSource, names: list[str], path: Path, metadata: Mapping[str, str]) -> None:
    # Widest dtype first, as the library does: then every tensor is aligned to its own elements.
    names = sorted(names, key=lambda name: (-source.infos[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name in names:
        info = source.infos[name]
        stop = position + info.nbytes
        header[name] = {
            "dtype": _DTYPE_CODES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [position, stop],
        }
        position = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            _write_tensor(source, name, file)


def _write_tensor(source: AbstractSource, name: str, file: IO[bytes]) -> None:
    for box in slabs(source.infos[name]):
        values = source.read(name, box).contiguous()
        file.write(bytes_of(values))


def _write_several(source: AbstractSource, folder: Path, metadata: Mapping[str, str], max_file_bytes: int) -> None:
    groups: list[list[str]] = [[]]  # names in order, cut where the next tensor would not fit
    filled = total = 0
    for name, info in source.infos.items():
        if groups[-1] and filled + info.nbytes > max_file_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += info.nbytes
        total += info.nbytes
    files = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    if len(groups) == 1:
        files = ["model.safetensors"]
    before = sorted(entry.name for entry in folder.glob("model*.safetensors*")) if folder.exists() else []
    if before:
        raise ConfigError(f"{str(folder)!r} already holds {before}: choose a new folder, or remove them")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / f".incoming-{os.getpid()}"
    try:
        staging.mkdir()
        for names, file in zip(groups, files, strict=True):
            _write_one(source, names, staging / file, metadata)
            _flush(staging / file)
        for file in files:
            os.replace(staging / file, folder / file)
        if len(groups) > 1:
            weight_map = {name: file for names, file in zip(groups, files, strict=True) for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            with appearing(folder / f"model{INDEX_SUFFIX}") as incoming:
                incoming.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if is_new:
            with suppress(OSError):  # it has the files in it
                folder.rmdir()


def write_torch(
    source: AbstractSource,
    path: Path,
    facts: Mapping[str, Any],
    *,
    arrange: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> None:
    """Write a flat state dict in torch.save's format; tied names (`facts["aliases"]`) share one storage.

    Modules' extra states are written as they are: torch.load(weights_only=True) refuses a BytesIO among them. `arrange`
    may put what stands for the tensors into nested dicts, with plain values beside them.
    """
    aliases = facts.get("aliases", {})
    keys = {name: str(key) for key, name in enumerate(name for name in source.infos if name not in aliases)}
    keys |= {alias: keys[name] for alias, name in aliases.items()}
    entries: dict[str, Any] = {
        name: _TensorAt(_StorageId(keys[name], info.dtype, Box.whole(info.shape).numel), info.shape)
        for name, info in source.infos.items()
    }
    stream = io.BytesIO()
    pickler = _Pickler(stream, protocol=2)
    pickler.dump(OrderedDict(arrange({**entries, **source.extra})))
    with appearing(path) as incoming, zipfile.ZipFile(incoming, "w") as archive:
        _member(archive, "data.pkl", stream.getvalue())
        _member(archive, "byteorder", b"little")
        _member(archive, METADATA_KEY, json.dumps(dict(facts)).encode())
        for name in source.infos:
            if name not in aliases:
                info = _member_info(archive, f"data/{keys[name]}", source.infos[name].nbytes)
                with archive.open(info, "w", force_zip64=True) as member:
                    _write_tensor(source, name, member)
        for key, tensor in pickler.inside.items():
            _member(archive, f"data/{key}", bytes(bytes_of(tensor)))
        _member(archive, "version", b"3\n")


def _member(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    with archive.open(_member_info(archive, name, len(data)), "w", force_zip64=True) as member:
        member.write(data)


def _member_info(archive: zipfile.ZipFile, name: str, nbytes: int) -> zipfile.ZipInfo:
    """A header padded, as torch does, so that the data begin at a multiple of 64 bytes and can be mapped."""
    info = zipfile.ZipInfo(f"archive/{name}")
    info.file_size = nbytes
    num_zip64_bytes, num_pad_header_bytes = 20, 4
    begin = archive.fp.tell() + 30 + len(info.filename) + num_zip64_bytes + num_pad_header_bytes  # type: ignore[union-attr]
    info.extra = struct.pack("<2sH", b"FB", -begin % _ALIGNMENT) + b"Z" * (-begin % _ALIGNMENT)
    return info


@dataclass(frozen=True)
class _StorageId:
    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class _TensorAt:
    storage: _StorageId
    shape: tuple[int, ...]


class _Pickler(pickle.Pickler):
    """Writes what torch.save writes about tensors, without the tensors; `inside` are those of extra states, by key."""

    def __init__(self, stream: IO[bytes], protocol: int) -> None:
        super().__init__(stream, protocol)
        self.inside: dict[str, Tensor] = {}

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _StorageId):
            return None
        name = _STORAGE_NAMES.get(obj.dtype)
        if name is None:  # dtypes younger than typed storages
            return "storage", torch.UntypedStorage, obj.key, "cpu", obj.numel * obj.dtype.itemsize
        return "storage", getattr(torch, f"{name}Storage"), obj.key, "cpu", obj.numel

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            key = f"extra{len(self.inside)}"
            tensor = self.inside[key] = obj.detach().contiguous()
            obj = _TensorAt(_StorageId(key, tensor.dtype, tensor.numel()), tuple(tensor.shape))
        if not isinstance(obj, _TensorAt):
            return NotImplemented
        dtype = obj.storage.dtype
        hooks: OrderedDict[str, Any] = OrderedDict()
        args = (obj.storage, 0, obj.shape, contiguous_stride(obj.shape), False, hooks)
        if dtype in _STORAGE_NAMES:
            return torch._utils._rebuild_tensor_v2, args
        return torch._utils._rebuild_tensor_v3, (*args, dtype)
