"""Averages from one format into another.

Conversion  what to convert, and how; `run()` does it
read_names  a file of parameter names, for formats that number their tensors
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, ConfigError
from ..files.facts import load_json
from ..files.rounded import Cast
from ..files.source import AbstractSource, Renamed
from ..formats.exporters import raw_weights, write_averaged_model, write_lightning
from ..formats.importers import IMPORTERS, Names, find_importer
from ..formats.open import open_source
from ..saved.folder.from_source import write_folder
from ..saved.manifest import Manifest
from .progress import Report
from .target import Target, averaged_names, exported_facts, manifest_of, tell_infinite

TARGETS = ("sharded_avg", "averaged_model", "lightning", "safetensors", "torch")


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """One average, from `src` to `out`.

    `to` is one of TARGETS. `format` forces an importer; without it the format is found out. `names` lists the
    parameters that are averaged: needed for formats that number their tensors, and otherwise the list of what counts
    as averaged in a sharded_avg folder. `prefix` keeps names that begin with it, and takes it off; `add_prefix` puts
    one before all. `raw` is a checkpoint with the raw weights, for targets that hold both. `n_averaged` is for formats
    that do not record it. `dtype=None` keeps each tensor's own. `ignore_classes` opens files with foreign objects.
    `allow_nonfinite` writes infinities and NaN, too.
    """

    src: Path
    out: Path
    to: str
    format: str | None = None
    name: str | None = None
    names: Names | None = None
    prefix: str = ""
    add_prefix: str = ""
    raw: Path | None = None
    n_averaged: int | None = None
    dtype: torch.dtype | None = None
    ignore_classes: bool = False
    allow_nonfinite: bool = False

    def __post_init__(self) -> None:
        if self.to not in TARGETS:
            raise ConfigError(f"to={self.to!r}: must be one of {', '.join(TARGETS)}")
        if self.raw is not None and self.to not in ("averaged_model", "lightning"):
            raise ConfigError(f"raw={str(self.raw)!r}: a {self.to} target has no place for raw weights")
        if self.n_averaged is not None and self.n_averaged < 1:
            raise ConfigError(f"n_averaged={self.n_averaged}: an average has had at least one update")

    def run(self, report: Report | None = None) -> AbstractSource:
        """Write the target, and return what was written. Memory is a few slabs, whatever the size of the weights.

        Raises `CheckpointError` if `src` holds no average that is known, and `ConfigError` for what cannot be asked.
        """
        target = Target(
            path=self.out, format={"sharded_avg": "folder", "safetensors": "safetensors"}.get(self.to, "torch")
        )
        target.refuse_sources([self.src])
        source = self.average()
        if self.to == "sharded_avg":
            write_folder(source, self.out, self._manifest(source))
        elif self.to in ("averaged_model", "lightning"):
            raw = None if self.raw is None else raw_weights(self.raw, source)
            write = write_lightning if self.to == "lightning" else write_averaged_model
            write(source, self.out, raw)
        else:
            target.write(source, exported_facts(source.facts), report)
            return source
        tell_infinite(source)
        return source

    def average(self) -> AbstractSource:
        """The average of `src` with the names, the dtype and the counts that it will be written with."""
        source = self._opened()
        names = {name.removeprefix(self.prefix): name for name in source.infos if name.startswith(self.prefix)}
        if not names:
            raise ConfigError(f"prefix={self.prefix!r}: no name begins with it; they are {list(source.infos)[:5]}, ...")
        names = {self.add_prefix + new: old for new, old in names.items()}
        extra = {
            self.add_prefix + name.removeprefix(self.prefix): name
            for name in source.extra
            if name.startswith(self.prefix)
        }
        renamed = Renamed(source, names, self._facts(source, names), extra)
        return Cast(renamed, self.dtype, allow_nonfinite=self.allow_nonfinite)

    def _opened(self) -> AbstractSource:
        found = None
        if self.format != "sharded_avg":
            found = find_importer(self.src, self.format, ignore_classes=self.ignore_classes)
        if found is not None:
            return found.open(self.names if found.importer.numbered else None)
        source = open_source(self.src, self.name)
        if "average" not in source.facts:
            raise CheckpointError(
                f"{str(self.src)!r} holds weights, and nothing in it says that they are an average. If you know its "
                f"format, give it with --from: {', '.join(importer.format for importer in IMPORTERS)}"
            )
        return source

    def _facts(self, source: AbstractSource, names: Mapping[str, str]) -> dict[str, Any]:
        """What the target says about the average. Unknown counts become 1 update, and the provenance says so."""
        given, recorded = self.n_averaged, source.facts.get("n_averaged")
        new_name = {old: new for new, old in names.items()}
        aliases = source.facts.get("aliases", {})
        facts: dict[str, Any] = {
            "average": source.facts.get("average", "average"),
            "aliases": {new_name[a]: new_name[n] for a, n in aliases.items() if a in new_name and n in new_name},
        }
        if "averaged" in source.facts:
            facts["averaged"] = [new_name[name] for name in source.facts["averaged"] if name in new_name]
        if source.facts.get("format") == "sharded_avg" and given is None:
            return facts
        n_averaged = given or recorded or 1
        step = max(int(source.facts.get("step") or 0), n_averaged)
        count = "given" if given else "recorded" if recorded else "not recorded: taken for 1"
        return {
            **facts,
            "n_averaged": n_averaged,
            "step": step,
            "updates": [],  # nobody recorded which steps they were
            "provenance": {
                "kind": "convert",
                "format": source.facts.get("format"),
                "source": self.src.name,
                "n_averaged": count,
            },
        }

    def _manifest(self, source: AbstractSource) -> Manifest:
        averaged = averaged_names(source) if self.names is None else list(filter(self._is_listed, source.infos))
        if not averaged:
            raise CheckpointError(f"{str(self.src)!r} holds no tensors that can be averaged")
        aliases = {alias: name for alias, name in source.facts["aliases"].items() if name in averaged}
        facts = {**source.facts, "aliases": aliases, "averaged": averaged}
        return manifest_of(Renamed(source, {name: name for name in averaged}), facts)

    def _is_listed(self, name: str) -> bool:
        listed = name.removeprefix(self.add_prefix)
        return listed in (self.names or ()) or self.prefix + listed in (self.names or ())


def read_names(path: Path) -> Names:
    """Parameter names, one a line, or as a JSON list, or as a JSON object {name: shape}, which is checked."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--names {str(path)!r} cannot be read: {error}") from error
    if not text.lstrip().startswith(("[", "{")):
        return [line.strip() for line in text.splitlines() if line.strip()]
    names = load_json(text, repr(str(path)))
    shapes = list(names.values()) if isinstance(names, dict) else []
    if not all(isinstance(name, str) for name in names) or not all(isinstance(shape, list) for shape in shapes):
        raise ConfigError(f"--names {str(path)!r}: a list of names, or an object of names and shapes, was expected")
    return dict(names) if isinstance(names, dict) else list(names)
