"""Named full tensors somewhere on disk, read a piece at a time.

    TensorInfo      shape and dtype of one tensor
    AbstractSource  what a reader of one kind of file or folder provides; nothing is read before `read`
    Renamed         a source under other names, or a part of one
    Cast            a source with its floating-point tensors in another dtype
    Watched         a source that reports the bytes it hands out

Consolidating, merging, converting and inspecting are written once, on sources. Opening one runs no code of the file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..shard import Box


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

    @property
    @abstractmethod
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor that can be read, in the file's order."""

    @abstractmethod
    def read(self, name: str, box: Box | None = None) -> Tensor:
        """The values of one tensor, or of a Box of it. Raises `CheckpointError` if the file does not hold them."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What else the file says: "format", and where known "n_averaged", "step", "rule"; JSON values."""
        return {}


class Renamed(AbstractSource):
    """The tensors of `source` that `names` mentions: `names` maps the new name to the name in `source`."""

    def __init__(
        self, source: AbstractSource, names: Mapping[str, str], facts: Mapping[str, Any] | None = None
    ) -> None:
        self._source = source
        self._names = dict(names)
        self._facts = {**source.facts, **(facts or {})}

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return {new: self._source.infos[old] for new, old in self._names.items()}

    def read(self, name: str, box: Box | None = None) -> Tensor:
        return self._source.read(self._names[name], box)

    @property
    def facts(self) -> Mapping[str, Any]:
        return self._facts


class Cast(AbstractSource):
    """The tensors of `source`, the floating-point ones rounded to `dtype`; all as they are if it is `None`."""

    def __init__(self, source: AbstractSource, dtype: torch.dtype | None) -> None:
        self._source = source
        self._infos = {
            name: TensorInfo(info.shape, dtype if dtype is not None and info.dtype.is_floating_point else info.dtype)
            for name, info in source.infos.items()
        }

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, name: str, box: Box | None = None) -> Tensor:
        return self._source.read(name, box).to(self._infos[name].dtype)

    @property
    def facts(self) -> Mapping[str, Any]:
        return self._source.facts


class Watched(AbstractSource):
    """The tensors of `source`; `report` is told the bytes of each read, after it."""

    def __init__(self, source: AbstractSource, report: Callable[[int], None]) -> None:
        self._source = source
        self._report = report

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._source.infos

    def read(self, name: str, box: Box | None = None) -> Tensor:
        tensor = self._source.read(name, box)
        self._report(tensor.numel() * tensor.dtype.itemsize)
        return tensor

    @property
    def facts(self) -> Mapping[str, Any]:
        return self._source.facts
