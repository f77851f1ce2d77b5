"""Averages as something to write and to read.

Incoming    values being read: a store of their own, which becomes the averages' only when all of them are there
items_of    one ShardItem for each averaged shard: where its value is now, and where a value that is read goes
pieces_of   what a folder gets of this rank; `beside_of`: the same of what is not averaged, which a full state needs
describe    the manifest; `extra_of`: what modules add to it that is no parameter or buffer
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..averages.state import State
from ..errors import CheckpointError
from ..ranks import rank_in
from ..rules.schedule import schedule_settings
from ..shard import Box, Shard, patches
from ..version import __version__
from ..weights.members import Members
from .folder.claims import Piece, window
from .manifest import BESIDE_KEY, AverageRecord, Manifest, TensorRecord
from .plain import encode

if TYPE_CHECKING:
    from .dcp import ShardItem


class Incoming:
    """Values being read. Takes memory when the first byte arrives."""

    def __init__(self, state: State) -> None:
        self._members = state.members
        self.store = state.store.like()

    def arrange(self) -> None:
        """Make room, filled with the live weights."""
        if not self.store.arranged:
            self.store.arrange(self._members.averaged)

    def view(self, column: str, shard_name: str) -> Tensor:
        """Where one value goes."""
        self.arrange()
        return self.store.view(column, shard_name)


def items_of(
    column: str,
    members: Members,
    incoming: Incoming,
    *,
    present: Callable[[Shard], Tensor] | None,
    left_out: Collection[str] = (),
) -> dict[str, ShardItem]:
    """The items of one column: `present` tells where a value is now, and is `None` while there is none."""
    from .dcp import ShardItem  # with it comes torch.distributed.checkpoint, which takes a second to import

    group = members.layout.group
    items = {}
    for shard in members.averaged:
        if shard.name not in left_out:
            items[shard.name] = ShardItem(
                shard.shape,
                shard.region,
                incoming.store.dtype_in(column, shard),
                present(shard) if present is not None else None,
                lambda name=shard.name: incoming.view(column, name),  # type: ignore[misc]
                writes=_is_written_here(shard, group),
            )
    return items


def snapshot_items(state: State, incoming: Incoming) -> dict[str, dict[str, ShardItem]]:
    """The items of all snapshots that averages keep, by the average's name and age; those to come say so."""
    items = {}
    for name, ring in state.store.rings.items():
        kept = dict(enumerate(state.store.snapshots(name)))
        for age in range(ring.size):
            present = partial(_snapshot, state, kept[age]) if age in kept else None
            target = incoming.store.rings[name].column(age)
            items[f"{name}/{age}"] = items_of(target, state.members, incoming, present=present)
    return items


def _snapshot(state: State, column: str, shard: Shard) -> Tensor:
    return state.store.view(column, shard.name)


def pieces_of(state: State) -> Iterator[Piece]:
    """What this rank holds of every average that has started, where it lies now."""
    group = state.group
    for name, history in state.histories.items():
        for shard in state.members.averaged if history.n_averaged else ():
            if _is_written_here(shard, group):
                yield from _pieces(f"{name}.{shard.name}", shard, state.average_of(name, shard))
                for age, column in enumerate(state.store.snapshots(name)):
                    yield from _pieces(f"{name}/{age}.{shard.name}", shard, state.store.view(column, shard.name))


def rounded(manifest: Manifest, pieces: list[Piece], dtype: torch.dtype) -> tuple[Manifest, list[Piece]]:
    """The same in another dtype, in host memory; what is complex stays as it is."""
    name = str(dtype).removeprefix("torch.")
    tensors = {
        key: record if "complex" in record.dtype else replace(record, dtype=name)
        for key, record in manifest.tensors.items()
    }
    cast = [p if p.values.is_complex() else replace(p, values=p.values.detach().cpu().to(dtype)) for p in pieces]
    return replace(manifest, tensors=tensors), cast


def beside_of(members: Members) -> Iterator[Piece]:
    """What this rank holds of all else that a strict load needs: buffers and frozen parameters, under all names."""
    averaged = {shard.name for shard in members.averaged}
    rest = {s.name: s for s in members.all if s.name not in averaged and s.name not in members.keyless}
    rest |= {alias: rest[name] for alias, name in members.aliases.items() if name in rest}
    for name, shard in rest.items():
        if _is_written_here(shard, members.layout.group):
            yield from _pieces(f"{BESIDE_KEY}.{name}", shard, shard.target)


def _pieces(key: str, shard: Shard, values: Tensor) -> Iterator[Piece]:
    shape = tuple(shard.shape)
    for patch in patches(shard.region, shape):
        yield Piece(key, shape, patch.box, window(values, patch))


def _is_written_here(shard: Shard, group: dist.ProcessGroup | None) -> bool:
    """Buffers may differ between ranks that hold a model together, each with all of them: rank 0's are saved."""
    return group is None or not shard.is_buffer or shard.region != Box.whole(shard.shape) or rank_in(group) == 0


def describe(state: State) -> Manifest:
    """What is saved says this about itself."""
    members = state.members
    dtypes = {shard.name: str(state.store.dtype_of(shard)).removeprefix("torch.") for shard in members.averaged}
    empty = {
        shard.name: TensorRecord(shape=list(shard.shape), dtype=str(shard.dtype).removeprefix("torch."))
        for shard in members.all
        if 0 in shard.shape
    }
    averages = {}
    for name, rule in state.rules.items():
        history = state.histories[name]
        averages[name] = AverageRecord(
            rule=rule.settings(),
            n_averaged=history.n_averaged,
            updates=history.as_lists(),
            snapshots=len(state.store.snapshots(name)),
        )
    return Manifest(
        step=state.step,
        averages=averages,
        tensors={s.name: TensorRecord(shape=list(s.shape), dtype=dtypes[s.name]) for s in members.averaged},
        aliases={alias: name for alias, name in members.aliases.items() if name in dtypes or name in empty},
        empty=empty,
        schedule=schedule_settings(state.schedule),
        package=__version__,
        torch=str(torch.__version__),
    )


def extra_of(members: Members, *, strictly: bool) -> dict[str, Any]:
    """What `get_extra_state` of the model's modules gives, as a manifest keeps it.

    What is no plain value would run code when it is read back: it is left out with a warning, or, if a strict load
    was promised, raises `CheckpointError`.
    """
    kept = {}
    for key, value in members.extra_state().items():
        try:
            kept[key] = encode(value)
        except TypeError as error:
            what = (
                f"{key!r} holds {error}, which cannot be kept in a saved average: reading it back would run its class. "
                "Let get_extra_state return plain values, tensors, or bytes (torch.save into an io.BytesIO)"
            )
            if strictly:
                raise CheckpointError(f"{what}, or save without with_buffers") from None
            warnings.warn(f"{what}. It was left out", stacklevel=2)
    return kept


class CarriedError(dict[str, Any]):
    """In place of a part of the user's checkpoint, to DCP: raises `error` as soon as it is looked into.

    DCP asks all ranks for their parts, one by one, before the ranks meet, so that a rank that raises there leaves the
    others waiting. It looks into the parts where it gathers every rank's plan, or its error: then all ranks raise.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self._error = error

    def items(self) -> Any:
        raise self._error

    def __reduce__(self) -> Any:
        raise self._error
