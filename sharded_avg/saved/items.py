"""Averages as something to write and to read.

Incoming    values being read: a store of their own, which becomes the averages' only when all of them are there
items_of    one ShardItem for each averaged shard: where its value is now, and where a value that is read goes
buffers_of  the same for buffers that are not averaged, which a full state needs; they are only written
describe    the manifest
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
import torch.distributed as dist
from torch import Tensor

from ..averages.state import State
from ..ranks import rank_in
from ..rules.schedule import schedule_settings
from ..shard import Box, Shard
from ..version import __version__
from ..weights.members import Members
from .dcp import ShardItem
from .manifest import AverageRecord, Manifest, TensorRecord


class Incoming:
    """Values being read. Takes memory when the first byte arrives."""

    def __init__(self, state: State) -> None:
        self._members = state.members
        self.store = state.store.like()

    def arrange(self) -> None:
        """Make room, filled with the live weights."""
        if not self.store.arranged:
            self.store.arrange(self._members.averaged)

    def view(self, average: str, shard_name: str) -> Tensor:
        """Where one value goes."""
        self.arrange()
        return self.store.view(average, shard_name)


def items_of(
    average: str,
    members: Members,
    incoming: Incoming,
    *,
    present: Callable[[Shard], Tensor] | None,
    left_out: Collection[str] = (),
) -> dict[str, ShardItem]:
    """The items of one average; `present` tells where a value is now, and is `None` before the first update."""
    group = members.layout.group
    items = {}
    for shard in members.averaged:
        if shard.name not in left_out:
            items[shard.name] = ShardItem(
                shard.shape,
                shard.region,
                incoming.store.dtype_of(shard),
                present(shard) if present is not None else None,
                lambda name=shard.name: incoming.view(average, name),  # type: ignore[misc]
                writes=_is_written_here(shard, group),
            )
    return items


def buffers_of(members: Members) -> dict[str, ShardItem]:
    """One item for each name of each persistent buffer that is not averaged."""
    averaged = {shard.name for shard in members.averaged}
    items = {}
    for shard in members.all:
        if shard.is_buffer and shard.name not in averaged:
            live, written = shard.tensor, _is_written_here(shard, members.layout.group)
            items[shard.name] = ShardItem(shard.shape, shard.region, shard.dtype, live, live.detach, writes=written)
    return items | {alias: items[name] for alias, name in members.aliases.items() if name in items}


def _is_written_here(shard: Shard, group: dist.ProcessGroup | None) -> bool:
    """Buffers may differ between ranks that each hold all of them: what is saved is rank 0's."""
    return not shard.is_buffer or shard.region != Box.whole(shard.shape) or rank_in(group) == 0


def describe(state: State) -> Manifest:
    """What is saved says this about itself."""
    members = state.members
    dtypes = {shard.name: str(state.store.dtype_of(shard)).removeprefix("torch.") for shard in members.averaged}
    averages = {}
    for name, rule in state.rules.items():
        history = state.histories[name]
        averages[name] = AverageRecord(rule=rule.settings(), n_averaged=history.n_averaged, updates=history.as_lists())
    return Manifest(
        step=state.step,
        averages=averages,
        tensors={s.name: TensorRecord(shape=list(s.shape), dtype=dtypes[s.name]) for s in members.averaged},
        aliases={alias: name for alias, name in members.aliases.items() if name in dtypes},
        schedule=schedule_settings(state.schedule),
        package=__version__,
        torch=str(torch.__version__),
    )
