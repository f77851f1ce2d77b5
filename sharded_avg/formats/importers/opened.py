"""Opening what an importer looks at: a torch file, safetensors, a DCP folder, or a pretrained folder.

Nothing in the file runs, and no tensor is read.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...files.dcp_folder import INDEX_FILE, DcpFolder
from ...files.facts import load_json
from ...files.safetensors_file import INDEX_SUFFIX, SafetensorsFiles, safetensors_of
from ...files.torch_file import TorchFile, flat_tensors
from ...saved.place import MANIFEST_FILE
from .base import Content

_EMA_FILE = "ema.safetensors"
_CONFIG_FILE = "config.json"


def open_content(path: str | os.PathLike[str], *, ignore_classes: bool = False) -> Content | None:
    """The checkpoint at `path`; `None` for a folder without one, and for an average of this package.

    Raises `CheckpointError` for a file that cannot be opened, is damaged, or holds objects of other classes than
    tensors and plain values; with `ignore_classes`, those objects are left out, and no code of theirs runs either way.
    """
    place = Path(path)
    if not place.exists():
        raise CheckpointError(f"{str(path)!r}: there is no such file or folder")
    if place.is_dir():
        return _folder(place)
    if place.suffix == ".safetensors" or place.name.endswith(INDEX_SUFFIX):
        return Content(place, SafetensorsFiles(place))
    file = _torch_file(place, ignore_classes)
    _refuse_ambiguous_names(file, place)
    return Content(place, file, tree=file.content)


def _torch_file(path: Path, ignore_classes: bool) -> TorchFile:
    try:
        return TorchFile(path, foreign=ignore_classes)
    except CheckpointError as error:
        if ignore_classes:
            raise
        _raise_with_way_out(path, error)
        raise


def _raise_with_way_out(path: Path, error: CheckpointError) -> None:
    """If all that is wrong with a file is the classes in it, say that they can be left out."""
    try:
        TorchFile(path, foreign=True)
    except CheckpointError:
        return
    raise CheckpointError(
        f"{error}. Or leave such objects out, with --ignore-classes (ignore_classes=True): tensors and plain values "
        "are read, and still nothing in the file is run"
    ) from error


def _folder(folder: Path) -> Content | None:
    if (folder / MANIFEST_FILE).exists():
        return None
    if (folder / INDEX_FILE).exists():
        return Content(folder, DcpFolder(folder))
    if (folder / _EMA_FILE).exists():
        return Content(folder / _EMA_FILE, SafetensorsFiles(folder / _EMA_FILE))
    if safetensors_of(folder):
        return Content(folder, SafetensorsFiles(folder), config=_config(folder))
    averages = [child for child in sorted(folder.glob("*_ema")) if child.is_dir()]
    return _folder(averages[0]) if len(averages) == 1 else None


def _config(folder: Path) -> dict[str, Any]:
    file = folder / _CONFIG_FILE
    if not file.is_file():
        return {}
    config = load_json(file.read_text(encoding="utf-8", errors="replace"), repr(str(file)))
    return config if isinstance(config, dict) else {}


def _refuse_ambiguous_names(file: TorchFile, path: Path) -> None:
    """{"a.b": x, "a": {"b": y}} has two tensors of one flat name: then a name does not say which is meant."""
    if sum(1 for _ in flat_tensors(file.content)) != len(file.infos):
        raise CheckpointError(f"{str(path)!r} has keys with dots that read like the keys of a dict in it: not opened")
