"""The average as the model's own weights, for good, and the way back.

A swap is for a block of code; a handover is for the end of training. `raw_weights` keeps what it replaces, in host
memory, `copy_to_model` replaces it, and `restore_raw` undoes that if nobody has given the model other weights since.
In the course of training `copy_to_model` is a part of the method (Lookahead, Switch EMA): then it has a schedule, and
perhaps a factor.
"""

from __future__ import annotations

import torch

from ..averages.state import State
from ..errors import ConfigError, add_note
from ..ranks import all_or_none, attempted, collective, gather_objects
from ..rules.numbers import number
from ..rules.schedule import WhenFn
from ..weights.aside import RawWeights, bring_back, holds_either, live_tensors, set_aside
from ..weights.layouts.replicas import differing_replicas, equal_replicas


@collective
@torch.no_grad()
def raw_weights(state: State, name: str | None) -> RawWeights:
    """Collective: all ranks must call. See `ShardedAverage.raw_weights`."""
    with all_or_none(state.group, "copying raw weights to host memory") as part:
        part.asked = state.asks(f"raw_weights({name!r})")
        state.refuse_while_swapped("raw_weights()")
        name = state.started(name)
        state.arrange()
        raw = set_aside(name, state.members.averaged)
    return raw


@collective
@torch.no_grad()
def copy_to_model(
    state: State, name: str | None, undo: RawWeights | None, factor: float, schedule: WhenFn | None
) -> bool:
    """Collective: all ranks must call. See `ShardedAverage.copy_to_model`."""
    # Decided alike on all ranks, which have seen the same steps; equal_replicas compares that. A step that was skipped
    # leaves the count where it was: once is enough.
    undecided = None
    if schedule is not None:
        is_due, undecided = attempted(
            lambda: state.written_back.get(state.resolve(name)) != state.step and bool(schedule(state.step))
        )
        if undecided is None and not is_due:
            return False
    doing = "copying averages into the model"
    with equal_replicas(state.layout, doing) as part:
        if undecided is not None:
            raise undecided
        if undo is not None and not isinstance(undo, RawWeights):
            raise ConfigError(f"undo={undo!r}: must be what raw_weights() returned, or None")
        part.asked = state.asks(f"copy_to_model({name!r}, {factor=}{', undo=...' if undo is not None else ''})")
        number("copy_to_model(factor", factor, above=0, most=1, for_example=0.5)
        state.refuse_while_swapped("copy_to_model()")
        name = state.started(name)
        state.arrange()
        state.layout.release()
    left = "This rank's raw weights are back" if undo is not None else _PARTLY
    try:
        with all_or_none(state.group, doing, left=left):
            if undo is not None:
                undo.are_replaced = True
            for shard in state.members.averaged:
                average = state.store.view(name, shard.name)
                if factor != 1:
                    average = shard.tensor.to(average).lerp(average, factor)  # from the master, if there is one
                for live in live_tensors(shard):
                    live.copy_(average)
        publish_all(state)
        # Ctrl-C that came meanwhile is raised in here, where it can be undone: whoever passed `undo` relies on that.
        with all_or_none(state.group, doing, left=left):
            state.written_back[name] = state.step
        return True
    except BaseException as error:
        state.written_back.pop(name, None)
        if undo is None:
            add_note(error, _PARTLY)
        else:
            _undo(state, undo)
        raise


_PARTLY = "The model may hold the average in part. Pass undo=average.raw_weights() to have raw weights back then"


def _undo(state: State, undo: RawWeights) -> None:
    """Collective: all ranks must call. After a failure that all ranks know of."""
    with all_or_none(state.group, "bringing raw weights back", left="Its own are back", to_its_end=True):
        bring_back(undo, state.members.averaged)
    publish_all(state)


@collective
@torch.no_grad()
def restore_raw(state: State, raw: RawWeights) -> bool:
    """Collective: all ranks must call. See `ShardedAverage.restore_raw`."""
    with all_or_none(state.group, "comparing live weights with averages") as part:
        if not isinstance(raw, RawWeights):
            raise ConfigError(f"raw={raw!r}: must be what raw_weights() returned")
        if not raw.values:
            raise ConfigError(
                "raw holds no weights: it is not what raw_weights() returned any more. Nothing was changed"
            )
        part.asked = state.asks(f"restore_raw() of {len(raw.values)} tensors")
        state.refuse_while_swapped("restore_raw()")
        state.arrange()
        state.layout.release()
        known = [shard for shard in state.members.averaged if shard.name in raw.values]
        unchanged = all(holds_either(shard, state.average_of(raw.average, shard), raw) for shard in known)
    if not all(gather_objects(state.group, unchanged)) or differing_replicas(state.layout):
        return False
    with all_or_none(state.group, "bringing raw weights back", left="Call restore_raw() again, on all ranks"):
        bring_back(raw, known)
    publish_all(state)
    return True


def publish_all(state: State) -> None:
    """Collective: all ranks must call. Spread what ranks wrote into weights and masters to every replica."""
    state.layout.publish()
    state.layout.publish_masters()


@collective
@torch.inference_mode(False)
@torch.no_grad()
def republish(state: State) -> None:
    """Collective: all ranks must call. See `ShardedAverage.republish`."""
    layout = state.layout
    if layout.publishes and any(gather_objects(layout.group, layout.has_stale_replicas)):
        layout.publish()
        layout.has_stale_replicas = False
