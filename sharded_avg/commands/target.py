"""Where and how to write weights: one safetensors file, several, a torch file, or our own folder.

Target          one thing to be written
guess_format    how, by the ending of a path
averaged_names  which tensors of a source count as averaged
exported_facts  what goes into a file about where its weights come from
manifest_of     the same, for a folder
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..files.rounded import AbstractRounded, is_real
from ..files.sinks import write_safetensors, write_torch
from ..files.source import AbstractSource, Watched, is_extra
from ..formats.open import StrPath
from ..saved.folder.from_source import write_folder
from ..saved.manifest import AverageRecord, Manifest, TensorRecord
from ..version import __version__
from .progress import Report, say

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # buffers of torch's normalisations
_EXPORTED_FACTS = ("average", "n_averaged", "step", "rule", "updates", "provenance", "aliases")


@dataclass(frozen=True, kw_only=True)
class Target:
    """One thing to be written at `path`.

    `format` is "safetensors" (one file if `path` ends in .safetensors; else a folder with model.safetensors, or with
    several files of at most `max_file_bytes` and their index), "torch", or "folder": what ShardedAverage.load reads.
    """

    path: Path
    format: str
    max_file_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.format not in ("safetensors", "torch", "folder"):
            raise ConfigError(f"format={self.format!r}: must be 'safetensors', 'torch' or 'folder'")
        if self._one_file and self.path.is_dir():
            raise ConfigError(f"{str(self.path)!r} is a folder, and one file of that name was to be written")
        if self.max_file_bytes is not None and (self._one_file or self.format == "folder"):
            raise ConfigError(
                f"a size for each file goes with a folder of safetensors files, and {str(self.path)!r} is to be "
                f"{'one file' if self._one_file else 'a saved average'}: name a folder without a suffix"
            )
        if not self.path.absolute().parent.is_dir():
            raise ConfigError(f"{str(self.path.absolute().parent)!r} is no folder: make it first")

    @property
    def _one_file(self) -> bool:
        return self.format == "torch" or (self.format == "safetensors" and self.path.suffix == ".safetensors")

    def refuse_sources(self, sources: Sequence[StrPath]) -> None:
        """Raise `ConfigError` if writing would replace, or write into, what is being read."""
        here = self.path.resolve()
        for source in map(Path, sources):
            there = source.resolve()
            if here == there or there in here.parents or here in there.parents:
                raise ConfigError(f"{str(self.path)!r} is (in) the source {str(source)!r}: choose another place")

    def write(self, source: AbstractSource, facts: Mapping[str, Any], report: Report | None = None) -> None:
        """Write all of `source`; the path appears, or changes, only when everything is written.

        What had to be left out, or looks wrong and is right, is told on the standard error stream.
        """
        rounded = source
        if report is not None:
            source = _reported(source, report)
        if self.format == "torch":
            write_torch(source, self.path, exported_facts(facts))
        elif self.format == "folder":
            write_folder(source, self.path, manifest_of(source, facts))
        else:
            limit = self.max_file_bytes if self._one_file or self.max_file_bytes is not None else 1 << 62
            write_safetensors(source, self.path, exported_facts(facts), max_file_bytes=limit)
        if source.extra and self.format == "safetensors":
            names = ", ".join(source.extra)
            say(f"left out, as it is no tensor: {names}; a torch file or a saved average would have it")
        tell_infinite(rounded)


def tell_infinite(source: AbstractSource) -> None:
    """Say which tensors hold infinities that they held before."""
    if isinstance(source, AbstractRounded) and source.infinite:
        say(f"{some_of(source.infinite)}: infinities were written as they are in the source")


def some_of(names: Iterable[str]) -> str:
    """Some of the names, and how many there are more."""
    first = list(names)
    return f"{first[:10]}" + (f" and {len(first) - 10} more" if len(first) > 10 else "")


def _reported(source: AbstractSource, report: Report) -> AbstractSource:
    done, total = 0, sum(info.nbytes for info in source.infos.values())

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        report(min(done, total), total)

    report(0, total)
    return Watched(source, count)


def guess_format(path: Path, folder: str) -> str:
    """By the ending of `path`; `folder` is what a path without one is."""
    if path.suffix == ".safetensors":
        return "safetensors"
    return "torch" if path.suffix in TORCH_SUFFIXES else folder


def averaged_names(source: AbstractSource) -> list[str]:
    """What a source says, or else floating-point tensors but for statistics of normalisations and extra state."""
    if "averaged" in source.facts:
        return list(source.facts["averaged"])
    return [
        name
        for name, info in source.infos.items()
        if is_real(info.dtype) and name.rpartition(".")[2] not in _STATISTICS and not is_extra(name)
    ]


def exported_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What goes into a file about where its weights come from."""
    return {key: facts[key] for key in _EXPORTED_FACTS if facts.get(key) is not None}


def manifest_of(source: AbstractSource, facts: Mapping[str, Any]) -> Manifest:
    """The manifest of a folder with one average, which need not come from a ShardedAverage.

    `facts` may have "average" (its name), "n_averaged", "step", "rule", "updates", "provenance", "aliases", and
    "averaged": the names that are averaged, if not all are.
    """
    averaged = facts.get("averaged", source.infos)
    aliases = {alias: name for alias, name in facts.get("aliases", {}).items() if name in averaged}
    tensors = {name: info for name, info in source.infos.items() if name in averaged and name not in aliases}
    n_averaged = facts.get("n_averaged") or 1  # 0 would mean that there is no average
    step = max(facts.get("step") or 0, n_averaged)
    record = AverageRecord(
        rule=facts.get("rule") or {"kind": "unknown"},
        n_averaged=n_averaged,
        updates=facts.get("updates") or [],
    )
    return Manifest(
        step=step,
        averages={facts.get("average") or "average": record},
        tensors={
            name: TensorRecord(shape=list(info.shape), dtype=str(info.dtype).removeprefix("torch."))
            for name, info in tensors.items()
        },
        aliases=aliases,
        provenance=facts.get("provenance") or {},
        package=__version__,
        torch=str(torch.__version__),
    )
