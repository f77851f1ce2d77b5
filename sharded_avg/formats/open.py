"""Opening whatever holds weights, and handing out averaged ones.

    open_source               any path -> a source: what we saved, what the importers know, or plain weights
    load_averaged_state_dict  any path with an average in it -> full CPU tensors

No process group, model or GPU is needed, and nothing that is opened is run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from ..files.dcp_folder import INDEX_FILE, DcpFolder
from ..files.safetensors_file import SafetensorsFiles, safetensors_of
from ..files.source import AbstractSource, Renamed
from ..files.torch_file import TorchFile
from ..saved.sources import saved_averages
from .importers import find_importer

_ONLY_NAME = "average"
StrPath = str | os.PathLike[str]


def open_source(path: StrPath, name: str | None = None) -> AbstractSource:
    """The tensors of a saved average, or of a plain checkpoint if there is no average in it.

    `name`: which average; in a plain checkpoint, the key that the tensors are under ("model"). `facts["average"]`
    says which average it is, and is not there for plain weights. Raises `CheckpointError` for what cannot be read.
    """
    path = _existing(path)
    average = None if name is not None and _is_beside_an_average(path, name) else _average(path, name)
    if average is not None:
        return average
    source = _plain(path)
    prefix = "" if name is None else f"{name}."
    names = {key.removeprefix(prefix): key for key in source.infos if key.startswith(prefix)}
    if not names and name is not None:
        first = sorted({key.partition(".")[0] for key in source.infos})[:20]
        raise CheckpointError(f"{str(path)!r} holds no average, and no tensors under {name!r}; it has {first}")
    ties = source.ties() if isinstance(source, TorchFile) else {}
    inside = {key: tied for key, tied in ties.items() if key.startswith(prefix) and tied.startswith(prefix)}
    aliases = {key.removeprefix(prefix): tied.removeprefix(prefix) for key, tied in inside.items()}
    extra = {key.removeprefix(prefix): key for key in source.extra if key.startswith(prefix)}
    return Renamed(source, names, {"aliases": aliases}, extra)


def load_averaged_state_dict(path: StrPath, name: str | None = None) -> dict[str, Any]:
    """Full averaged tensors on the CPU, under the model's own names. Needs no process group and no GPU.

    `path` is a folder that `save` wrote, a checkpoint folder that contains an average, a file that
    `sharded-avg consolidate` made, or a foreign format that `sharded-avg inspect` knows. `name` chooses among several
    averages. Tied names share one tensor. Frozen parameters and buffers come along where the checkpoint has them:
    with all of them, `model.load_state_dict(...)` is strict; else pass `strict=False` to it. So does what modules keep
    as extra state, which need not be tensors.

    Raises `CheckpointError` if there is no (such) average or if it is torn or damaged, and `NotStartedError` if it was
    saved before its first update.
    """
    path = _existing(path)
    source = _average(path, name)
    if source is None:
        raise CheckpointError(
            f"{str(path)!r} holds weights and no average ({_plain(path).facts.get('format')}). Saved averages come "
            "from ShardedAverage.save, or from torch.distributed.checkpoint.save({'average': average})"
        )
    aliases = source.facts.get("aliases", {})
    state = {key: source.read(key) for key in source.infos if key not in aliases}
    return {**{key: state[aliases.get(key, key)] for key in source.infos}, **source.extra}


def _average(path: Path, name: str | None) -> AbstractSource | None:
    """The average that a path holds: our own, one that `consolidate` or `merge` exported, or a foreign one."""
    saved = saved_averages(path)
    if saved is not None:
        return saved.source(name)
    try:
        source = _plain_or_none(path)
    except ConfigError:  # a folder of several files: the importers may know which one is the average
        source = None
    exported = None if source is None else source.facts.get("average")
    if exported is not None:
        if name not in (None, exported):
            raise CheckpointError(f"{str(path)!r} holds the average {exported!r} and no {name!r}")
        return source
    found = find_importer(path)
    # Any other name is a key of a plain checkpoint.
    if found is None or name not in (None, found.format, *(found.names or [_ONLY_NAME])):
        return None
    main, *others = found.names or [_ONLY_NAME]
    source = found.open_named(name) if name in others else found.open()
    return Renamed(source, {key: key for key in source.infos}, {"average": name if name in others else main})


def _is_beside_an_average(path: Path, name: str) -> bool:
    """Whether `name` is no average of a user's own checkpoint, but the key of weights that lie beside the averages."""
    saved = saved_averages(path)
    if saved is None or not saved.prefix or name in saved.manifest.averages or saved.prefix == f"{name}.":
        return False
    return any(key.startswith(f"{name}.") for key in saved.folder.infos)


def _plain(path: Path) -> AbstractSource:
    source = _plain_or_none(path)
    if source is None:
        raise CheckpointError(
            f"{str(path)!r} is nothing that is known here: neither a saved average, nor a folder of "
            "torch.distributed.checkpoint, nor a file of torch.save or safetensors"
        )
    return source


def _plain_or_none(path: Path) -> AbstractSource | None:
    if safetensors_of(path):
        return SafetensorsFiles(path)
    if path.is_dir():
        return DcpFolder(path) if (path / INDEX_FILE).exists() else None
    return TorchFile(path)


def _existing(path: StrPath) -> Path:
    text = os.fspath(path)
    if "://" in text:
        raise CheckpointError(f"{text!r} is not on a disk: copy the folder to one first")
    return Path(text)
