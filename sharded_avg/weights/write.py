"""Full tensors into the live shards of a model, however it is cut."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..ranks import all_or_none, collective, everyone
from ..shard import take
from .aside import live_tensors
from .layouts.base import AbstractLayout
from .layouts.detect import detect
from .layouts.replicas import equal_replicas
from .state_dicts import find_keys, is_rewritten


@collective
@torch.no_grad()
def write_live(model: nn.Module, full: Mapping[str, Tensor]) -> list[str]:
    """Collective: all ranks must call. Each rank copies its own pieces; returns the names that `full` lacks.

    Names are those of the unwrapped model's `state_dict()`; masters are written too. What `full` lacks stays.
    All ranks of the job, whichever hold the model together.
    """
    doing = "writing full tensors into the live model"
    with all_or_none(everyone(None), doing):  # which ranks hold the model is known afterwards only
        layout = detect(model)
    with all_or_none(layout.group, doing):
        full = _under_own_names(layout, full)
        layout.release()
        shards = layout.shards()
    with equal_replicas(layout, doing, but=full):
        pass
    missing = []
    with all_or_none(layout.group, doing, left="The model may hold a part of them"):
        for shard in shards:
            if shard.name not in full:
                missing.append(shard.name)
                continue
            for live in live_tensors(shard):
                live.copy_(take(full[shard.name], shard.region))
    layout.publish()
    layout.publish_masters()
    return missing


def _under_own_names(layout: AbstractLayout, full: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Where hooks of the model rename keys of `state_dict()`: the same tensors under the model's own names. Local."""
    if not is_rewritten(layout.model):
        return full
    layout.release()
    shards = layout.shards()
    try:
        first = find_keys(layout.model, shards, layout.aliases, layout.state_keys(), {}).first
    except Exception:  # a hook that wants values: the names are what they are
        return full
    return {shard.name: full[key] for shard in shards if (key := first.get(shard.name, shard.name)) in full}
