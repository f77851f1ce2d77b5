"""What an importer looks at, and what it gives back.

    Content           one checkpoint of somebody else's, opened: its keys and scalars; tensors are read later, in pieces
    AbstractImporter  one foreign format: whether a Content is in it, and where in the Content the average is
    Names             the model's parameter names in order, for formats that number their tensors

Tensors have flat names: the keys on the way to them, joined by dots. Opening runs nothing of the file.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...files.source import AbstractSource, Renamed
from ...files.stored import Stored
from ...files.torch_file import flat_tensors

Names = Sequence[str] | Mapping[str, Sequence[int]]
_WRAPPERS = re.compile(r"(?<![^.])(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")


@dataclass(frozen=True)
class Content:
    """An opened checkpoint. `tree` is the object that torch.save wrote, with a Stored for each tensor; else {}."""

    path: Path  # as the user named it
    source: AbstractSource
    tree: Any = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)  # config.json beside the weights

    def at(self, *keys: str) -> Any:
        """The entry of nested dicts under `keys`, or `None`."""
        node = self.tree
        for key in keys:
            node = node.get(key) if isinstance(node, dict) else None
        return node

    def under(self, *prefixes: str) -> dict[str, str]:
        """Flat names that begin with one of the prefixes, keyed by the rest."""
        flats = self.source.infos
        return {flat.removeprefix(prefix): flat for prefix in prefixes for flat in flats if flat.startswith(prefix)}

    def number(self, *keys: str) -> int | float | None:
        """The number under `keys`, whether it is a plain one or a tensor of one element; `None` if there is none."""
        node = self.at(*keys)
        return self.scalar(".".join(keys)) if isinstance(node, Stored) else as_number(node)

    def scalar(self, flat: str) -> int | float | None:
        """The value of a tensor of one element; `None` if there is none of that name and size."""
        info = self.source.infos.get(flat)
        if info is None or info.nbytes != info.dtype.itemsize:
            return None
        return as_number(self.source.read(flat).reshape(()).item())

    def refuse(self, problem: str) -> CheckpointError:
        """An error about this checkpoint, to be raised."""
        return CheckpointError(f"{str(self.path)!r}: {problem}")


def as_number(value: Any) -> int | float | None:
    """A plain finite number, or `None` for anything else that a file may hold in its place."""
    return value if isinstance(value, (bool, int, float)) and isfinite(value) else None


class AbstractImporter(ABC):
    """One foreign format. Importers have no state; IMPORTERS lists one object of each."""

    format: str  # what --from takes
    about: str  # what writes it, and where the average is
    numbered = False  # whether tensors may lack names, so that `average` needs them

    @abstractmethod
    def claims(self, content: Content) -> bool:
        """Whether this is certainly the format: judged by keys and structure."""

    def accepts(self, content: Content) -> bool:
        """Whether this can be the format, where somebody says that it is."""
        return self.claims(content)

    @abstractmethod
    def average(self, content: Content, names: Names | None = None) -> AbstractSource:
        """The averaged tensors under the model's own names, never the raw ones.

        Facts: "format", and where recorded "n_averaged", "step", "rule", and "aliases" (tied name -> first name).
        Raises `CheckpointError` if the file holds no average yet, or not a whole one.
        """

    def found(self, content: Content, flats: Mapping[str, str], **facts: Any) -> AbstractSource:
        """The tensors that `flats` maps to their flat names, under names without wrappers."""
        if not flats:
            raise content.refuse(f"it holds no tensors where {self.format} keeps the average ({self.about})")
        clean = {_WRAPPERS.sub("", name): flat for name, flat in flats.items()}
        if len(clean) != len(flats):
            raise content.refuse("two tensors have the same name once the names of wrappers are gone")
        known = {key: value for key, value in facts.items() if value is not None}
        return Renamed(content.source, clean, {"format": self.format, **known, **_ties(content, clean)})

    def started(self, content: Content, n_averaged: float | None) -> int | None:
        """`n_averaged` as an int. Raises `CheckpointError` if it is 0: then the copies are the first weights."""
        if n_averaged is not None and n_averaged < 1:
            raise content.refuse(
                f"no update has gone into its average ({self.format} counts {n_averaged}): what it holds in its place "
                "is the weights that training began with. Use a later checkpoint"
            )
        return None if n_averaged is None else int(n_averaged)


def _ties(content: Content, names: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Names of one and the same tensor of a torch file."""
    stored = dict(flat_tensors(content.tree))
    first: dict[Stored, str] = {}
    aliases = {}
    for name, flat in names.items():
        if flat in stored and 0 not in stored[flat].shape:
            original = first.setdefault(stored[flat], name)
            if original != name:
                aliases[name] = original
    return {"aliases": aliases} if aliases else {}


def ema_rule(decay: float | None) -> dict[str, Any] | None:
    """The settings of an EMA, where its decay is recorded."""
    return None if decay is None else {"kind": "EMA", "decay": float(decay)}


def is_state(node: Any) -> bool:
    """Whether it is a module's state dict: names and tensors, and perhaps modules' extra state."""
    if not isinstance(node, dict) or not any(isinstance(value, Stored) for value in node.values()):
        return False
    return all(
        isinstance(key, str) and (isinstance(value, Stored) or key.endswith("_extra_state"))
        for key, value in node.items()
    )


def in_order(content: Content, flats: Sequence[str], names: Names | None, what: str) -> dict[str, str]:
    """Pair tensors that a file numbers with the model's names. Raises `CheckpointError` if they cannot belong."""
    if names is None:
        raise content.refuse(
            f"its {len(flats)} averaged tensors are {what}, in the order of the model's parameters and without names. "
            "Give the names: --names FILE (or names=), one a line or as JSON, as written by "
            "json.dump({name: list(p.shape) for name, p in model.named_parameters()}, file)"
        )
    if len(set(names)) != len(flats) or len(names) != len(flats):
        raise content.refuse(
            f"it has {len(flats)} averaged tensors, and {len(names)} names were given ({len(set(names))} different): "
            "give the names of exactly the parameters that were handed to the average, in that order"
        )
    pairs = dict(zip(names, flats, strict=True))
    if isinstance(names, Mapping):
        for name, flat in pairs.items():
            found = content.source.infos[flat].shape
            if tuple(names[name]) != tuple(found):
                raise content.refuse(
                    f"{name!r} has shape {list(names[name])}, and the tensor in its place {list(found)}"
                )
    return pairs


def numbered(flats: Iterable[str], prefix: str) -> list[str]:
    """The flat names prefix0, prefix1, ... in order."""
    rests = {flat.removeprefix(prefix): flat for flat in flats if flat.startswith(prefix)}
    return [rests[str(index)] for index in range(len(rests)) if str(index) in rests]
