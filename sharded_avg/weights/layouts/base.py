"""Who cut the model, and how: the whole surface that an engine has to provide.

A layout turns one engine's parameters into Shards and knows three things about them that a Shard cannot know: how to
make the engine forget stale full copies (`release`), how to spread values that one rank wrote into replicated copies
(`publish`), and whether the engine skipped its last step. Rules, stores, swaps, gathering and checkpoints are written
once, on Shards. `replicated.py` is the template for a new layout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ...shard import Shard
from .. import names

STALE = (
    "Replicated weights of this rank may hold values that only some ranks have: call republish() on all ranks, or "
    "restart from a checkpoint"
)


class AbstractLayout(ABC):
    """One engine's cut of one model. Methods are local unless their first line says "Collective".

    Contract of `shards()`:
    - every parameter and persistent buffer has exactly one Shard on every rank, possibly with zero elements;
    - over the ranks of `group` the regions of one name cover the full tensor; ranks that replicate a piece report
      equal regions; padding added by the engine is in no region;
    - shards that lie together in memory follow each other in memory order;
    - names are clean, and tied tensors appear once, under their first name in `state_dict()` order.
    """

    model: nn.Module  # the user's own, unwrapped where wrappers hide its names
    group: dist.ProcessGroup | None = None  # the ranks that hold the model together; None: each process holds all of it
    aliases: Mapping[str, str]  # second and further names of tied tensors -> their Shard's name; set by `shards()`
    publishes = False  # whether `publish` communicates
    replica_set = (0, 1)  # among which of how many sets of ranks of `group` this one's replicas are equal
    knows_steps = False  # whether `step_was_skipped` knows every step
    has_stale_replicas = False  # a swap ended without the other ranks: their parts of this rank's copy are averages

    @abstractmethod
    def __init__(self, model: nn.Module) -> None:
        """Raises `UnsupportedModelError` for what cannot be averaged. Local, but for a group that must be made."""

    @classmethod
    @abstractmethod
    def claims(cls, model: nn.Module) -> bool:
        """Whether this layout recognises `model`; must not import the engine to find out."""

    @classmethod
    def waits_in_forward(cls, model: nn.Module) -> bool:
        """Whether ranks wait for each other in a forward of `model`, which `claims` has recognised."""
        return True

    @abstractmethod
    def shards(self) -> list[Shard]:
        """This rank's live pieces; call `release()` first. Raises `UnsupportedModelError` for what it cannot cut."""

    @abstractmethod
    def is_current(self) -> bool:
        """Whether the tensors of the last `shards()` are still the live ones, and as trainable as they were.

        Called at every update: keep it cheap.
        """

    def adopt(self, averaged: Iterable[str]) -> None:
        """Learn which parameters are averaged from now on, in the same order on every rank; later calls add more.

        Only a layout that divides replicated parameters among the ranks needs this, to cut them evenly.
        """

    def release(self) -> None:
        """Drop unsharded copies that a forward left behind, so that the next forward reads the shards."""

    def publish(self) -> None:
        """Collective: all ranks must call. Spread what ranks wrote into their `Shard.target` to every replica.

        A layout in which this communicates sets `publishes`.
        """

    def replicas(self) -> list[tuple[str, Tensor]]:
        """What `publish` and `publish_masters` overwrite with other ranks' values, by name, on all ranks in one order.

        It must be equal on all ranks beforehand, and is compared (`replicas.py`) before anything is published.
        """
        return []

    def publish_masters(self) -> None:
        """Collective: all ranks must call. Spread what ranks wrote into masters, where several ranks keep the same."""

    def guarded(self) -> AbstractContextManager[None]:
        """Inside, averages are in the model, and the engine refuses what would go wrong with them. Local."""
        return nullcontext()

    def step_was_skipped(self) -> bool:
        """Whether the engine has changed no weights since `count_step` (overflow, or inside gradient accumulation)."""
        return False

    def count_step(self) -> None:
        """The last step has been taken in: it does not count a second time. Only for engines that know their steps."""

    def state_keys(self) -> list[str]:
        """Keys of the unwrapped model's `state_dict()` that hold tensors, tied names included, in its order."""
        return [entry.name for entry in names.entries(self.model)]

    def extra_state(self) -> dict[str, Any]:
        """The non-tensor part of the unwrapped model's `state_dict()`."""
        return names.extra_state(self.model)


def addresses(tensors: Iterable[Tensor]) -> list[int]:
    """Where tensors lie; `param.data = other` and `module.to()` change it and keep the tensor."""
    return list(map(Tensor.data_ptr, tensors))


def trainable(tensors: Iterable[Tensor]) -> list[bool]:
    """Which tensors require grad."""
    return list(map(attrgetter("requires_grad"), tensors))
