"""Validation loss, the same to the bit on any number of ranks, also on none."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


@torch.no_grad()
def validation_loss(model: nn.Module, batches: list[Tensor]) -> float:
    """Mean loss over all batches, in nats per byte.

    Collective where there is a process group: the ranks share out the batches. Every rank calls `forward` equally
    often, since a sharded model gathers its weights in there. Each batch has its own place in the sum, so that the
    result does not depend on who computed which.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    losses = torch.zeros(len(batches), dtype=torch.float64)
    model.eval()
    for first in range(0, len(batches), world_size):
        mine = first + rank
        loss = model(batches[min(mine, len(batches) - 1)])
        if mine < len(batches):
            losses[mine] = loss.item()
    model.train()
    if dist.is_initialized():
        dist.all_reduce(losses)  # adds zeros, which is exact
    return losses.mean().item()
