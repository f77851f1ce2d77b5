"""Named full tensors somewhere on disk, read a piece at a time.

    TensorInfo      shape and dtype of one tensor
    AbstractSource  what a reader of one kind of file or folder provides; nothing is read before `read`
    Renamed         a source under other names, or a part of one
    Watched         a source that reports the bytes it hands out
    Lazy            values by name that are made when they are asked for
    slabs           how a tensor is cut so that only a small piece of it is in memory

Consolidating, merging, converting and inspecting are written once, on sources. Opening one runs no code of the file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..shard import Box

SLAB_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a source."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class AbstractSource(ABC):
    """Full tensors by name. `read` returns CPU tensors and needs memory for what it returns, not for the file."""

    infos: Mapping[str, TensorInfo]  # every tensor that can be read, in the file's order
    extra: Mapping[str, Any] = MappingProxyType({})  # entries of the state dict that are no tensors
    facts: Mapping[str, Any]  # what else the file says: "format", and where known "n_averaged", "step", "rule"; JSON

    @abstractmethod
    def read(self, name: str, box: Box | None = None) -> Tensor:
        """The values of one tensor, or of a Box of it. Raises `CheckpointError` if the file does not hold them."""


class Lazy(Mapping[str, Any]):
    """`load(names[name])` under each name."""

    def __init__(self, names: Mapping[str, str], load: Callable[[str], Any]) -> None:
        self._names, self._load = dict(names), load

    def __getitem__(self, name: str) -> Any:
        return self._load(self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def is_extra(name: str) -> bool:
    """Whether a name of a state dict is that of a module's extra state, which only the module understands."""
    return "_extra_state" in name.split(".")


class Renamed(AbstractSource):
    """The tensors of `source` that `names` mentions: `names` maps the new name to the name in `source`.

    `extra` does the same for entries that are no tensors; without it, all of them keep their names.
    """

    def __init__(
        self,
        source: AbstractSource,
        names: Mapping[str, str],
        facts: Mapping[str, Any] | None = None,
        extra: Mapping[str, str] | None = None,
    ) -> None:
        self._source = source
        self._names = dict(names)
        self.infos = {new: source.infos[old] for new, old in self._names.items()}
        self.extra = source.extra if extra is None else Lazy(extra, source.extra.__getitem__)
        self.facts = {**source.facts, **(facts or {})}

    def read(self, name: str, box: Box | None = None) -> Tensor:
        return self._source.read(self._names[name], box)


class Watched(AbstractSource):
    """The tensors of `source`; `report` is told the bytes of each read, after it."""

    def __init__(self, source: AbstractSource, report: Callable[[int], None]) -> None:
        self._source = source
        self._report = report
        self.infos, self.extra, self.facts = source.infos, source.extra, source.facts

    def read(self, name: str, box: Box | None = None) -> Tensor:
        tensor = self._source.read(name, box)
        self._report(tensor.nbytes)
        return tensor


def slabs(info: TensorInfo, max_bytes: int = SLAB_BYTES) -> Iterator[Box]:
    """Boxes that follow each other in row-major order and fill the tensor, none larger than `max_bytes`."""
    yield from _slabs((), info.shape, max(1, max_bytes // info.dtype.itemsize))


def _slabs(index: tuple[int, ...], shape: tuple[int, ...], max_elements: int) -> Iterator[Box]:
    """Slabs of the part of a tensor whose first coordinates are `index`; `shape` is what is left."""
    whole = Box.whole(shape)
    if not whole.numel:
        return
    if whole.numel <= max_elements:
        yield Box((*index, *whole.offsets), ((1,) * len(index) + whole.lengths))
        return
    row = whole.numel // shape[0]
    if row > max_elements:
        for i in range(shape[0]):
            yield from _slabs((*index, i), shape[1:], max_elements)
        return
    step = max_elements // row
    for i in range(0, shape[0], step):
        offsets, lengths = (i, *whole.offsets[1:]), (min(step, shape[0] - i), *shape[1:])
        yield Box((*index, *offsets), (1,) * len(index) + lengths)
