"""Averages that this package saved, as sources.

    SavedAverages   a DCP folder, the key that the averages are under, and their manifest
    saved_averages  finds them: in a folder that `save` wrote, inside a user's own `dcp.save({"average": average})`,
                    or in a folder below

A source made here has the averaged tensors under the model's own names, tied names too. Where the folder also holds
the model that was averaged, or a part of it, frozen parameters and buffers come along.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, NotStartedError
from ..files.dcp_folder import INDEX_FILE, DcpFolder
from ..files.facts import load_json
from ..files.source import AbstractSource, Renamed, TensorInfo
from ..shard import Box, take
from .folder.place import MANIFEST_FILE, place_of
from .manifest import BESIDE_KEY, FORMAT, Manifest, TensorRecord
from .plain import decode

MANIFEST_KEY = "manifest"
_NOT_FACTS = ("averages", "tensors", "empty", "extra")
_MAX_DEPTH, _MAX_MANIFEST_BYTES = 2, 1 << 30


@dataclass(frozen=True)
class SavedAverages:
    """One saved ShardedAverage: its averages lie under `prefix + name + "." + tensor` in `folder`."""

    folder: DcpFolder
    prefix: str
    manifest: Manifest

    def source(self, name: str | None = None) -> AbstractSource:
        """The average called `name`; it may be left out where there is one only.

        Raises `CheckpointError` if there is no such average, or if the folder does not hold what the manifest says,
        and `NotStartedError` if it was saved before its first update.
        """
        name = self._resolve(name)
        record = self.manifest.averages[name]
        if not record.n_averaged:
            raise NotStartedError(
                f"the average {name!r} in {str(self.folder.path)!r} had no update when it was saved (step "
                f"{self.manifest.step}), so there are no averaged weights in it"
            )
        names = {tensor: f"{self.prefix}{name}.{tensor}" for tensor in self.manifest.tensors}
        self._check(names)
        aliases = self.manifest.aliases
        names |= {alias: names[tensor] for alias, tensor in aliases.items() if tensor in names}
        beside = self._model_beside() or f"{self.prefix}{BESIDE_KEY}."
        rest = {key.removeprefix(beside): key for key in self.folder.infos if key.startswith(beside)}
        told = {key: torch.empty(r.shape, dtype=getattr(torch, r.dtype)) for key, r in self.manifest.empty.items()}
        told |= {alias: told[tensor] for alias, tensor in aliases.items() if tensor in told}
        try:
            told |= {key: decode(value) for key, value in self.manifest.extra.items()}
        except ValueError as error:
            raise CheckpointError(f"{str(self.folder.path)!r} is damaged: its extra state is {error}") from error
        return _Told(self.folder, {**rest, **names}, self.facts(name), told)

    def facts(self, name: str) -> dict[str, Any]:
        """What the manifest says about one average."""
        whole = {field: value for field, value in vars(self.manifest).items() if field not in _NOT_FACTS}
        own = vars(self.manifest.averages[name])
        return {**whole, **own, "format": FORMAT, "average": name, "averaged": list(self.manifest.tensors)}

    def _resolve(self, name: str | None) -> str:
        names = list(self.manifest.averages)
        if name is None and len(names) == 1:
            return names[0]
        if name is None or name not in names:
            wrong = "it holds several: name one" if name is None else f"it holds no average {name!r}"
            raise CheckpointError(f"{str(self.folder.path)!r}: {wrong} of {names}")
        return name

    def _check(self, keys: Mapping[str, str]) -> None:
        """The manifest and DCP's index are two witnesses of the same save."""
        for tensor, record in self.manifest.tensors.items():
            info = self.folder.infos.get(keys[tensor])
            found = None if info is None else (list(info.shape), str(info.dtype).removeprefix("torch."))
            if found != (record.shape, record.dtype):
                raise CheckpointError(
                    f"{str(self.folder.path)!r} is torn or damaged: its manifest says that {keys[tensor]} is "
                    f"{record.shape} in {record.dtype}, and its index says {found or 'nothing of it'}"
                )

    def _model_beside(self) -> str:
        """The prefix of the model that was averaged, if exactly one in the folder has all its names and shapes."""
        shapes = {tensor: tuple(record.shape) for tensor, record in self.manifest.tensors.items()}
        one = next(iter(shapes), "")
        own = tuple(f"{self.prefix}{name}." for name in self.manifest.averages)
        snapshots = tuple(f"{self.prefix}{name}/" for name in self.manifest.averages)
        prefixes = [key.removesuffix(one) for key in self.folder.infos if key.endswith(f".{one}")]
        infos = self.folder.infos
        fitting = [
            prefix
            for prefix in prefixes
            if prefix not in own
            and not prefix.startswith(snapshots)
            and all((info := infos.get(prefix + key)) and info.shape == shape for key, shape in shapes.items())
        ]
        return fitting[0] if len(fitting) == 1 else ""


