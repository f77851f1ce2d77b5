"""Full averaged tensors while a `with` block lasts, and edits of them put back; or all that is kept, for a file.

What is summoned is a copy, under the unwrapped model's own keys: averages where averaged, live values elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..averages.state import State
from ..errors import ConfigError
from ..ranks import agree, all_or_none, collective, interruptible, rank_in, uninterrupted
from ..shard import Shard
from .gather import Item, gather, scatter


@contextmanager
def summoned(
    state: State, name: str | None, *, offload_to_cpu: bool, rank0_only: bool, writeback: bool
) -> Iterator[dict[str, Any]]:
    """Collective: all ranks must call. See `ShardedAverage.summon_full_params`."""
    group = state.group
    if group is None and writeback:
        rank0_only = False  # nothing connects the processes of a plain model: each edits its own average
    keeps = not rank0_only or rank_in(group) == 0
    with uninterrupted():
        with torch.no_grad():
            with all_or_none(group, "looking up full tensors") as part:
                part.asked = state.asks(f"summon_full_params({name!r}, {rank0_only=}, {writeback=})")
                if writeback:
                    state.refuse_while_swapped("summon_full_params(writeback=True)")
                averaged, items = _items(state, state.started(name))
            device = torch.device("cpu") if offload_to_cpu else None
            full = gather(group, items, rank0_only=rank0_only, device=device)
        with all_or_none(group, "naming full tensors"):
            tensors = state.members.state(full) if keeps else {}
            copies = [item.name for item in averaged if keeps and tensors.get(item.name) is not full[item.name]]
            if writeback and copies:
                raise ConfigError(
                    f"writeback=True: state_dict() of this model leaves out {copies}, or makes them anew, so that "
                    "edits could not be put back into the average"
                )
        del full
        error: BaseException | None = None
        try:
            with interruptible():
                yield tensors
        except BaseException as failure:
            error = failure
            raise
        finally:
            if writeback:
                try:
                    error = error or (_misfit(tensors, averaged) if keeps else None)
                except BaseException as failure:  # whatever a tensor's class raises when it is asked what it is
                    error = failure
                agree(group, error, "editing the full averages", left="None were written back")
                with torch.no_grad():
                    scatter(group, averaged, tensors, rank0_only=rank0_only)


@collective
@torch.no_grad()
def gather_full(state: State, names: Collection[str] | None) -> dict[str, dict[str, Tensor]]:
    """Collective: all ranks must call. See `ShardedAverage.gather_full`."""
    with all_or_none(state.group, "looking up full tensors") as part:
        part.asked = state.asks(f"gather_full({names and sorted(names)})")
        state.look()
        chosen = list(state.rules) if names is None else [state.resolve(name) for name in names]
        columns = {name: name for name in chosen if state.histories[name].n_averaged}
        for name in list(columns):
            columns |= {f"{name}/{age}": column for age, column in enumerate(state.store.snapshots(name))}
        items = [
            Item(f"{key}.{shard.name}", shard.shape, shard.region, values, "averaged")
            for key, column in columns.items()
            for shard in state.members.averaged
            for values in [state.average_of(key, shard) if key == column else state.store.view(column, shard.name)]
        ]
    found: dict[str, dict[str, Tensor]] = {}
    for path, value in gather(state.group, items, rank0_only=True, device=torch.device("cpu")).items():
        key, _, name = path.partition(".")
        found.setdefault(key, {})[name] = value
    return found


def _items(state: State, name: str) -> tuple[list[Item], list[Item]]:
    """This rank's pieces of the averages, and of all that a full state consists of. Local."""
    state.look(live=True)
    members = state.members
    members.layout.release()
    averaged = [_item(shard, state.average_of(name, shard), "averaged") for shard in members.averaged]
    known = {item.name for item in averaged}
    live = [_item(shard, shard.tensor, "live") for shard in members.all if shard.name not in known]
    return averaged, [*averaged, *live]


def _item(shard: Shard, values: Tensor, kind: str) -> Item:
    return Item(shard.name, shard.shape, shard.region, values, kind)


def _misfit(tensors: Mapping[str, Any], averaged: list[Item]) -> ConfigError | None:
    """What is wrong with edited full tensors, if anything."""
    for item in averaged:
        edited = tensors.get(item.name)
        if not isinstance(edited, Tensor) or edited.shape != item.shape:
            found = f"one of shape {tuple(edited.shape)}" if isinstance(edited, Tensor) else type(edited).__name__
            return ConfigError(
                f"writeback of {item.name!r}: expected a tensor of shape {tuple(item.shape)}, got {found}"
            )
        if edited.is_meta or edited.layout != torch.strided or edited.is_complex() > item.values.is_complex():
            kind = "without values" if edited.is_meta else f"of {edited.layout} and {edited.dtype}"
            return ConfigError(
                f"writeback of {item.name!r}: expected a strided tensor whose values {item.values.dtype} can hold, got "
                f"one {kind}. Edit it in place, or put a dense tensor with values there"
            )
    return None
