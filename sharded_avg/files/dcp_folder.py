"""A torch.distributed.checkpoint (DCP) folder, read without torch.distributed.

    DcpFolder   every full tensor of the folder as a source, and its other objects
    _Chunk      one Box of a tensor, and the part of a file that holds it

DCP's index, `.metadata`, is a pickle, and so is the head of each stored piece: both are read as descriptions, and
nothing in them runs. All that the index says is checked against the folder before anything is read: names of files,
offsets and lengths, and that the pieces of every tensor fill it exactly once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..shard import Box, take
from .archive import records
from .pickles import ClassName, Inert, load_inert
from .source import AbstractSource, Lazy, TensorInfo
from .stored import Stored, StoredFile, contiguous_stride, is_size, torch_content
from .tensor_archive import LARGEST_BYTES, frame_of

INDEX_FILE = ".metadata"
_MAX_INDEX_BYTES = 4 << 30
_METADATA, _FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_CLASSES = {
    *(f"{_METADATA}.{name}" for name in ("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *(f"{_METADATA}.{name}" for name in ("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")),
    f"{_METADATA}.TensorProperties",
    f"{_FILES}._StorageInfo",
    f"{_FILES}._StoragePrefix",
    "torch.Size",
    "torch.serialization._get_layout",
    "collections.OrderedDict",
    *(f"pathlib{sub}.{kind}Path" for sub in ("", "._local") for kind in ("Posix", "PurePosix", "Windows", "")),
}


@dataclass(frozen=True, slots=True)
class _Place:
    """`length` bytes at `offset` of a file of the folder."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class _Chunk:
    box: Box
    place: _Place


