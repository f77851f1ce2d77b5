"""Full tensors into the live shards of a model, however it is cut."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..ranks import all_or_none
from ..shard import take
from .aside import live_tensors
from .layouts.detect import detect
from .layouts.replicas import equal_replicas


@torch.no_grad()
def write_live(model: nn.Module, full: Mapping[str, Tensor]) -> list[str]:
    """Collective: all ranks must call. Each rank copies its own pieces; returns the names that `full` lacks.

    Names are those of the unwrapped model's `state_dict()`; masters are written too. What `full` lacks stays.
    """
    layout = detect(model)
    with equal_replicas(layout, "writing full tensors into the live model", but=full):
        layout.release()
        shards = layout.shards()
    missing = []
    with all_or_none(layout.group, "writing full tensors into the live model"):
        for shard in shards:
            if shard.name not in full:
                missing.append(shard.name)
                continue
            for live in live_tensors(shard):
                live.copy_(take(full[shard.name], shard.region))
    layout.publish()
    layout.publish_masters()
    return missing
