"""The exchange of live and averaged values on all ranks, always undone. What each rank does of it: `ways.py`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .. import ranks
from ..averages.state import State, swapped_models
from ..errors import PeerError
from ..ranks import all_or_none, patience_s, rendezvous
from ..weights.layouts.replicas import equal_replicas
from .ways import Exchange


@contextmanager
def swapped(state: State, name: str | None) -> Iterator[bool]:
    """Collective: all ranks must call. See `ShardedAverage.swapped`."""
    state.refuse_while_swapped("swapped()")
    name = state.resolve(name)
    if not state.histories[name].n_averaged:
        yield False
        return
    layout = state.layout
    exchange = _entered(state, name)
    error: BaseException | None = None
    try:
        with torch.inference_mode(False), torch.no_grad():
            layout.publish()
        state.swapped = name
        swapped_models.add(layout.model)
        try:
            yield True
        finally:
            state.swapped = None
            swapped_models.discard(layout.model)
    except BaseException as failure:
        error = failure
        raise
    finally:
        try:
            _leave(state, name, exchange)
        finally:
            _republish(state, error)


@torch.inference_mode(False)  # scratch that is made under inference mode could not be written after it
@torch.no_grad()
def _entered(state: State, name: str) -> Exchange:
    """Collective: all ranks must call. Exchange locally on every rank, or on none."""
    with equal_replicas(state.layout, "swapping the average in"):
        state.layout.release()
        exchange = Exchange(state.pairs(name))
    try:
        with all_or_none(state.group, "swapping the average in"):
            exchange.enter()
    except BaseException:
        exchange.leave()
        raise
    return exchange


@torch.inference_mode(False)
@torch.no_grad()
def _leave(state: State, name: str, exchange: Exchange) -> None:
    """The engine may have moved the live tensors, with the averages in them, in its first forward."""
    try:
        state.layout.release()
        exchange.move_to(state.pairs(name))
    finally:
        exchange.leave()


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