class DcpFolder(AbstractSource):
    """A DCP folder on a disk. Opening it reads the index; a tensor's pieces are read when they are asked for.

    Raises `CheckpointError` if there is no index, or if the index cannot be what torch wrote about this folder.
    """

    def __init__(self, path: str | os.PathLike[str], file_of: Callable[[str], StoredFile] | None = None) -> None:
        """`file_of`: opens a file of the folder by its name there, for a folder that is not on a disk."""
        self.path = Path(path)
        self._file_of = file_of
        self._files: dict[str, StoredFile] = {}
        self._stored: dict[_Place, Stored] = {}
        self._chunks: dict[str, list[_Chunk]] = {}
        self._objects: dict[str, _Place] = {}
        self.infos: dict[str, TensorInfo] = {}
        self.facts = {"format": "torch.distributed.checkpoint"}
        index = _index(self.path, file_of)
        places = dict(_places(index.get("storage_data")))
        self._check_places(places.values())
        for name, entry in _dict(index.get("state_dict_metadata"), "state_dict_metadata").items():
            self._enter(name, entry, places)
        extra = [name for name in self._objects if name.rpartition(".")[2] == "_extra_state"]
        self.extra = Lazy({name: name for name in extra}, self.load_object)

    @property
    def objects(self) -> list[str]:
        """Names of what is no tensor."""
        return list(self._objects)

    def read(self, name: str, box: Box | None = None) -> Tensor:
        info = self.infos[name]
        box = Box.whole(info.shape) if box is None else box
        full = torch.empty(box.lengths, dtype=info.dtype)
        for chunk in self._chunks[name]:
            shared = _intersection(chunk.box, box)
            if shared is not None:
                inside, here = _relative(shared, chunk.box), _relative(shared, box)
                stored = self._piece(name, chunk)
                self._files[chunk.place.file].read_into(take(full, here), stored, inside)
        return full

    @contextmanager
    def kept_open(self) -> Iterator[None]:
        """For reading much of it: its files stay open."""
        with ExitStack() as stack:
            for file in self._files.values():
                stack.enter_context(file.kept_open())
            yield

    def load_object(self, name: str) -> Any:
        """What is stored under a name of `objects`, if it is made of plain values."""
        return self._content(name, self._objects[name])

    def _enter(self, name: object, entry: object, places: Mapping[tuple[str, tuple[int, ...] | None], _Place]) -> None:
        _require(isinstance(name, str) and isinstance(entry, Inert), "an entry without a name")
        if isinstance(name, str) and isinstance(entry, Inert) and entry.kind == f"{_METADATA}.TensorStorageMetadata":
            info = TensorInfo(_sizes(entry.get("size")), _dtype(entry.get("properties")))
            chunks = entry.get("chunks")
            _require(isinstance(chunks, list) and all(isinstance(c, Inert) for c in chunks), "pieces that are none")
            every = [Box(_sizes(chunk.get("offsets")), _sizes(chunk.get("sizes"))) for chunk in chunks or ()]
            boxes = [box for box in every if box.numel]  # DCP also lists the empty ones of ranks that had none
            _require(_cover(boxes, info.shape), f"pieces of {name!r} that do not fill {info.shape} exactly once")
            pieces = [_Chunk(box, _place_of(places, name, box.offsets)) for box in boxes]
            fit = all(piece.box.numel * info.dtype.itemsize <= piece.place.length for piece in pieces)
            _require(fit, f"a piece of {name!r} that is larger than its place")  # before memory is asked for
            self.infos[name], self._chunks[name] = info, pieces
        elif isinstance(name, str):
            self._objects[name] = _place_of(places, name, None)

    def _check_places(self, places: Iterable[_Place]) -> None:
        """Files must be ordinary ones inside the folder, and no two items may share bytes."""
        folder = Path() if self._file_of is not None else self.path.resolve()
        last: dict[str, int] = {}
        for place in sorted(places, key=lambda place: (place.file, place.offset)):
            if place.file not in self._files:
                if self._file_of is not None:
                    plain = not place.file.startswith("/") and ".." not in place.file.split("/")
                    _require(plain, f"the file {place.file!r} outside of it")
                    self._files[place.file] = self._file_of(place.file)
                else:
                    inside = Path(os.path.realpath(folder / place.file))
                    below = inside.parent == folder or folder in inside.parents
                    _require(below, f"the file {place.file!r} outside of it")
                    self._files[place.file] = StoredFile(inside)
            _require(place.offset >= last.get(place.file, 0), f"items that overlap in {place.file!r}")
            stop = last[place.file] = place.offset + place.length
            if stop > self._files[place.file].nbytes:
                raise CheckpointError(
                    f"{str(self.path / place.file)!r} was cut short: it has {self._files[place.file].nbytes} bytes, "
                    f"and the index says that an item ends at {stop}"
                )

    def _piece(self, name: str, chunk: _Chunk) -> Stored:
        """Where the elements of a chunk lie in its file."""
        if chunk.place not in self._stored:
            info = self.infos[name]
            stored = self._framed(info.dtype, chunk) or self._content(name, chunk.place)
            _require(isinstance(stored, Stored), f"no tensor where a piece of {name!r} should be")
            _require(
                (stored.shape, stored.dtype) == (chunk.box.lengths, info.dtype),
                f"a piece of {name!r} of shape {stored.shape} and {stored.dtype} where the index says "
                f"{chunk.box.lengths} and {info.dtype}",
            )
            self._stored[chunk.place] = stored
        return self._stored[chunk.place]

    def _framed(self, dtype: torch.dtype, chunk: _Chunk) -> Stored | None:
        """The same, where the archive is one of ours."""
        nbytes, record = chunk.box.numel * dtype.itemsize, None
        if nbytes > LARGEST_BYTES:
            return None
        frame = frame_of(dtype, chunk.box.lengths)
        if chunk.place.length == frame.nbytes + nbytes:
            with self._files[chunk.place.file].reading() as file, suppress(OSError):
                record = frame.find(file, chunk.place.offset, nbytes)
        if record is None:
            return None
        return Stored(dtype, chunk.box.lengths, contiguous_stride(chunk.box.lengths), record.offset, record)

    def _content(self, name: str, place: _Place) -> Any:
        what = f"{name!r} in {str(self.path / place.file)!r}"
        try:
            with self._files[place.file].reading() as file:
                return torch_content(file, records(file, place.offset, place.length), what=what)
        except OSError as error:
            raise CheckpointError(f"{what} cannot be read: {error}") from error
        except CheckpointError as error:
            raise CheckpointError(f"{what} is damaged: {error}") from error


def _index(folder: Path, file_of: Callable[[str], StoredFile] | None) -> Inert:
    file = folder / INDEX_FILE
    try:
        if file_of is None:
            fits = not file.exists() or (file.is_file() and file.stat().st_size <= _MAX_INDEX_BYTES)
            _require(fits, "no ordinary index")
            data = file.read_bytes()
        else:
            with file_of(INDEX_FILE).open() as stream:
                data = stream.read()
    except OSError as error:
        raise CheckpointError(
            f"{str(folder)!r} is no whole checkpoint folder: {INDEX_FILE} cannot be read ({error.strerror}). DCP "
            "writes it last, so a save that was cut short has none"
        ) from error
    index = load_inert(data, admits_index, what=f"the index {str(file)!r}")
    _require(isinstance(index, Inert) and index.kind == f"{_METADATA}.Metadata", "another object")
    checked: Inert = index
    return checked


