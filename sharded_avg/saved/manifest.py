"""What a saved average says about itself.

A Manifest is JSON that people can read; its `version` is the version of the format, not of the package. It is written
into the checkpoint as one string under the key "manifest", and beside it as `manifest.json`, last, so that a folder
that has one is whole.

    averages    AverageRecord by name: the rule's settings, how many updates, and which steps they took in
    tensors     TensorRecord by name: full shape and stored dtype, the same for every average
    aliases     tied names -> the name in `tensors`
    empty       TensorRecord by name of what has no elements, and so nothing else to store
    extra       what modules add to `state_dict()` by `get_extra_state`, under its keys, as plain.py writes it
    step        optimizer steps seen, which is where a schedule goes on
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..averages.history import History
from ..errors import CheckpointError

FORMAT = "sharded_avg"
VERSION = 1
BESIDE_KEY = "beside"  # in a folder: tensors of the full state that are not averaged, where a conversion had some


@dataclass(frozen=True, kw_only=True)
class AverageRecord:
    """One average. `updates` lists [first step, last step, every]; not all of `n_averaged` need be listed.

    `snapshots` of it are saved, too, the newest under the average's name and "/0", the one before under "/1", ...
    """

    rule: Mapping[str, Any]
    n_averaged: int
    updates: list[list[int]] = field(default_factory=list)
    snapshots: int = 0

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
    empty: Mapping[str, TensorRecord] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)  # only where values are saved, too
    schedule: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)  # how a file that no training wrote came about
    package: str = ""
    torch: str = ""

    def to_json(self) -> str:
        """The text that is written: a line for each entry, which json writes many times faster than with `indent`."""
        fields = {"format": FORMAT, "version": VERSION, **vars(self)}
        return "{\n" + ",\n".join(f" {json.dumps(name)}: {_lines(value)}" for name, value in fields.items()) + "\n}"

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
            for field_ in ("tensors", "empty"):
                known[field_] = {str(n): _record(TensorRecord, r) for n, r in known.get(field_, {}).items()}
            return cls(**known)._checked()
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise CheckpointError(f"the manifest of this average cannot be read: {error!r}") from error

    def _checked(self) -> Manifest:
        """Raise `ValueError` for contents that no save has written."""
        _require(_is_count(self.step), f"step {self.step!r}")
        for name, average in self.averages.items():
            _require(_is_count(average.n_averaged), f"n_averaged {average.n_averaged!r} of {name!r}")
            _require(_is_count(average.snapshots), f"snapshots {average.snapshots!r} of {name!r}")
            _require(isinstance(average.rule, dict), f"rule {average.rule!r} of {name!r}")
            _ = average.history
        for name, tensor in (*self.tensors.items(), *self.empty.items()):
            _require(isinstance(tensor.shape, list) and all(map(_is_count, tensor.shape)), f"shape of {name!r}")
            _require(isinstance(tensor.dtype, str), f"dtype of {name!r}")
        for alias, name in self.aliases.items():
            known = name in self.tensors or name in self.empty
            _require(known, f"alias {alias!r} of {name!r}, which is not there")
        _require(isinstance(self.extra, dict), "extra state that is no dict")
        return self

    @property
    def counts(self) -> dict[str, Any]:
        """How far every average is: the same on all ranks of a job."""
        return {"step": self.step, **{name: (a.n_averaged, a.updates) for name, a in self.averages.items()}}

    def digest(self) -> bytes:
        """Equal where `counts`, names, shapes and dtypes are."""
        parts = (json.dumps(self.counts), *map(_lines, (self.tensors, self.aliases, self.empty)))
        return hashlib.sha256("\0".join(parts).encode()).digest()

    def joined_by(self, others: Iterable[Manifest]) -> Manifest:
        """The manifest of a job whose ranks hold other parts of one model. Raises `CheckpointError`."""
        joined: dict[str, Any] = {
            field_: dict(getattr(self, field_)) for field_ in ("tensors", "aliases", "empty", "extra")
        }
        for other in others:
            if other.counts != self.counts:
                raise CheckpointError(
                    f"ranks that save together have averages of other counts: {self.counts} and {other.counts}. Call "
                    "update() on all ranks after the same steps, or save each model to a path of its own"
                )
            for field_, known in joined.items():
                for name, value in getattr(other, field_).items():
                    if known.setdefault(name, value) != value and field_ != "extra":
                        raise CheckpointError(
                            f"{name!r} is {known[name]} on one rank and {value} on another: these are two models. Save "
                            "each to a path of its own, or give the parameters names of their own"
                        )
        return replace(self, **joined)


def _lines(value: Any) -> str:
    if not isinstance(value, Mapping) or not value:
        return json.dumps(value)
    entries = (f"  {json.dumps(str(name))}: {json.dumps(entry, default=vars)}" for name, entry in value.items())
    return "{\n" + ",\n".join(entries) + "\n }"


def _record(cls: Any, data: Mapping[str, Any]) -> Any:
    return cls(**{name: data[name] for name in cls.__dataclass_fields__ if name in data})


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _require(fits: bool, what: str) -> None:
    if not fits:
        raise ValueError(f"{what} cannot be")
