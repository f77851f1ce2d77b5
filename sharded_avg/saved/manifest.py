"""What a saved average says about itself.

A Manifest is JSON that people can read; its `version` is the version of the format, not of the package. It is written
into the checkpoint as one string under the key "manifest", and beside it as `manifest.json`, last, so that a folder
that has one is whole.

    averages    AverageRecord by name: the rule's settings, how many updates, and which steps they took in
    tensors     TensorRecord by name: full shape and stored dtype, the same for every average
    aliases     tied names -> the name in `tensors`
    step        optimizer steps seen, which is where a schedule goes on
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..averages.history import History
from ..errors import CheckpointError

FORMAT = "sharded_avg"
VERSION = 1
BESIDE_KEY = "beside"  # in a folder: tensors of the full state that are not averaged, where a conversion had some


@dataclass(frozen=True, kw_only=True)
class AverageRecord:
    """One average. `updates` lists [first step, last step, every]; not all of `n_averaged` need be listed."""

    rule: Mapping[str, Any]
    n_averaged: int
    updates: list[list[int]] = field(default_factory=list)

    @property
    def history(self) -> History:
        return History.from_lists(self.updates, self.n_averaged)


@dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """One averaged tensor: its full shape, and the dtype it is stored in ("float32")."""

    shape: list[int]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A saved ShardedAverage."""

    step: int
    averages: Mapping[str, AverageRecord]
    tensors: Mapping[str, TensorRecord]
    aliases: Mapping[str, str] = field(default_factory=dict)
    schedule: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)  # how a file that no training wrote came about
    package: str = ""
    torch: str = ""

    def to_json(self) -> str:
        """The text that is written."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: object) -> Manifest:
        """Read what `to_json` wrote; raises `CheckpointError` for anything else, or for a newer version.

        Fields that this version does not know are ignored, so that a newer package can add some.
        """
        try:  # NaN and Infinity are no JSON numbers, and no int()
            data = json.loads(text, parse_constant=int) if isinstance(text, str) else None
        except (ValueError, RecursionError):
            data = None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise CheckpointError("this is not the manifest of a saved average: it has no sharded_avg header")
        if data.get("version") != VERSION:
            raise CheckpointError(
                f"this average was saved in format version {data.get('version')!r}; this package reads version "
                f"{VERSION}. Install a newer sharded_avg"
            )
        try:
            known = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
            known["averages"] = {str(n): _record(AverageRecord, r) for n, r in known["averages"].items()}
            known["tensors"] = {str(n): _record(TensorRecord, r) for n, r in known["tensors"].items()}
            return cls(**known)._checked()
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise CheckpointError(f"the manifest of this average cannot be read: {error!r}") from error

    def _checked(self) -> Manifest:
        """Raise `ValueError` for contents that no save has written."""
        _require(_is_count(self.step), f"step {self.step!r}")
        for name, average in self.averages.items():
            _require(_is_count(average.n_averaged), f"n_averaged {average.n_averaged!r} of {name!r}")
            _require(isinstance(average.rule, dict), f"rule {average.rule!r} of {name!r}")
            _ = average.history
        for name, tensor in self.tensors.items():
            _require(isinstance(tensor.shape, list) and all(map(_is_count, tensor.shape)), f"shape of {name!r}")
            _require(isinstance(tensor.dtype, str), f"dtype of {name!r}")
        for alias, name in self.aliases.items():
            _require(name in self.tensors, f"alias {alias!r} of {name!r}, which is not there")
        return self


def _record(cls: Any, data: Mapping[str, Any]) -> Any:
    return cls(**{name: data[name] for name in cls.__dataclass_fields__ if name in data})


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _require(fits: bool, what: str) -> None:
    if not fits:
        raise ValueError(f"{what} cannot be")
