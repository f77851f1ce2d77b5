"""From saved averages to files that people can use: what the command line does, as functions.

    Target       where and how to write: one safetensors file, several, a torch file, or our own folder
    consolidate  one source -> a Target
    merge        several sources -> a Target

Everything streams: memory is a few slabs (sinks.SLAB_BYTES), whatever the size of the weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..files.sinks import write_safetensors, write_torch
from ..files.source import AbstractSource, Cast, Watched
from ..formats.open import StrPath, open_source
from ..saved.from_source import write_folder
from ..saved.manifest import AverageRecord, Manifest, TensorRecord
from ..version import __version__
from .merge import Merged

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
Report = Callable[[int, int], None]  # bytes so far, bytes in all
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
        """Write all of `source`; the path appears, or changes, only when everything is written."""
        watched = source if report is None else Watched(source, _counting(report, _total_bytes(source)))
        if self.format == "torch":
            write_torch(watched, self.path, exported_facts(facts))
        elif self.format == "folder":
            write_folder(watched, self.path, manifest_of(source, facts))
        else:
            limit = self.max_file_bytes if self._one_file or self.max_file_bytes is not None else 1 << 62
            write_safetensors(watched, self.path, exported_facts(facts), max_file_bytes=limit)


def guess_format(path: Path, folder: str) -> str:
    """By the ending of `path`; `folder` is what a path without one is."""
    if path.suffix == ".safetensors":
        return "safetensors"
    return "torch" if path.suffix in TORCH_SUFFIXES else folder


def consolidate(
    src: StrPath,
    target: Target,
    *,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    report: Report | None = None,
) -> AbstractSource:
    """Write the average `name` of `src`, or plain weights, to `target`; `dtype=None` keeps each tensor's own.

    Raises `CheckpointError` if `src` cannot be read, `NotStartedError` if it has no average yet, and `ConfigError` for
    a target that cannot be. Returns what was written.
    """
    target.refuse_sources([src])
    source = Cast(open_source(src, name), dtype)
    target.write(source, source.facts, report)
    return source


def merge(
    sources: Sequence[StrPath],
    target: Target,
    weights: Sequence[float],
    *,
    method: str = "weights",
    name: str | None = None,
    accumulate: torch.dtype = torch.float64,
    dtype: torch.dtype | None = None,
    report: Report | None = None,
) -> AbstractSource:
    """Write sum of weight_i * source_i to `target`, with its provenance. Sources: averages, or model checkpoints.

    Raises as `consolidate`, and `CheckpointError` if names or shapes differ.
    """
    target.refuse_sources(sources)
    opened = [open_source(source, name) for source in sources]
    merged = Cast(Merged(opened, weights, accumulate=accumulate), dtype)
    facts = _facts_of_merge(opened, [os.fspath(source) for source in sources], weights, method, accumulate)
    target.write(merged, {**facts, "aliases": _shared_aliases(opened), "averaged": _averaged(opened[0])}, report)
    return merged


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


def _facts_of_merge(
    opened: Sequence[AbstractSource],
    paths: Sequence[str],
    weights: Sequence[float],
    method: str,
    accumulate: torch.dtype,
) -> dict[str, Any]:
    parts = [
        {"path": Path(path).name, "weight": weight, **exported_facts({**source.facts, "aliases": None})}
        for path, weight, source in zip(paths, weights, opened, strict=True)
    ]
    names = {source.facts.get("average") for source in opened}
    name = names.pop() if len(names) == 1 else None
    steps = [step for source in opened if isinstance(step := source.facts.get("step"), int)]
    # Averages of one run have most updates in common: the one that took in most stands for all.
    longest = max(opened, key=lambda source: source.facts.get("n_averaged") or 0).facts
    return {
        "average": name or "average",
        "n_averaged": longest.get("n_averaged") or len(opened),
        "updates": longest.get("updates"),
        "step": max(steps, default=0),
        "rule": {"kind": "merge", "method": method},
        "provenance": {
            "kind": "merge",
            "method": method,
            "accumulate": str(accumulate).removeprefix("torch."),
            "sources": parts,
        },
    }


def _averaged(source: AbstractSource) -> list[str]:
    """What counts as averaged: as the source says, or else floating-point tensors but for BatchNorm's statistics."""
    if "averaged" in source.facts:
        return list(source.facts["averaged"])
    infos = source.infos
    statistics = {
        name.replace("num_batches_tracked", kind)
        for name in infos
        if name.rpartition(".")[2] == "num_batches_tracked"
        for kind in ("running_mean", "running_var")
    }
    return [name for name, info in infos.items() if info.dtype.is_floating_point and name not in statistics]


def _shared_aliases(opened: Sequence[AbstractSource]) -> dict[str, str]:
    """Tied names that are tied in every source."""
    first, *others = [dict(source.facts.get("aliases", {})) for source in opened]
    return {alias: name for alias, name in first.items() if all(other.get(alias) == name for other in others)}


def _total_bytes(source: AbstractSource) -> int:
    return sum(info.nbytes for info in source.infos.values())


def _counting(report: Report, total: int) -> Callable[[int], None]:
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        report(min(done, total), total)

    report(0, total)
    return count
