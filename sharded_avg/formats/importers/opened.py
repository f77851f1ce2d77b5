"""Opening what an importer looks at: a torch file, safetensors, a DCP folder, or a pretrained folder.

Nothing in the file runs, and no tensor is read.
"""

from __future__ import annotations

import os
from pathlib import Path

from ...errors import CheckpointError
from ...files.dcp_folder import INDEX_FILE, DcpFolder
from ...files.facts import load_json
from ...files.safetensors_file import INDEX_SUFFIX, SafetensorsFiles, safetensors_of
from ...files.torch_file import TorchFile, flat_tensors
from ...saved.folder.place import MANIFEST_FILE
from .base import Content, Later

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
        safetensors = SafetensorsFiles(place)
        return Content(place, safetensors, dict(safetensors.infos))
    file = _torch_file(place, ignore_classes)
    # {"a.b": x, "a": {"b": y}} has two tensors of one flat name: then a name does not say which is meant.
    if sum(1 for _ in flat_tensors(file.content)) != len(file.infos):
        raise CheckpointError(f"{str(path)!r} has keys with dots that read like the keys of a dict in it: not opened")
    return Content(place, file, file.content)


def _torch_file(path: Path, ignore_classes: bool) -> TorchFile:
    """Opened; if all that is wrong with it is the classes in it, the error says that they can be left out."""
    try:
        return TorchFile(path, foreign=ignore_classes)
    except CheckpointError as error:
        if ignore_classes:
            raise
        try:
            TorchFile(path, foreign=True)
        except CheckpointError:
            raise error from None
        raise CheckpointError(
            f"{error}. Or leave such objects out, with --ignore-classes (ignore_classes=True): tensors and plain "
            "values are read, and still nothing in the file is run"
        ) from error


def _folder(folder: Path) -> Content | None:
    if (folder / MANIFEST_FILE).exists():
        return None
    if (folder / INDEX_FILE).exists():
        source = DcpFolder(folder)
        return Content(folder, source, {**source.infos, **{name: Later(source, name) for name in source.objects}})
    if (folder / _EMA_FILE).exists():
        return open_content(folder / _EMA_FILE)
    if safetensors_of(folder):
        safetensors, config, file = SafetensorsFiles(folder), {}, folder / _CONFIG_FILE
        if file.is_file():
            config = load_json(file.read_text(encoding="utf-8", errors="replace"), repr(str(file)))
        return Content(folder, safetensors, dict(safetensors.infos), config if isinstance(config, dict) else {})
    averages = [child for child in sorted(folder.glob("*_ema")) if child.is_dir()]
    return _folder(averages[0]) if len(averages) == 1 else None
