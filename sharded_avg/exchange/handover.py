"""The average as the model's own weights, for good, and the way back.

A swap is for a block of code; a handover is for the end of training. `raw_weights` keeps what it replaces, in host
memory, `copy_to_model` replaces it, and `restore_raw` undoes that if nobody has given the model other weights since.
In the course of training `copy_to_model` is a part of the method (Lookahead, Switch EMA): then it has a schedule, and
perhaps a factor.
"""

from __future__ import annotations

import torch

from ..averages.state import State
from ..ranks import all_or_none, gather_objects
from ..rules.numbers import number
from ..rules.schedule import WhenFn
from ..weights.aside import RawWeights, bring_back, holds_either, live_tensors, set_aside
from ..weights.layouts.replicas import differing_replicas, equal_replicas


@torch.no_grad()
def raw_weights(state: State, name: str | None) -> RawWeights:
    """Collective: all ranks must call. See `ShardedAverage.raw_weights`."""
    state.refuse_while_swapped("raw_weights()")
    name = state.started(name)
    with all_or_none(state.group, "copying raw weights to host memory"):
        state.arrange()
        return set_aside(name, state.members.averaged)


@torch.no_grad()
def copy_to_model(
    state: State, name: str | None, undo: RawWeights | None, factor: float, schedule: WhenFn | None
) -> bool:
    """Collective: all ranks must call. See `ShardedAverage.copy_to_model`."""
    number("copy_to_model(factor", factor, above=0, most=1, for_example=0.5)
    state.refuse_while_swapped("copy_to_model()")
    name = state.resolve(name)
    # Steps are counted alike on all ranks. A step that was skipped leaves the count where it was: once is enough.
    if schedule is not None and (state.written_back.get(name) == state.step or not schedule(state.step)):
        return False
    state.started(name)
    with equal_replicas(state.layout, "copying averages into the model"):
        state.arrange()
        state.layout.release()
    try:
        with all_or_none(state.group, "copying averages into the model"):
            for shard in state.members.averaged:
                average = state.store.view(name, shard.name)
                if factor != 1:
                    average = shard.tensor.to(average).lerp(average, factor)  # from the master, if there is one
                for live in live_tensors(shard):
                    live.copy_(average)
        publish_all(state)
    except BaseException:
        if undo is not None:
            bring_back(undo, state.members.averaged)
        raise
    state.written_back[name] = state.step
    return True


@torch.no_grad()
def restore_raw(state: State, raw: RawWeights) -> bool:
    """Collective: all ranks must call. See `ShardedAverage.restore_raw`."""
    state.refuse_while_swapped("restore_raw()")
    with all_or_none(state.group, "comparing live weights with averages"):
        state.arrange()
        state.layout.release()
        known = [shard for shard in state.members.averaged if shard.name in raw.values]
        unchanged = all(holds_either(shard, state.average_of(raw.average, shard), raw) for shard in known)
    if not all(gather_objects(state.group, unchanged)) or differing_replicas(state.layout):
        return False
    with all_or_none(state.group, "bringing raw weights back"):
        bring_back(raw, known)
    publish_all(state)
    return True


def publish_all(state: State) -> None:
    """Collective: all ranks must call. Spread what ranks wrote into weights and masters to every replica."""
    state.layout.publish()
    state.layout.publish_masters()


@torch.inference_mode(False)
@torch.no_grad()
def republish(state: State) -> None:
    """Collective: all ranks must call. See `ShardedAverage.republish`."""
    layout = state.layout
    if layout.publishes and any(gather_objects(layout.group, layout.has_stale_replicas)):
        layout.publish()
        layout.has_stale_replicas = False
