"""Averages that describe themselves wherever they lie in a torch file.

AveragedModelImporter  torch.optim.swa_utils.AveragedModel, torchtnt
EmaPytorchImporter     ema-pytorch
ShadowImporter         torch_ema, and the raw state of diffusers' and SimpleTuner's EMAModel: numbered, not named
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ...files.source import AbstractSource
from .base import AbstractImporter, Content, Names, ema_rule, in_order, numbered

_MAX_DEPTH = 3


def mappings(node: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[Any, Any]]]:
    """A dict and the dicts in it, a few levels deep, each with the keys that lead to it."""
    if isinstance(node, dict):
        yield keys, node
        if len(keys) < _MAX_DEPTH:
            for key, value in node.items():
                yield from mappings(value, (*keys, str(key)))


def _prefix(keys: tuple[str, ...]) -> str:
    return "".join(f"{key}." for key in keys)


class AveragedModelImporter(AbstractImporter):
    """`module.<name>` and `n_averaged`, at the top, under any key, or below any submodule's name."""

    format = "averaged_model"
    about = "torch.optim.swa_utils.AveragedModel: module.*"

    def claims(self, content: Content) -> bool:
        return bool(self._places(content))

    def _places(self, content: Content) -> list[tuple[tuple[str, ...], str]]:
        """The keys of each mapping, and the prefix in it, where an AveragedModel's state is."""
        return [
            (keys, prefix)
            for keys, mapping in mappings(content.tree)
            for prefix in _before(mapping, "n_averaged")
            if any(isinstance(key, str) and key.startswith(f"{prefix}module.") for key in mapping)
        ]

    def average(self, content: Content, names: Names | None = None) -> AbstractSource:
        places = self._places(content)
        if len(places) != 1:
            where = [_prefix(keys) + prefix for keys, prefix in places]
            raise content.refuse(f"it holds {len(places)} AveragedModels {where}: save the one that is meant by itself")
        keys, prefix = places[0]
        n_averaged = self.started(content, content.number(*keys, f"{prefix}n_averaged"))
        return self.found(content, content.under(f"{_prefix(keys)}{prefix}module."), n_averaged=n_averaged)


def _before(mapping: dict[Any, Any], last: str) -> list[str]:
    """What stands before a key's last component, where that is `last`."""
    keys = [key for key in mapping if isinstance(key, str)]
    return [key[: -len(last)] for key in keys if key == last or key.endswith(f".{last}")]


class EmaPytorchImporter(AbstractImporter):
    """`ema_model.<name>`, `initted`, `step`, and perhaps `online_model.<name>`, which is raw."""

    format = "ema_pytorch"
    about = "ema-pytorch's EMA and PostHocEMA: ema_model.*"

    def claims(self, content: Content) -> bool:
        return bool(self._places(content))

    def _places(self, content: Content) -> list[tuple[str, ...]]:
        return [keys for keys, mapping in mappings(content.tree) if _is_ema_pytorch(mapping)]

    def average(self, content: Content, names: Names | None = None) -> AbstractSource:
        places = self._places(content)
        if len(places) != 1:
            raise content.refuse(f"it holds {len(places)} states of ema-pytorch: save the one that is meant by itself")
        keys = places[0]
        self.started(content, content.number(*keys, "initted"))
        return self.found(content, content.under(f"{_prefix(keys)}ema_model."), step=_step(content, keys))


def _is_ema_pytorch(mapping: dict[Any, Any]) -> bool:
    has_model = any(isinstance(key, str) and key.startswith("ema_model.") for key in mapping)
    return has_model and "initted" in mapping and "step" in mapping


def _step(content: Content, keys: tuple[str, ...]) -> int | None:
    """PostHocEMA rounds its counter to fp16; the exact one is in the file's name, INDEX.STEP.pt."""
    step = content.number(*keys, "step")
    named = re.fullmatch(r"\d+\.(\d+)\.pt", content.path.name)
    if isinstance(step, float):
        return int(named[1]) if named else None
    return step


class ShadowImporter(AbstractImporter):
    """A list `shadow_params` in parameter order. A list `collected_params` is raw: it was set aside by a swap."""

    numbered = True

    def __init__(self, format: str, about: str, counter: str) -> None:
        self.format = format
        self.about = about
        self._counter = counter

    def claims(self, content: Content) -> bool:
        return bool(self._places(content))

    def _places(self, content: Content) -> list[tuple[str, ...]]:
        return [
            keys
            for keys, mapping in mappings(content.tree)
            if self._counter in mapping and ("shadow_params" in mapping or "shadow_params.0" in mapping)
        ]

    def average(self, content: Content, names: Names | None = None) -> AbstractSource:
        places = self._places(content)
        if len(places) != 1:
            raise content.refuse(f"it holds {len(places)} lists of shadow_params: save the one that is meant by itself")
        keys = places[0]
        step = self.started(content, content.number(*keys, self._counter))
        late = content.number(*keys, "update_after_step") or 0
        flats = numbered(content.source.infos, f"{_prefix(keys)}shadow_params.")
        pairs = in_order(content, flats, names, "a list, shadow_params")
        rule = ema_rule(content.number(*keys, "decay"))
        n_averaged = None if step is None else max(step - int(late), 1)
        return self.found(content, pairs, n_averaged=n_averaged, step=step, rule=rule)
