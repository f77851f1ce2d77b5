"""A source written as ShardedAverage.save would have: a folder of our own, a slab at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ...averages.arguments import MANIFEST_KEY
from ...errors import CheckpointError
from ...files.source import AbstractSource, slabs
from ..manifest import BESIDE_KEY, Manifest, TensorRecord
from ..plain import encode
from .claims import Piece
from .place import MANIFEST_FILE, place_of
from .saving import whole, write_file


def write_folder(source: AbstractSource, path: Path, manifest: Manifest) -> None:
    """Write the one average of `manifest` as ShardedAverage.save does.

    Tensors of `source` that `manifest` does not list (buffers, frozen parameters) are written beside the average: they
    belong to its full state, and ShardedAverage.load has no use for them.
    """
    (average,) = manifest.averages
    infos = source.infos
    empty = {
        name: TensorRecord(shape=list(infos[name].shape), dtype=str(infos[name].dtype).removeprefix("torch."))
        for name in infos
        if 0 in infos[name].shape and name not in manifest.aliases
    }
    tensors = {name: record for name, record in manifest.tensors.items() if name not in empty}
    manifest = replace(manifest, tensors=tensors, empty=empty, extra={k: encode(v) for k, v in source.extra.items()})
    beside = [name for name in source.infos if name not in tensors and name not in manifest.aliases]
    keys = {name: f"{average}.{name}" for name in manifest.tensors} | {name: f"{BESIDE_KEY}.{name}" for name in beside}
    place = place_of(path)
    try:
        place.prepare()
        objects = {MANIFEST_KEY: manifest.to_json()}
        whole(place, [write_file(place, "__0_0.distcp", _slabs(source, keys), objects)], manifest)
    except OSError as error:
        raise CheckpointError(f"saving to {place.incoming!r} failed: {error!r}") from error
    finally:
        incoming = Path(place.incoming)
        if not (incoming / MANIFEST_FILE).exists():  # a whole one is somebody's only copy
            shutil.rmtree(incoming, ignore_errors=True)


def _slabs(source: AbstractSource, keys: dict[str, str]) -> Iterator[Piece]:
    """Each is read when it is written."""
    for name, key in keys.items():
        info = source.infos[name]
        for box in slabs(info):
            yield Piece(key, info.shape, box, source.read(name, box))
