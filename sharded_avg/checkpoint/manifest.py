"""What a saved average says about itself.

A Manifest is JSON that people can read; its `version` is the version of the format, not of the package. It is written
into the checkpoint as one string, and beside it as `manifest.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import CheckpointError

FORMAT = "sharded_avg"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class AverageRecord:
    """One average: its rule's settings, how many updates went in, and the dtype it is stored in."""

    rule: Mapping[str, Any]
    n_averaged: int
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A saved ShardedAverage. `step` counts optimizer steps seen; `shapes` are of full tensors."""

    step: int
    averages: Mapping[str, AverageRecord]
    shapes: Mapping[str, list[int]]
    aliases: Mapping[str, str] = field(default_factory=dict)  # tied names -> the name in `shapes`
    package: str = ""
    torch: str = ""

    def to_json(self) -> str:
        """The text that is written."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: object) -> Manifest:
        """Read what `to_json` wrote; raises `CheckpointError` for anything else, or for a newer version."""
        try:
            data = json.loads(text) if isinstance(text, str) else None
            if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
                raise CheckpointError("this is not the manifest of a saved average: it has no sharded_avg header")
            version = data.pop("version", None)
            if version != VERSION:
                raise CheckpointError(
                    f"this average was saved in format version {version!r}; this package reads version {VERSION}. "
                    "Install a newer sharded_avg"
                )
            averages = {name: AverageRecord(**record) for name, record in data.pop("averages").items()}
            return cls(averages=averages, **data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"the manifest of this average cannot be read: {error!r}") from error