def admits_index(module: str, name: str) -> bool:
    """Whether an index that torch writes names this class."""
    return f"{module}.{name}" in _CLASSES or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))


def _places(storage_data: object) -> Iterator[tuple[tuple[str, tuple[int, ...] | None], _Place]]:
    seen = set()
    for index, info in _dict(storage_data, "storage_data").items():
        _require(isinstance(index, Inert) and isinstance(info, Inert), "a place that is none")
        name, offset = index.get("fqn"), index.get("offset")
        path, start, length = (info.get(field) for field in ("relative_path", "offset", "length"))
        _require(isinstance(name, str) and isinstance(path, str) and "\0" not in path, "a place without a name")
        _require(is_size(start) and is_size(length), f"an impossible place for {name!r}")
        if info.get("transform_descriptors"):
            raise CheckpointError(
                f"{name!r} was written through an extension (compression or encryption), which this "
                "reader does not have. Save again without extensions"
            )
        key = (name, None if offset is None else _sizes(offset))
        _require(key not in seen, f"{name!r} twice")
        seen.add(key)
        yield key, _Place(path, start, length)


def _place_of(
    places: Mapping[tuple[str, tuple[int, ...] | None], _Place], name: str, offset: tuple[int, ...] | None
) -> _Place:
    place = places.get((name, offset))
    if place is None:
        raise CheckpointError(f"the index of this checkpoint is damaged: it does not say where {name!r} lies")
    return place


def _sizes(value: object) -> tuple[int, ...]:
    """A torch.Size, or a tuple where an old index has one."""
    if isinstance(value, Inert) and value.kind == "torch.Size" and len(value.args) == 1:
        value = value.args[0]
    if not isinstance(value, (tuple, list)) or len(value) > 64 or not all(map(is_size, value)):
        raise CheckpointError("the index of this checkpoint is damaged: it has a shape or offset that cannot be")
    return tuple(value)


def _dtype(properties: object) -> torch.dtype:
    state = properties.state if isinstance(properties, Inert) else None
    named = state[0] if isinstance(state, tuple) and state else None
    dtype = getattr(torch, named.kind.rpartition(".")[2], None) if isinstance(named, ClassName) else None
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError("the index of this checkpoint is damaged: it has a tensor without a dtype")
    return dtype


def _dict(value: object, what: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"the index of this checkpoint is damaged: its {what} is no dict")
    return value


def _cover(boxes: list[Box], shape: tuple[int, ...]) -> bool:
    """Whether the Boxes lie inside `shape`, do not overlap, and leave nothing out."""
    for box in boxes:
        if len(box.offsets) != len(shape) or len(box.lengths) != len(shape):
            return False
        if any(o + n > size for o, n, size in zip(box.offsets, box.lengths, shape, strict=True)):
            return False
    if sum(box.numel for box in boxes) != Box.whole(shape).numel:
        return False
    if len(boxes) < 2:
        return True
    # Sweep along the dim that the Boxes cut most, keeping those that the sweep line crosses.
    dim = max(range(len(boxes[0].offsets)), key=lambda d: len({box.offsets[d] for box in boxes}))
    crossed: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.offsets[dim]):
        crossed = [other for other in crossed if other.offsets[dim] + other.lengths[dim] > box.offsets[dim]]
        if any(_intersection(other, box) is not None for other in crossed):
            return False
        crossed.append(box)
    return True


def _intersection(a: Box, b: Box) -> Box | None:
    starts = tuple(map(max, a.offsets, b.offsets))
    stops = [min(o + n, p + m) for o, n, p, m in zip(a.offsets, a.lengths, b.offsets, b.lengths, strict=True)]
    if any(start >= stop for start, stop in zip(starts, stops, strict=True)):
        return None
    return Box(starts, tuple(stop - start for start, stop in zip(starts, stops, strict=True)))


def _relative(box: Box, origin: Box) -> Box:
    return Box(tuple(o - p for o, p in zip(box.offsets, origin.offsets, strict=True)), box.lengths)


def _require(fits: bool, found: str) -> None:
    if not fits:
        raise CheckpointError(f"the index of this checkpoint is damaged: it has {found}")
