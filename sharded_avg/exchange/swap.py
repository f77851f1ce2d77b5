"""The exchange of live and averaged values on all ranks, always undone. What each rank does of it: `ways.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..averages.state import State, swapped_models
from ..errors import PeerError, SwapError, add_note
from ..ranks import agree, all_or_none, bounds, interruptible, rendezvous, uninterrupted
from ..shard import Shard
from ..weights import names
from ..weights.layouts.base import STALE
from ..weights.layouts.replicas import equal_replicas
from .versions import Versions
from .ways import Exchange, Pair


class _Within(NamedTuple):
    """What leaving a swap needs to know of entering it."""

    exchange: Exchange
    versions: Versions
    shards: list[Shard]  # all that were live
    averaged: list[Shard]

    def give_back(self) -> None:
        """The raw weights, whether or not the average is there. Local."""
        self.exchange.leave()
        self.versions.leave()


@contextmanager
def swapped(state: State, name: str | None) -> Iterator[bool]:
    """Collective: all ranks must call. See `ShardedAverage.swapped`."""
    with uninterrupted():
        name, within = _entered(state, name)
        if within is None:
            with interruptible():
                yield False
            return
        layout, error = state.layout, None
        state.swapped, state.lent = name, within.exchange.lent
        swapped_models.add(layout.model)
        try:
            with interruptible(), layout.guarded():
                yield True
        except BaseException as failure:
            error = failure
            raise
        finally:
            state.swapped, state.lent = None, {}
            swapped_models.discard(layout.model)
            _leave(state, name, within, error)


@torch.inference_mode(False)  # scratch that is made under inference mode could not be written after it
@torch.no_grad()
def _entered(state: State, name: str | None) -> tuple[str, _Within | None]:
    """Collective: all ranks must call. Exchange on every rank, or on none; nothing, if there is no average yet.

    Where nothing is published, ranks meet once. If one has failed by then, the others give back what they have.
    """
    layout, within, doing = state.layout, None, "swapping the average in"
    try:
        with equal_replicas(layout, doing) as part:
            part.asked = state.asks(f"swapped({name!r})")
            state.refuse_while_swapped("swapped()")
            name = state.resolve(name)
            if state.histories[name].n_averaged:
                layout.release()
                state.arrange()
                with names.collector_paused():
                    exchange, versions = Exchange(_pairs(state, name)), Versions(layout.model)
                within = _Within(exchange, versions, state.members.all, state.members.averaged)
                if not layout.publishes:
                    exchange.enter()
                    versions.enter()
    except BaseException as error:
        if within is not None and not layout.publishes:
            try:
                within.give_back()
            except BaseException as failure:
                _note(error, failure)
        raise
    if within is not None and layout.publishes:
        _publish_averages(state, within, doing)
    return name, within


def _publish_averages(state: State, within: _Within, doing: str) -> None:
    """Collective: all ranks must call. Each rank's part of the average, in the replicas of all."""
    layout = state.layout
    try:
        with all_or_none(state.group, doing):
            within.exchange.enter()
        layout.has_stale_replicas = True
        layout.publish()
        with all_or_none(state.group, doing):
            within.versions.enter()
        layout.has_stale_replicas = False
    except BaseException as error:  # which all ranks know of
        try:
            with all_or_none(state.group, "bringing raw weights back", left="Its own are back", to_its_end=True):
                within.give_back()
            if layout.has_stale_replicas:
                layout.publish()
                layout.has_stale_replicas = False
        except BaseException as failure:
            _note(error, failure)
        raise


def _note(error: BaseException, failure: BaseException) -> None:
    add_note(error, f"bringing the raw weights back failed, too: {failure!r}")


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


@torch.inference_mode(False)
@torch.no_grad()
def _leave(state: State, name: str, within: _Within, error: BaseException | None) -> None:
    """Collective: all ranks must call. Raw weights on all ranks; raises, if the block did not, what became of them.

    A rank with an `error` of the block waits for the others only where it needs them, and not for long.
    """
    failure: BaseException | None = None
    try:
        damage = _left(state, name, within)
        if damage and error is None:
            failure = SwapError(damage)
        elif damage and error is not None:
            add_note(error, damage)
    except BaseException as caught:
        failure = caught
    try:
        came = _republish(state, error or failure)
    except BaseException as lost:
        if error is None:
            raise
        add_note(error, f"spreading the raw weights over the replicas failed, too: {lost!r}")
        return
    finally:
        within.versions.leave()
    if came:
        _agree_on_leaving(state, error, failure)
    elif failure is not None:
        raise failure
    elif error is None:
        raise PeerError(
            f"another rank left the swap with an error more than {bounds.LEAVING_GRACE_S:.0f} s before this one, and "
            f"is gone; the cause is in the traceback of that rank. {STALE}"
        )
    else:
        add_note(error, f"other ranks did not leave the swap within {bounds.LEAVING_GRACE_S:.0f} s. {STALE}")


def _agree_on_leaving(state: State, error: BaseException | None, failure: BaseException | None) -> None:
    """Collective: all ranks must call. A rank whose block, or whose leaving, failed tells the others why."""
    try:
        agree(
            state.group,
            error or failure,
            "inside `with average.swapped():`, or leaving it",
            left="The raw weights are back on this rank",
        )
    except BaseException as told:
        if told is not error:
            raise
    if error is not None and failure is not None:
        add_note(error, f"leaving the swap failed, too: {failure!r}")


def _republish(state: State, error: BaseException | None) -> bool:
    """Spread the raw weights to every replica; False if peers did not come, and this rank gave up waiting."""
    layout = state.layout
    if not layout.publishes:
        return True
    layout.has_stale_replicas = True
    if not rendezvous(layout.group, grace_s=bounds.PATIENCE_S if error is None else bounds.LEAVING_GRACE_S):
        return False
    try:
        layout.publish()
    except BaseException as failure:  # which all ranks know of: all try once more
        layout.publish()
        layout.has_stale_replicas = False
        if not isinstance(failure, PeerError):
            raise
        raise PeerError(
            "another rank failed while the raw weights were spread over the replicas. They are back now, on all ranks: "
            "a second try has succeeded. The cause is in the traceback of that rank"
        ) from failure
    layout.has_stale_replicas = False
    return True
