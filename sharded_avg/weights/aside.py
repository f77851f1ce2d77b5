"""Raw weights kept aside, in host memory, while a model holds its average for good.

A swap is for a block of code; this is for the end of training, after which anything may happen to the model: it is
saved, moved, given other weights, or trained on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..shard import Shard

_ATTEMPTS = 3  # at bringing raw weights back


@dataclass(slots=True, eq=False)
class RawWeights:
    """This rank's pieces of the raw weights, by name: what forward read, and the master where there is one.

    `are_replaced` from when averages begin to go into the model until these are back: whoever catches an exception,
    which may have come when all was done, sees whether they are needed still.
    """

    average: str
    values: dict[str, list[Tensor]]
    are_replaced: bool = False


def set_aside(average: str, shards: Iterable[Shard]) -> RawWeights:
    """Copies of what these shards hold."""
    values = {}
    for shard in shards:
        values[shard.name] = [live.detach().to("cpu", copy=True) for live in live_tensors(shard)]
    return RawWeights(average, values)


def bring_back(raw: RawWeights, shards: Iterable[Shard]) -> None:
    """Put the raw weights into shards that are cut as they were; shards that were not averaged then stay.

    An interruption (Ctrl-C) is raised when all of them are back.
    """
    failure: BaseException | None = None
    # Not strict: an engine that only evaluates has no masters, and its shards take the first value, cast.
    todo = [pair for shard in shards for pair in zip(live_tensors(shard), raw.values.get(shard.name, []), strict=False)]
    for _ in range(_ATTEMPTS):
        try:
            for live, value in todo:
                live.copy_(value)
            raw.are_replaced = False
            break
        except BaseException as error:
            failure = failure or error
    if failure is not None:
        raise failure


def holds_either(shard: Shard, average: Tensor, raw: RawWeights) -> bool:
    """Whether a live parameter is still the average, or the raw one, bit for bit; a buffer may be anything."""
    if shard.is_buffer:
        return True
    target, values = shard.target.detach(), raw.values[shard.name]
    # The last value is of what forward reads; the first, of a master, where an engine without masters reads the shard.
    for value in (average, values[-1], values[0]):
        expected = value.detach().to(target)
        # As bytes, too: a NaN is no other value than itself, and one in the average must not cost the raw weights.
        if torch.equal(target, expected) or torch.equal(
            target.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)
        ):
            return True
    return False


def live_tensors(shard: Shard) -> list[Tensor]:
    """The tensor that is averaged, and the one that forward reads where that is another."""
    return [shard.tensor] if shard.working is None else [shard.tensor, shard.working]
