"""What a sum of saved weights says about itself: of which sources, with which weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...files.source import AbstractSource
from ...formats.open import StrPath
from ..target import averaged_names, exported_facts


def facts_of_sum(
    paths: Sequence[StrPath],
    sources: Sequence[AbstractSource],
    weights: Sequence[float],
    rule: dict[str, Any],
    accumulate: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """The facts of a sum; `rule` has its "kind" and its settings, and is the head of the provenance, too."""
    first, *others = [source.facts.get("aliases", {}) for source in sources]
    shared = {alias: name for alias, name in first.items() if all(other.get(alias) == name for other in others)}
    parts = [
        {"path": Path(path).name, "weight": weight, **exported_facts({**source.facts, "aliases": None})}
        for path, weight, source in zip(paths, weights, sources, strict=True)
    ]
    names = {source.facts.get("average") for source in sources}
    steps = [step for source in sources if isinstance(step := source.facts.get("step"), int)]
    # Averages of one run have most updates in common: the one that took in most stands for all.
    longest = max(sources, key=lambda source: source.facts.get("n_averaged") or 0).facts
    return {
        "average": (names.pop() if len(names) == 1 else None) or "average",
        "n_averaged": longest.get("n_averaged") or len(sources),
        "updates": longest.get("updates"),
        "step": max(steps, default=0),
        "rule": rule,
        "provenance": {**rule, "accumulate": str(accumulate).removeprefix("torch."), "sources": parts},
        "aliases": shared,
        "averaged": averaged_names(sources[0]),
    }
