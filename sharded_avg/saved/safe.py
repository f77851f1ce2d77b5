"""Opening a DCP folder without running what is in it.

DCP keeps its index, `.metadata`, as a pickle. `load_index` admits the classes that an index is made of and nothing
else; `safe_storage_reader` is DCP's own reader with that index, which also compares the checksum of each stored piece.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from typing import Any, BinaryIO

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from ..errors import CheckpointError
from ..files.dcp_folder import admits_index
from ..files.pickles import load_inert


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if not admits_index(module, name):
            raise CheckpointError(f"the index of this checkpoint asks for {module}.{name}: it was not opened")
        return super().find_class(module, name)


def load_index(stream: BinaryIO) -> Metadata:
    """DCP's index from an open `.metadata` file; raises `CheckpointError` for anything else.

    It is first read as a description, which refuses classes that no index has, changes of classes, and pickles that
    grow without end; what is then built is made of DCP's own dataclasses.
    """
    data = stream.read()
    load_inert(data, admits_index, what="the index of this checkpoint")
    index = _IndexUnpickler(io.BytesIO(data)).load()
    if not isinstance(index, Metadata) or not isinstance(index.state_dict_metadata, dict):
        raise CheckpointError(f"the index of this checkpoint is a {type(index).__name__}, not torch's Metadata")
    return index


class _SafeIndex:
    """Mixed into DCP's readers."""

    fs: Any
    load_id: str
    _get_metadata_path: Any

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """As DCP's, with the safe unpickler."""
        rank = kwargs.get("rank")
        path = self._get_metadata_path(rank) if rank is not None else self._get_metadata_path()
        with self.fs.create_stream(path, "rb") as stream:
            index = load_index(stream)
        index.storage_meta = getattr(index, "storage_meta", None) or StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index

    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        """One stored piece, once its checksum is right: torch writes checksums and does not look at them."""
        if getattr(sinfo, "transform_descriptors", None):
            return super()._slice_file(file, sinfo)  # type: ignore[misc]
        file.seek(sinfo.offset)
        piece = io.BytesIO(file.read(sinfo.length))
        try:
            with zipfile.ZipFile(piece) as archive:
                damaged = archive.testzip()
        except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError) as error:
            # zipfile raises the last for an unknown compression method, which a damaged byte can ask for.
            raise CheckpointError(f"{sinfo.relative_path} is truncated or damaged at byte {sinfo.offset}") from error
        if damaged is not None:
            raise CheckpointError(f"{sinfo.relative_path} is damaged: {damaged!r} has another checksum than when saved")
        piece.seek(0)
        return piece


class _SafeFileReader(_SafeIndex, FileSystemReader):
    pass


def safe_storage_reader(path: str) -> FileSystemReader:
    """DCP's reader for a folder on a disk, or for a URL that fsspec knows, which runs no code of the folder."""
    if "://" not in path:
        return _SafeFileReader(path)
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

    class _SafeUrlReader(_SafeIndex, FsspecReader):
        pass

    return _SafeUrlReader(path)
