"""An average of another horizon, out of what a run has saved, on the shards: each rank reads its own pieces only.

Karras et al. (EDM2), 2023, arXiv 2312.02696, section 3.2; the coefficients are `Series.mixed`'s. Rank 0 looks through
the folder and decides; the sums are in float64, and rounded once.
"""

from __future__ import annotations

import os
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..averages.state import State
from ..errors import CheckpointError
from ..ranks import Asked, all_or_none, collective, decided, everyone, rank_in
from ..shard import Shard, patches
from .fit import compare
from .folder.claims import window
from .items import describe
from .loading import Loading
from .series import Series
from .sources import SavedAverages, saved_averages


@dataclass(frozen=True)
class Mixed:
    """What `load_posthoc` has loaded: the averages of which saves, in which mixture, and how well the profile is met.

    `parts`: path, average's name, coefficient. `error`: distance from the wanted profile, relative to its size.
    """

    step: int
    error: float
    parts: tuple[tuple[str, str, float], ...]


@collective
@torch.no_grad()
def load_posthoc(
    state: State, path: str | os.PathLike[str], sigma_rel: float, name: str | None, step: int | None
) -> Mixed:
    """Collective: all ranks must call. See `ShardedAverage.load_posthoc`."""
    group, doing = everyone(state.group), f"mixing the averages saved in {path!r}"
    with all_or_none(group, doing) as part:
        folder = Path(path)
        asked = f"load_posthoc({str(folder)!r}, {sigma_rel=!r}, {name=!r}, {step=!r})"
        state.refuse_while_swapped("load_posthoc()")
        state.members.refresh()
        part.asked = Asked(asked, *state.members.digests)
        name = state.resolve(name)

    def look(_: list[None]) -> tuple[Mixed, dict[str, str]]:
        series = Series.found_in(folder)
        snapshots, mixture = series.mixed(sigma_rel, step)
        parts = zip(snapshots, mixture.coefficients, strict=True)
        told = tuple((str(snapshot.path), snapshot.name, float(weight)) for snapshot, weight in parts if weight)
        return Mixed(snapshots[-1].step, float(mixture.error), told), series.torn

    mixed, torn = decided(group, lambda: None, look, doing)
    for where, why in torn.items() if rank_in(group) == 0 else ():
        warnings.warn(f"{where!r} is passed over: {why}", stacklevel=3)
    with all_or_none(group, doing), ExitStack() as stack:
        opened = [(_opened(where), other, weight) for where, other, weight in mixed.parts]
        latest, other, _ = max(opened, key=lambda part: part[0].manifest.step)
        manifest = replace(latest.manifest, averages={name: latest.manifest.averages[other]})
        result = compare(manifest, describe(state))
        replace(result, missing_averages=[]).require_all()
        loading = Loading(state, manifest, result)
        for saved, _, _ in opened:
            stack.enter_context(saved.folder.kept_open())

        def value_of(_: str, shard: Shard) -> Tensor:
            value = torch.empty(shard.tensor.shape, dtype=torch.complex128 if shard.dtype.is_complex else torch.float64)
            for patch in patches(shard.region, tuple(shard.shape)):
                part = window(value, patch)
                part.zero_()
                for saved, other, weight in opened:
                    read = saved.folder.read(f"{saved.prefix}{other}.{shard.name}", patch.box)
                    part += weight * read.to(value.dtype)
            return value

        loading.fill(value_of)
    loading.take_over()
    return mixed


def _opened(where: str) -> SavedAverages:
    saved = saved_averages(Path(where))
    if saved is None:
        raise CheckpointError(f"{where!r} is not there on this rank: give a folder that all ranks see")
    return saved
