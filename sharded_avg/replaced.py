"""Raw weights kept aside, in host memory, while a model holds its average for good.

A swap is for a block of code; this is for the end of training, after which anything may happen to the model: it is
saved, moved, given other weights, or trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .shard import Shard


@dataclass(frozen=True, slots=True, eq=False)
class RawWeights:
    """This rank's pieces of the raw weights, by name: what forward read, and the master where there is one."""

    average: str
    values: dict[str, list[Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of host memory on this rank."""
        return sum(value.nbytes for values in self.values.values() for value in values)


def set_aside(average: str, shards: Iterable[Shard]) -> RawWeights:
    """Copies of what these shards hold."""
    return RawWeights(average, {shard.name: [_host_copy(live) for live in live_tensors(shard)] for shard in shards})


def bring_back(raw: RawWeights, shards: Iterable[Shard]) -> None:
    """Put the raw weights into shards that are cut as they were; shards that were not averaged then stay."""
    for shard in shards:
        for live, value in zip(live_tensors(shard), raw.values.get(shard.name, []), strict=False):
            live.copy_(value)


def hold_average(shards: Iterable[Shard], average_of: Callable[[Shard], Tensor]) -> bool:
    """Whether the live parameters are still the average, bit for bit in their own dtype."""
    return all(torch.equal(shard.target, average_of(shard).to(shard.target)) for shard in shards if not shard.is_buffer)


def live_tensors(shard: Shard) -> list[Tensor]:
    """The tensor that is averaged, and the one that forward reads where that is another."""
    return [shard.tensor] if shard.working is None else [shard.tensor, shard.working]


def _host_copy(live: Tensor) -> Tensor:
    return live.detach().to("cpu", copy=True)
