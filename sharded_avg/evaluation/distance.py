"""How far an average is from the live weights: one small reduction, nothing of the size of the model."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
import torch.distributed as dist
from torch import Tensor

from ..averages.state import State
from ..ranks import all_or_none, comm_device, gather_objects, rank_in, size_of
from ..shard import Region, Shard
from ..tensors import split

CHUNK_ELEMENTS = 1 << 20  # of each tensor at a time, in float64


def distance(state: State, name: str | None) -> float:
    """Collective: all ranks must call. ||live - average|| / ||live|| over all elements of all ranks, each once.

    0 if both are equal; infinite if only the live weights are zero. Computed in float64.
    """
    return _ratio(_sums(state, name).sum(0))


def distances(state: State, name: str | None) -> dict[str, float]:
    """Collective: all ranks must call. The same for each module that has averaged parameters of its own, by path."""
    modules: dict[str, Tensor] = {}
    for shard, squares in zip(state.members.averaged, _sums(state, name), strict=True):
        path = shard.name.rpartition(".")[0]
        modules[path] = modules.get(path, 0) + squares
    return {path: _ratio(squares) for path, squares in modules.items()}


@torch.no_grad()
def _sums(state: State, name: str | None) -> Tensor:
    """Collective: all ranks must call. Of squares, for each averaged tensor: of the difference, of the live weights."""
    state.refuse_while_swapped("distance()")
    name, group = state.started(name), state.group
    with all_or_none(group, "looking up the live weights"):
        state.arrange()
    shards = state.members.averaged
    device = comm_device(group, shards[0].tensor.device if shards else None)
    sums = torch.zeros(len(shards), 2, dtype=torch.float64)
    rows = {shard.name: row for row, shard in enumerate(shards)}
    for shard in _owned(shards, group):
        for pair in split((shard.tensor, state.average_of(name, shard)), CHUNK_ELEMENTS):
            sums[rows[shard.name]] += _squares(*pair)
    if size_of(group) > 1:
        sums = sums.to(device)
        dist.all_reduce(sums, group=group)
    return sums.cpu()


def _ratio(squares: Tensor) -> float:
    apart, size = squares.tolist()
    return sqrt(apart / size) if size else (float("inf") if apart else 0.0)


def _squares(live: Tensor, average: Tensor) -> Tensor:
    wide = torch.complex128 if live.is_complex() else torch.float64
    live, average = live.to(wide), average.to(live.device, wide)
    return torch.stack([(live - average).abs().square().sum(), live.abs().square().sum()]).cpu()


def _owned(shards: Sequence[Shard], group: dist.ProcessGroup | None) -> list[Shard]:
    """The shards that this rank counts: of equal regions on several ranks (replicas), the lowest rank's."""
    held: list[dict[str, Region]] = gather_objects(group, {s.name: s.region for s in shards})
    me = rank_in(group) if group is not None else 0
    counted = {item for table in held[:me] for item in table.items()}
    return [s for s in shards if (s.name, s.region) not in counted]
