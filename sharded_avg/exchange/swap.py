"""The exchange of live and averaged values on all ranks, always undone. What each rank does of it: `ways.py`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import ranks
from ..averages.state import State, swapped_models
from ..errors import PeerError, SwapError
from ..ranks import all_or_none, patience_s, rendezvous
from ..shard import Shard
from ..weights import names
from ..weights.layouts.replicas import equal_replicas
from .versions import Versions
from .ways import Exchange, Pair


class _Within(NamedTuple):
    """What leaving a swap needs to know of entering it."""

    exchange: Exchange
    versions: Versions
    shards: list[Shard]  # all that were live
    averaged: list[Shard]


@contextmanager
def swapped(state: State, name: str | None) -> Iterator[bool]:
    """Collective: all ranks must call. See `ShardedAverage.swapped`."""
    state.refuse_while_swapped("swapped()")
    name = state.resolve(name)
    if not state.histories[name].n_averaged:
        yield False
        return
    layout = state.layout
    within = _entered(state, name)
    error: BaseException | None = None
    try:
        with torch.inference_mode(False), torch.no_grad():
            layout.publish()
        within.versions.enter()
        state.swapped, state.lent = name, within.exchange.lent
        swapped_models.add(layout.model)
        try:
            with layout.guarded():
                yield True
        finally:
            state.swapped, state.lent = None, {}
            swapped_models.discard(layout.model)
    except BaseException as failure:
        error = failure
        raise
    finally:
        damage = ""
        try:
            damage = _left(state, name, within)
        finally:
            _republish(state, error)
        within.versions.leave()
        if damage:
            _tell(damage, error)


@torch.inference_mode(False)  # scratch that is made under inference mode could not be written after it
@torch.no_grad()
def _entered(state: State, name: str) -> _Within:
    """Collective: all ranks must call. Exchange locally on every rank, or on none."""
    with equal_replicas(state.layout, "swapping the average in"):
        state.layout.release()
        state.arrange()
        with names.collector_paused():
            exchange = Exchange(_pairs(state, name))
        versions = Versions(state.layout.model)
    try:
        with all_or_none(state.group, "swapping the average in"):
            exchange.enter()
    except BaseException:
        exchange.leave()
        versions.leave()
        raise
    return _Within(exchange, versions, state.members.all, state.members.averaged)


def _pairs(state: State, name: str) -> list[Pair]:
    """What the averaged shards exchange."""
    members, view, rewritten = state.members, state.store.view, set[str]()
    embeddings = (nn.Embedding, nn.EmbeddingBag)
    # A forward of these writes to its own weights, also without grad, so that an average in them would be lost.
    if any(isinstance(module, embeddings) and module.max_norm is not None for module in state.layout.model.modules()):
        for prefix, module in names.walk(state.layout.model):
            if isinstance(module, embeddings) and module.max_norm is not None:
                rewritten.add(members.key_of(f"{prefix}weight"))
    pairs = []
    for shard in members.averaged:
        target, working = shard.tensor, shard.working
        master = None if working is None else target
        volatile = shard.is_buffer or shard.name in rewritten
        pairs.append(
            Pair(shard.name, working if working is not None else target, view(name, shard.name), master, volatile)
        )
    return pairs


@torch.inference_mode(False)
@torch.no_grad()
def _left(state: State, name: str, within: _Within) -> str:
    """Bring the raw weights back, and say what the block has done to the averages; "" if nothing."""
    exchange, written, moved = within.exchange, within.versions.written(), set[str]()
    try:
        state.layout.release()
        state.members.refresh()
    finally:
        try:
            exchange.leave()
        finally:
            if state.members.all is not within.shards:
                cuts = {shard.name: shard.region for shard in within.averaged}
                live = [shard for shard in state.members.all if cuts.get(shard.name) == shard.region]
                moved = exchange.follow({s.name: (s.target, None if s.working is None else s.tensor) for s in live})
    return _damage(state, name, exchange, written, moved)


def _damage(state: State, name: str, exchange: Exchange, written: Sequence[Tensor], moved: set[str]) -> str:
    """What was written to inside the block, and what has become of it; "" if nothing."""
    lost = set(exchange.written())
    if not lost and not written:
        return ""
    ids, key_of = set(map(id, written)), state.members.key_of
    touched = {key_of(e.name) for e in names.entries(state.layout.model) if id(e.tensor) in ids} - moved
    undone = [pair.name for pair in exchange.pairs if pair.name in touched - lost and not pair.volatile]
    averages = [pair.name for pair in exchange.pairs if pair.name in lost and pair.master is None]
    masters = [pair.name for pair in exchange.pairs if pair.name in lost - moved and pair.master is not None]
    parts = []
    if averages:
        sure = [shard for shard in averages if shard in touched]
        which = _list(sure) if sure else f"one or more of {_list(averages)}"
        parts.append(
            f"The average {name!r} lay in {which}, so it holds there what the block made of it. The raw weights are "
            "back. load() a saved average, or build a new one"
        )
    if masters:
        parts.append(
            f"The average {name!r} is what it was, but the engine stepped its fp32 masters of {_list(masters)} or of "
            "what lies beside them, and the raw weights are what it made of them"
        )
    if undone:
        parts.append(f"The average {name!r} and the raw weights of {_list(undone)} are what they were before")
    return (
        "weights were written to inside `with average.swapped():` (an optimizer step, load_state_dict, a quantisation "
        f"pass, ...). {'. '.join(parts)}. What edits averaged weights belongs on a copy: summon_full_params() gives one"
        if parts
        else ""
    )


def _list(found: Sequence[str]) -> str:
    return ", ".join(map(repr, found[:5])) + (f" and {len(found) - 5} more" if len(found) > 5 else "")


def _tell(damage: str, error: BaseException | None) -> None:
    """Raise, unless the block itself has raised; then its error says it, too."""
    if error is None:
        raise SwapError(damage)
    if hasattr(error, "add_note"):  # Python >= 3.11
        error.add_note(f"sharded_avg: {damage}")
    else:
        warnings.warn(damage, stacklevel=2)


@torch.inference_mode(False)
@torch.no_grad()
def _republish(state: State, error: BaseException | None) -> None:
    """Spread the raw weights to every replica; a rank whose peers do not come gives up instead of waiting for ever."""
    layout = state.layout
    if not layout.publishes:
        return
    layout.has_stale_replicas = True
    if rendezvous(layout.group, grace_s=patience_s(error)):
        layout.publish()
        layout.has_stale_replicas = False
        return
    grace_s = f"{ranks.RENDEZVOUS_GRACE_S:.0f} s"
    stale = "weights of this rank still hold averages outside its own part. Restart from a checkpoint"
    if error is None:
        raise PeerError(
            f"another rank left the swap with an error more than {grace_s} before this one, and is gone: the "
            f"replicated {stale}; the cause is in the traceback of that rank"
        )
    if hasattr(error, "add_note"):  # Python >= 3.11
        error.add_note(f"sharded_avg: other ranks did not leave the swap within {grace_s}, so the replicated {stale}.")
