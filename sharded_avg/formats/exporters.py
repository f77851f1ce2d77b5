"""Averages written in the formats of other tools.

    write_averaged_model  torch.optim.swa_utils.AveragedModel's state dict: `module.<name>`, `n_averaged`
    write_lightning       a .ckpt of Lightning's EMAWeightAveraging: the average is its `state_dict`
    Joined                sources under prefixes, as one
    raw_weights           the weights in a training checkpoint that belong to an average

Values keep the dtype of the average; nothing is narrowed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files.sinks import write_torch
from ..files.source import AbstractSource, Renamed, TensorInfo
from ..shard import Box, take
from .importers import open_content

_LIGHTNING_VERSION = "2.6.0"  # the first whose callbacks write this format


class InMemory(AbstractSource):
    """A few small tensors by name."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        self.infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        self.facts = {}

    def read(self, name: str, box: Box | None = None) -> Tensor:
        tensor = self._tensors[name]
        return tensor if box is None else take(tensor, box)


class Joined(AbstractSource):
    """The tensors of several sources, each under its prefix; tied names stay tied."""

    def __init__(self, parts: Mapping[str, AbstractSource]) -> None:
        self._places = {prefix + name: (part, name) for prefix, part in parts.items() for name in part.infos}
        self.infos = {name: part.infos[inner] for name, (part, inner) in self._places.items()}
        self.extra = {prefix + name: value for prefix, part in parts.items() for name, value in part.extra.items()}
        aliases = {
            prefix + alias: prefix + name
            for prefix, part in parts.items()
            for alias, name in part.facts.get("aliases", {}).items()
            if alias in part.infos and name in part.infos
        }
        self.facts = {"aliases": aliases}

    def read(self, name: str, box: Box | None = None) -> Tensor:
        part, inner = self._places[name]
        return part.read(inner, box)


def write_averaged_model(average: AbstractSource, path: Path, raw: AbstractSource | None = None) -> None:
    """Write what AveragedModel.load_state_dict reads; `raw` gives the entries that are not averaged."""
    whole = _completed(average, raw)
    joined = Joined({"module.": whole, "": InMemory({"n_averaged": _count(average)})})
    write_torch(joined, path, joined.facts)


def write_lightning(average: AbstractSource, path: Path, raw: AbstractSource | None = None) -> None:
    """Write a .ckpt that Lightning's EMAWeightAveraging resumes from and `load_from_checkpoint` reads.

    With `raw`, training goes on from the raw weights and the average with its count. Without, the file has the
    average as the model's weights, and nothing that says otherwise. Optimizer states are not in it.
    """
    parts = {"state_dict.": _completed(average, raw)}
    if raw is not None:
        parts["current_model_state."] = raw
        parts["averaging_state."] = InMemory({"n_averaged": _count(average)})
    joined = Joined(parts)
    step = int(average.facts.get("step") or 0)

    def arrange(tensors: dict[str, Any]) -> dict[str, Any]:
        nested: dict[str, Any] = {prefix.removesuffix("."): {} for prefix in parts}
        for name, tensor in tensors.items():
            key, _, inner = name.partition(".")
            nested[key][inner] = tensor
        header = {"epoch": 0, "global_step": step, "pytorch-lightning_version": _LIGHTNING_VERSION}
        return {**header, **nested, "callbacks": {}, "optimizer_states": [], "lr_schedulers": []}

    write_torch(joined, path, joined.facts, arrange=arrange)


def _count(average: AbstractSource) -> Tensor:
    return torch.tensor(int(average.facts.get("n_averaged") or 1), dtype=torch.long)


def _completed(average: AbstractSource, raw: AbstractSource | None) -> AbstractSource:
    """The average, and the entries of `raw` that it lacks, in the order of `raw`."""
    if raw is None:
        return average
    missing = [name for name in raw.infos if name not in average.infos]
    whole = Joined({"average.": average, "raw.": raw})
    order = {name: f"raw.{name}" if name in missing else f"average.{name}" for name in raw.infos}
    order |= {name: f"average.{name}" for name in average.infos if name not in order}
    extra = {name: f"raw.{name}" for name in raw.extra} | {name: f"average.{name}" for name in average.extra}
    return Renamed(whole, order, {"aliases": dict(average.facts.get("aliases", {}))}, extra)


def raw_weights(path: Path, average: AbstractSource) -> AbstractSource:
    """The one state dict in the checkpoint at `path` with all the names and shapes of the average.

    Raises `CheckpointError` if there is none, or several: then nothing says which are the raw weights.
    """
    content = open_content(path, ignore_classes=True)
    if content is None:
        raise CheckpointError(f"{str(path)!r} holds no raw weights: it is a saved average, or a folder without weights")
    infos = content.source.infos
    shapes = {name: info.shape for name, info in average.infos.items()}
    one = next(iter(shapes), "")
    prefixes = [flat.removesuffix(one) for flat in infos if flat == one or flat.endswith(f".{one}")]
    fitting = [p for p in prefixes if all(p + n in infos and infos[p + n].shape == s for n, s in shapes.items())]
    if len(fitting) != 1:
        found = f"several ({fitting})" if fitting else "no"
        raise CheckpointError(
            f"{str(path)!r} holds {found} weights with the names and shapes of the average ({one!r}, ...). Give a "
            "checkpoint with just the model's raw state dict; --prefix and --add-prefix change the average's names"
        )
    extra = content.source.extra
    return Renamed(
        content.source,
        content.under(fitting[0]),
        extra={name.removeprefix(fitting[0]): name for name in extra if name.startswith(fitting[0])},
    )