class _Told(Renamed):
    """A folder's tensors, and values that its manifest tells: of no elements, or extra state."""

    def __init__(
        self, folder: DcpFolder, names: Mapping[str, str], facts: Mapping[str, Any], told: Mapping[str, Any]
    ) -> None:
        super().__init__(folder, {name: key for name, key in names.items() if name not in told}, facts)
        self._told = {name: value for name, value in told.items() if isinstance(value, Tensor)}
        self.infos = {**self.infos} | {
            name: TensorInfo(tuple(value.shape), value.dtype) for name, value in self._told.items()
        }
        self.extra = {name: value for name, value in told.items() if name not in self._told}

    def read(self, name: str, box: Box | None = None) -> Tensor:
        if name not in self._told:
            return super().read(name, box)
        value = self._told[name]
        return take(value, Box.whole(value.shape) if box is None else box).clone()


def saved_averages(path: Path) -> SavedAverages | None:
    """The saved averages in a folder, or `None` if it has none. Raises `CheckpointError` if there is a torn one."""
    found = _in(path)
    if found is not None or not path.is_dir():
        return found
    below = [folder for folder in _below(path, _MAX_DEPTH) if (folder / MANIFEST_FILE).is_file()]
    if len(below) > 1:
        names = [str(folder.relative_to(path)) for folder in below]
        raise CheckpointError(f"{str(path)!r} holds several saved averages: name one of its folders {names}")
    return _in(below[0]) if below else None


def _in(path: Path) -> SavedAverages | None:
    whole = place_of(path).whole()
    if whole is not None:
        return _ours(Path(whole))
    incoming = Path(place_of(path).incoming)
    if not path.exists() and incoming.exists():
        raise CheckpointError(f"{str(path)!r} is not there: only {incoming.name!r} is, a save that was cut short")
    return _inside(DcpFolder(path)) if (path / INDEX_FILE).is_file() else None


def _ours(path: Path) -> SavedAverages:
    folder = DcpFolder(path)
    manifest = _manifest(_text(path / MANIFEST_FILE), str(path / MANIFEST_FILE))
    if MANIFEST_KEY in folder.objects and _manifest(folder.load_object(MANIFEST_KEY), str(path)) != manifest:
        raise CheckpointError(
            f"{str(path)!r} is torn or damaged: {MANIFEST_FILE} and the manifest among the tensors do not agree"
        )
    return SavedAverages(folder, "", manifest)


def _inside(folder: DcpFolder) -> SavedAverages | None:
    """The average in a user's own checkpoint."""
    keys = [key for key in folder.objects if key == MANIFEST_KEY or key.endswith(f".{MANIFEST_KEY}")]
    texts = [(key, folder.load_object(key)) for key in keys]
    found = [(key, text) for key, text in texts if isinstance(text, str) and f'"{FORMAT}"' in text[:200]]
    if len(found) > 1:
        raise CheckpointError(f"{str(folder.path)!r} holds several saved averages, under {[key for key, _ in found]}")
    for key, text in found:
        prefix, manifest = key.removesuffix(MANIFEST_KEY), _manifest(text, str(folder.path))
        return SavedAverages(folder, prefix, replace(manifest, tensors=_tensors(manifest, folder, prefix)))
    return None


def _tensors(manifest: Manifest, folder: DcpFolder, prefix: str) -> dict[str, TensorRecord]:
    """With what other ranks have saved, if each had a part of the model: one rank's manifest is in the checkpoint."""
    found = dict(manifest.tensors)
    for name, average in manifest.averages.items():
        own = f"{prefix}{name}."
        for key, info in folder.infos.items() if average.n_averaged else ():
            if key.startswith(own):
                record = TensorRecord(shape=list(info.shape), dtype=str(info.dtype).removeprefix("torch."))
                found.setdefault(key.removeprefix(own), record)
    return found


def _manifest(text: Any, what: str) -> Manifest:
    if isinstance(text, str):
        load_json(text, f"the manifest of {what!r}")
    try:
        manifest = Manifest.from_json(text)
    except OverflowError as error:
        raise CheckpointError(f"the manifest of {what!r} cannot be read: {error}") from error
    for record in (*manifest.tensors.values(), *manifest.empty.values()):
        if not isinstance(getattr(torch, record.dtype, None), torch.dtype):
            raise CheckpointError(f"the manifest of {what!r} names a dtype that there is not: {record.dtype[:50]!r}")
    return manifest


def _text(file: Path) -> str:
    try:
        if file.stat().st_size > _MAX_MANIFEST_BYTES:
            raise CheckpointError(f"{str(file)!r} is larger than any manifest")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{str(file)!r} cannot be read: {error}") from error


def _below(path: Path, depth: int) -> Iterator[Path]:
    """Folders below `path`, without following links."""
    if not depth:
        return
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.is_symlink()):
        yield folder
        yield from _below(folder, depth - 1)
