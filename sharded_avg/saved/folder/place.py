"""Where saved averages lie: folders on a disk, or under any URL that fsspec knows.

A save passes through three names, so that at every moment one whole folder can be found, whoever is killed:

    NAME.incoming   written by all ranks; becomes whole with its manifest, the last file written
    NAME            the folder that people name
    NAME.outgoing   the folder that was NAME, while the new one takes its name

`whole` finds the newest whole one. On a disk, publishing renames; object stores cannot rename a folder, so there it
copies, and the incoming folder stays whole until the copy is.
"""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import CheckpointError, ConfigError
from ...files.dcp_folder import DcpFolder
from ...files.stored import StoredFile

MANIFEST_FILE = "manifest.json"
INCOMING, OUTGOING = ".incoming", ".outgoing"


class AbstractPlace(ABC):
    """The folder called `path`, and its two companions."""

    def __init__(self, path: str) -> None:
        self.path = path.rstrip("/") or path

    @property
    @abstractmethod
    def identity(self) -> str:
        """The folder's one name: two paths with one identity are one folder."""

    @property
    def incoming(self) -> str:
        """The folder to write into."""
        return self.path + INCOMING

    def whole(self) -> str | None:
        """The newest whole folder, or `None`."""
        candidates = (self.path, self.path + INCOMING, self.path + OUTGOING)
        return next((path for path in candidates if self.exists(f"{path}/{MANIFEST_FILE}")), None)

    def prepare(self) -> None:
        """Make the incoming folder empty, once a whole folder is under another name; refuse a foreign `path`."""
        if self.exists(self.path) and not self.exists(f"{self.path}/{MANIFEST_FILE}") and self.listing(self.path):
            raise CheckpointError(
                f"{self.path!r} exists and is no saved average (it has no {MANIFEST_FILE}): saving there would replace "
                "it. Choose a new folder"
            )
        self._finish_interrupted()
        self.remove(self.incoming)
        self.make(self.incoming)

    def _finish_interrupted(self) -> None:
        """A save that was killed while it published has left its only whole folder under another name."""
        found = self.whole()
        if found == self.incoming:
            self.publish()
        elif found is not None and found != self.path:
            self.move(found, self.path)
        self.remove(self.path + OUTGOING)

    def forget(self) -> None:
        """Remove the saved average, under whichever of the three names it lies."""
        for suffix in ("", INCOMING, OUTGOING):
            self.remove(self.path + suffix)

    @abstractmethod
    def publish(self) -> None:
        """Give the whole incoming folder its final name."""

    @abstractmethod
    def exists(self, path: str) -> bool: ...

    @abstractmethod
    def listing(self, path: str) -> list[str]: ...

    @abstractmethod
    def make(self, path: str) -> None: ...

    @abstractmethod
    def remove(self, path: str) -> None:
        """Remove a folder and what is in it, if it is there."""

    @abstractmethod
    def move(self, path: str, to: str) -> None: ...

    @abstractmethod
    def read(self, path: str) -> str: ...

    def opened(self, path: str) -> DcpFolder:
        """What torch.distributed.checkpoint has in a folder; nothing in it runs. Raises `CheckpointError`."""
        return DcpFolder(path)

    @abstractmethod
    def create(self, path: str) -> BinaryIO:
        """A new file, to write into."""

    @abstractmethod
    def write(self, path: str, text: str) -> None:
        """Write a file that appears whole."""


class Disk(AbstractPlace):
    """A folder on a file system that this process has mounted."""

    @property
    def identity(self) -> str:
        return os.path.realpath(self.path)

    def create(self, path: str) -> BinaryIO:
        return open(path, "wb")

    def publish(self) -> None:
        if self.exists(self.path):
            self.remove(self.path + OUTGOING)
            self.move(self.path, self.path + OUTGOING)
        self.move(self.incoming, self.path)
        self.remove(self.path + OUTGOING)

    def exists(self, path: str) -> bool:
        return os.path.lexists(path)

    def listing(self, path: str) -> list[str]:
        return os.listdir(path) if os.path.isdir(path) else [path]

    def make(self, path: str) -> None:
        os.makedirs(path)

    def remove(self, path: str) -> None:
        shutil.rmtree(path, ignore_errors=True)

    def move(self, path: str, to: str) -> None:
        os.rename(path, to)

    def read(self, path: str) -> str:
        return Path(path).read_text(encoding="utf-8")

    def write(self, path: str, text: str) -> None:
        partial = path + ".partial"
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


class _RemoteFile(StoredFile):
    """A file under a URL."""

    def __init__(self, filesystem: Any, path: str) -> None:
        try:
            super().__init__(path, filesystem.size(path))
        except OSError as error:
            raise CheckpointError(f"{path!r} cannot be read: {error}") from error
        self._fs, self._url = filesystem, path

    def open(self) -> BinaryIO:
        return self._fs.open(self._url, "rb")  # type: ignore[no-any-return]


class Remote(AbstractPlace):
    """A folder under a URL such as s3://bucket/run/average."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        try:
            from fsspec.core import url_to_fs  # type: ignore[import-untyped]

            self._fs: Any = url_to_fs(path)[0]
        except (ImportError, ValueError) as error:
            raise CheckpointError(
                f"{path!r}: {error}. Paths with :// go through fsspec; install its backend for this protocol, or give "
                "a path on a mounted disk"
            ) from error

    @property
    def identity(self) -> str:
        return self.path

    def create(self, path: str) -> BinaryIO:
        return self._fs.open(path, "wb")  # type: ignore[no-any-return]

    def opened(self, path: str) -> DcpFolder:
        return DcpFolder(path, lambda file: _RemoteFile(self._fs, f"{path}/{file}"))

    def publish(self) -> None:
        # Until the new manifest stands under the final name, the incoming folder is the whole one.
        self.remove(self.path)
        for name in self.listing(self.incoming):
            if name != MANIFEST_FILE:
                self._fs.copy(f"{self.incoming}/{name}", f"{self.path}/{name}")
        self.write(f"{self.path}/{MANIFEST_FILE}", self.read(f"{self.incoming}/{MANIFEST_FILE}"))
        self.remove(self.incoming)

    def exists(self, path: str) -> bool:
        return bool(self._fs.exists(path))

    def listing(self, path: str) -> list[str]:
        return [str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in self._fs.ls(path, detail=False)]

    def make(self, path: str) -> None:
        self._fs.makedirs(path, exist_ok=True)

    def remove(self, path: str) -> None:
        if not self._fs.exists(path):
            return
        manifest = f"{path}/{MANIFEST_FILE}"
        if self._fs.exists(manifest):  # first, so that what is left, should we be killed, does not look whole
            self._fs.rm(manifest)
        self._fs.rm(path, recursive=True)

    def move(self, path: str, to: str) -> None:
        self._fs.mv(path, to, recursive=True)

    def read(self, path: str) -> str:
        return str(self._fs.cat_file(path).decode("utf-8"))

    def write(self, path: str, text: str) -> None:
        self._fs.pipe_file(path, text.encode("utf-8"))


def place_of(path: str | os.PathLike[str]) -> AbstractPlace:
    """The place of `path`: remote if it is a string with `://` in it."""
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
    if not isinstance(text, str) or not text or "\0" in text:
        raise ConfigError(f"path={path!r}: must be the path of a folder, or a URL that fsspec knows")
    return Remote(text) if "://" in text else Disk(text)
