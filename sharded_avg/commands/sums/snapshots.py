"""What commands share that sum saves of one run: opening the folder, which names are averaged, what rounding costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ...errors import ConfigError
from ...files.source import AbstractSource
from ...formats.open import StrPath
from ...saved.series import Series
from ..progress import say
from ..target import Target

WORST_ERROR = 1e-4  # of a weight's size, from rounding in what was saved: beyond, it is told
_LARGE_GROWTH = 2  # below, it is the rounding that whoever saved has chosen


def open_series(folder: StrPath, target: Target | None = None) -> Series:
    """The saves in a folder; torn ones are told. Raises `ConfigError` if `target` would be, or be in, one of them."""
    series = Series.found_in(Path(folder))
    for path, why in series.torn.items():
        say(f"{path!r} is passed over: {why}")
    if target is not None:
        target.refuse_sources([*{snapshot.path for snapshot in series.snapshots}, *series.torn])
        if target.format == "folder" and Path(folder).resolve() in target.path.resolve().parents:
            raise ConfigError(
                f"{str(target.path)!r} is in {str(folder)!r}, where it would be taken for one more save of the run: "
                "choose another place"
            )
    return series


def summed_names(source: AbstractSource) -> set[str]:
    """Names of what is averaged, tied ones too; the rest of the state is the last save's."""
    names = set(source.facts["averaged"])
    return names | {alias for alias, name in source.facts.get("aliases", {}).items() if name in names}


def tell_rounding(sources: Sequence[AbstractSource], growth: float, advice: str) -> None:
    """Say so where weights of opposite sign make the rounding of what was saved, `growth`-fold, matter."""
    dtypes = {source.infos[name].dtype for source in sources for name in source.facts["averaged"]}
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    error = growth * torch.finfo(coarsest).eps / 2
    if growth > _LARGE_GROWTH and error > WORST_ERROR:
        say(
            f"this is a small difference of large sums: rounding of what was saved, in "
            f"{str(coarsest).removeprefix('torch.')}, grows {growth:.3g}-fold, to about {error:.1g} of the weights' "
            f"size. If that is too much, {advice}, or average with dtype=torch.float64"
        )
