"""What an importer looks at, and what it gives back.

    Content           one checkpoint of somebody else's, opened: its keys and scalars; tensors are read later, in pieces
    AbstractImporter  one foreign format: whether a Content is in it, and where in the Content the average is
    Names             the model's parameter names in order, for formats that number their tensors

A path is the keys on the way to an entry, joined by dots. Files of torch have dicts in dicts, safetensors and DCP
folders have one dict of such paths: an importer asks by path, and so reads either. Opening runs nothing of the file.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...files.dcp_folder import DcpFolder
from ...files.source import AbstractSource, Renamed, TensorInfo
from ...files.stored import Stored
from ...files.torch_file import flat_tensors

Names = Sequence[str] | Mapping[str, Sequence[int]]
_MAX_DEPTH = 3
_WRAPPERS = re.compile(r"(?<![^.])(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")


@dataclass(frozen=True)
class Content:
    """An opened checkpoint."""

    path: Path  # as the user named it
    source: AbstractSource
    tree: Any  # what torch.save wrote, with a Stored for each tensor; of other files {path: TensorInfo or a Later}
    config: Mapping[str, Any] = field(default_factory=dict)  # config.json beside the weights

    def at(self, path: str) -> Any:
        """The entry at a path, or `None`; a dict of the rests of the paths that go on from there."""
        return _at(self.tree, path)

    def under(self, *prefixes: str) -> dict[str, str]:
        """Paths of tensors that begin with one of the prefixes, keyed by the rest."""
        paths = self.source.infos
        return {path.removeprefix(prefix): path for prefix in prefixes for path in paths if path.startswith(prefix)}

    def places_of(self, last: str) -> list[str]:
        """What stands before `last` in paths that end with it, in dicts a few levels deep; lists are not searched."""

        def walk(node: dict[Any, Any], prefix: str, depth: int) -> Iterator[str]:
            for key, value in node.items():
                if key == last or (isinstance(key, str) and key.endswith(f".{last}")):
                    yield prefix + key[: -len(last)]
                if isinstance(value, dict) and depth:
                    yield from walk(value, f"{prefix}{key}.", depth - 1)

        return list(walk(self.tree, "", _MAX_DEPTH)) if isinstance(self.tree, dict) else []

    def number(self, path: str) -> int | float | None:
        """The number at a path, whether it is a plain one or a tensor of one element; `None` if there is none."""
        info = self.source.infos.get(path)
        if info is not None:
            one = info.nbytes == info.dtype.itemsize
            return as_number(self.source.read(path).reshape(()).item()) if one else None
        value = self.at(path)
        return as_number(value.load() if isinstance(value, Later) else value)

    def refuse(self, problem: str) -> CheckpointError:
        """An error about this checkpoint, to be raised."""
        return CheckpointError(f"{str(self.path)!r}: {problem}")


@dataclass(frozen=True)
class Later:
    """An object of a DCP folder, which is read when it is asked for."""

    folder: DcpFolder
    name: str

    def load(self) -> Any:
        """The object; `None` if it is not made of plain values."""
        try:
            return self.folder.load_object(self.name)
        except CheckpointError:
            return None


def _at(node: Any, path: str) -> Any:
    if isinstance(node, (list, tuple)):
        head, _, rest = path.partition(".")
        entry = node[int(head)] if head.isdigit() and int(head) < len(node) else None
        return _at(entry, rest) if rest else entry
    if not isinstance(node, dict) or path in node:
        return node.get(path) if isinstance(node, dict) else None
    names = [key for key in node if isinstance(key, str)]
    for key in names:
        if path.startswith(f"{key}.") and (found := _at(node[key], path[len(key) + 1 :])) is not None:
            return found
    return {key[len(path) + 1 :]: node[key] for key in names if key.startswith(f"{path}.")} or None


def as_number(value: Any) -> int | float | None:
    """A plain finite number, or `None` for anything else that a file may hold in its place."""
    return value if isinstance(value, (bool, int, float)) and isfinite(value) else None


class AbstractImporter(ABC):
    """One foreign format. Importers have no state; IMPORTERS lists one object of each."""

    format: str  # what --from takes
    about: str  # what writes it, and where the average is
    numbered = False  # whether tensors may lack names, so that `average` needs them
    by_keys = True  # False: judged by names of files, which gives way to a format that is judged by keys

    @abstractmethod
    def places(self, content: Content) -> list[str]:
        """Prefixes of the paths of averages, if this is certainly the format: judged by keys and structure."""

    def possible_places(self, content: Content) -> list[str]:
        """The same, where somebody says that it is the format."""
        return self.places(content)

    def place(self, content: Content) -> str:
        """The prefix of the one average. Raises `CheckpointError` if there are none, or several."""
        places = self.possible_places(content)
        if len(places) != 1:
            raise content.refuse(
                f"it holds {len(places)} averages of {self.format} ({self.about}) {places}: save the one that is meant "
                "by itself"
            )
        return places[0]

    @abstractmethod
    def average(self, content: Content, names: Names | None = None) -> AbstractSource:
        """The averaged tensors under the model's own names, never the raw ones.

        Facts: "format", and where recorded "n_averaged", "step", "rule", and "aliases" (tied name -> first name).
        Raises `CheckpointError` if the file holds no average yet, or not a whole one.
        """

    def named(self, content: Content) -> Mapping[str, str]:
        """Where a format keeps several averages by name: the prefix of each, that of `average` first."""
        return {}

    def average_of(self, content: Content, name: str) -> AbstractSource:
        """As `average`, of one of those that are `named`."""
        return self.found(content, content.under(self.named(content)[name]))

    def found(self, content: Content, flats: Mapping[str, str], **facts: Any) -> AbstractSource:
        """The tensors that `flats` maps to their flat names, under names without wrappers."""
        if not flats:
            raise content.refuse(f"it holds no tensors where {self.format} keeps the average ({self.about})")
        clean = {_WRAPPERS.sub("", name): flat for name, flat in flats.items()}
        if len(clean) != len(flats):
            raise content.refuse("two tensors have the same name once the names of wrappers are gone")
        known = {key: value for key, value in facts.items() if value is not None}
        stored = dict(flat_tensors(content.tree))
        first: dict[Stored, str] = {}
        original = {
            name: first.setdefault(stored[flat], name)
            for name, flat in clean.items()
            if flat in stored and 0 not in stored[flat].shape
        }
        aliases = {name: tied for name, tied in original.items() if name != tied}
        ties = {"aliases": aliases} if aliases else {}
        prefixes = {flat.removesuffix(name) for name, flat in flats.items() if flat.endswith(name)}
        extra = {
            _WRAPPERS.sub("", path.removeprefix(prefix)): path
            for path in content.source.extra
            for prefix in prefixes
            if path.startswith(prefix)
        }
        return Renamed(content.source, clean, {"format": self.format, **known, **ties}, extra)

    def started(self, content: Content, n_averaged: float | None) -> int | None:
        """`n_averaged` as an int. Raises `CheckpointError` if it is 0: then the copies are the first weights."""
        if n_averaged is not None and n_averaged < 1:
            raise content.refuse(
                f"no update has gone into its average ({self.format} counts {n_averaged}): what it holds in its place "
                "is the weights that training began with. Use a later checkpoint"
            )
        return None if n_averaged is None else int(n_averaged)


def ema_rule(decay: float | None) -> dict[str, Any] | None:
    """The settings of an EMA, where its decay is recorded."""
    return None if decay is None else {"kind": "EMA", "decay": float(decay)}


def is_state(node: Any) -> bool:
    """Whether it is a module's state dict: names and tensors, and perhaps modules' extra state."""
    if not isinstance(node, dict) or not any(map(is_tensor, node.values())):
        return False
    return all(
        isinstance(key, str) and (is_tensor(value) or key.endswith("_extra_state")) for key, value in node.items()
    )


def is_tensor(value: Any) -> bool:
    """Whether an entry of a Content's tree stands for a tensor."""
    return isinstance(value, (Stored, TensorInfo))


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


def numbered(content: Content, prefix: str) -> list[str]:
    """The paths prefix0, prefix1, ... in order."""
    rests = content.under(prefix)
    return [rests[str(index)] for index in range(len(rests)) if str(index) in rests]
