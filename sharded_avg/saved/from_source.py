"""A source written as ShardedAverage.save would have: a folder of our own, a slab at a time."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem

from ..files.source import AbstractSource, slabs
from .dcp import written
from .folder import save_folder
from .manifest import BESIDE_KEY, Manifest
from .place import MANIFEST_FILE, place_of


class SourceItem(Tensor):
    """One tensor of a source in a DCP state dict: DCP asks for one slab at a time, and writes it."""

    _read: tuple[AbstractSource, str]

    @staticmethod
    def __new__(cls, source: AbstractSource, name: str) -> SourceItem:
        info = source.infos[name]
        item: SourceItem = Tensor._make_wrapper_subclass(cls, info.shape, dtype=info.dtype, device=torch.device("cpu"))
        item._read = source, name
        return item

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(f"{func} on a tensor that is still in its file")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"SourceItem({self._read[1]!r}, {tuple(self.shape)}, {self.dtype})"

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        source, name = self._read
        return [written(fqn, box, self) for box in slabs(source.infos[name])]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        source, name = self._read
        boxes = {box.offsets: box for box in slabs(source.infos[name])}
        return source.read(name, boxes[tuple(index.offset or ())])


def write_folder(source: AbstractSource, path: Path, manifest: Manifest) -> None:
    """Write the one average of `manifest` as ShardedAverage.save does.

    Tensors of `source` that `manifest` does not list (buffers, frozen parameters) are written beside the average: they
    belong to its full state, and ShardedAverage.load has no use for them.
    """
    (average,) = manifest.averages
    beside = [name for name in source.infos if name not in manifest.tensors and name not in manifest.aliases]
    state = {
        "manifest": manifest.to_json(),
        average: {name: SourceItem(source, name) for name in manifest.tensors},
        **({BESIDE_KEY: {name: SourceItem(source, name) for name in beside}} if beside else {}),
    }
    try:
        save_folder(path, state, manifest, None)
    finally:
        incoming = Path(place_of(path).incoming)
        if not (incoming / MANIFEST_FILE).exists():  # a whole one is somebody's only copy
            shutil.rmtree(incoming, ignore_errors=True)
