"""Which weights and averages are not equal on ranks that should hold the same, and on which ranks.

What should be equal: pieces of one tensor that lie in one region on several ranks (HSDP, a parameter that tensor
parallelism leaves whole), and what a layout keeps whole on every rank (DDP, ZeRO's weights). Nothing is written, and
nothing is sent but a checksum for each piece that another rank may hold.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch

from ..averages.state import State
from ..ranks import all_or_none, attempted, collective, gather_objects, size_of
from ..rules.schedule import WhenFn
from ..shard import Region
from ..weights.layouts.replicas import digest


class Differing(NamedTuple):
    """A piece of `name` that is not equal on all ranks that hold it. `what`: "weights", or an average's name.

    `ranks` of the group have other values than most; of two camps of one size, the one with the lowest rank counts as
    most.
    """

    what: str
    name: str
    ranks: tuple[int, ...]


_Key = tuple[str, str, Region | None]  # what, name, where; None: whole, on every rank


@collective
@torch.no_grad()
def check_replicas(state: State, schedule: WhenFn | None = None) -> list[Differing]:
    """Collective: all ranks must call. See `ShardedAverage.check_replicas`."""
    undecided = None
    if schedule is not None:
        is_due, undecided = attempted(lambda: bool(schedule(state.step)))
        if undecided is None and not is_due:
            return []
    num_ranks, group = size_of(state.group), state.group
    if num_ranks == 1:
        if undecided is not None:
            raise undecided
        state.refuse_while_swapped("check_replicas()")
        return []
    with all_or_none(group, "summing up weights and averages") as part:
        if undecided is not None:
            raise undecided
        part.asked = state.asks("check_replicas()")
        state.refuse_while_swapped("check_replicas()")
        state.arrange()
        sums: dict[_Key, int] = {
            ("weights", name, None): digest([tensor]) for name, tensor in state.layout.replicas() if tensor.numel()
        }
        begun = [name for name, history in state.histories.items() if history.n_averaged]
        for shard in state.members.averaged:
            if shard.is_buffer or shard.region.numel * num_ranks <= shard.shape.numel():  # nobody else can hold it
                continue
            sums["weights", shard.name, shard.region] = digest([shard.tensor])
            for name in begun:
                sums[name, shard.name, shard.region] = digest([state.average_of(name, shard)])
    held: dict[_Key, dict[int, int]] = {}
    for rank, theirs in enumerate(gather_objects(group, sums)):
        for key, value in theirs.items():
            held.setdefault(key, {})[rank] = value
    found = []
    for (what, name, _), values in held.items():
        (most, _), *others = Counter(values.values()).most_common()
        if others:
            found.append(Differing(what, name, tuple(rank for rank, value in values.items() if value != most)))
    return list(dict.fromkeys(found))
