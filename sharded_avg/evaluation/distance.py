"""How far an average is from the live weights: one small reduction, nothing of the size of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..averages.state import State
from ..ranks import all_or_none, collective, comm_device, gather_objects, rank_in, size_of, traffic
from ..shard import Region, Shard
from ..tensors import split

Measured = TypeVar("Measured")

CHUNK_ELEMENTS = 1 << 20  # of each tensor at a time, in float64


@collective
def distance(state: State, name: str | None) -> float:
    """Collective: all ranks must call. ||live - average|| / ||live|| over all elements of all ranks, each once.

    0 if both are equal; infinite if only the live weights are zero. Computed in float64.
    """
    return _measured(state, name, lambda sums: _ratio(sums.sum(0)))


@collective
def distances(state: State, name: str | None) -> dict[str, float]:
    """Collective: all ranks must call. The same for each module that has averaged parameters of its own, by path."""

    def by_module(sums: Tensor) -> dict[str, float]:
        modules: dict[str, Tensor] = {}
        for shard, squares in zip(state.members.averaged, sums, strict=True):
            path = shard.name.rpartition(".")[0]
            modules[path] = modules.get(path, 0) + squares
        return {path: _ratio(squares) for path, squares in modules.items()}

    return _measured(state, name, by_module)


@torch.no_grad()
def _measured(state: State, name: str | None, reckon: Callable[[Tensor], Measured]) -> Measured:
    """Collective: all ranks must call. What `reckon` makes of sums of squares, (averaged tensors, 2).

    Of the difference, and of the live weights.
    """
    group, doing = state.group, "measuring the distance of average and live weights"
    with all_or_none(group, doing) as part:
        part.asked = state.asks(f"distance({name!r})")
        state.refuse_while_swapped("distance()")
        name = state.started(name)
        state.arrange()
        shards = state.members.averaged
    held: list[dict[str, Region]] = gather_objects(group, {shard.name: shard.region for shard in shards}, doing)
    with all_or_none(group, doing):
        sums = torch.zeros(len(shards), 2, dtype=torch.float64)
        rows = {shard.name: row for row, shard in enumerate(shards)}
        for shard in _owned(shards, held, group):
            for pair in split((shard.tensor, state.average_of(name, shard)), CHUNK_ELEMENTS):
                sums[rows[shard.name]] += _squares(*pair)
        sent = sums.to(comm_device(group, shards[0].tensor.device if shards else None))
    if size_of(group) > 1:
        with traffic(group, doing) as messages:
            messages.all_reduce(lambda: sent)
    with all_or_none(group, doing):
        measured = reckon(sent.cpu())
    return measured


def _ratio(squares: Tensor) -> float:
    apart, size = squares.tolist()
    return sqrt(apart / size) if size else (float("inf") if apart else 0.0)


def _squares(live: Tensor, average: Tensor) -> Tensor:
    wide = torch.complex128 if live.is_complex() else torch.float64
    live, average = live.to(wide), average.to(live.device, wide)
    return torch.stack([(live - average).abs().square().sum(), live.abs().square().sum()]).cpu()


def _owned(shards: Sequence[Shard], held: list[dict[str, Region]], group: dist.ProcessGroup | None) -> list[Shard]:
    """The shards that this rank counts: of equal regions on several ranks (replicas), the lowest rank's."""
    me = rank_in(group) if group is not None else 0
    counted = {item for table in held[:me] for item in table.items()}
    return [s for s in shards if (s.name, s.region) not in counted]
