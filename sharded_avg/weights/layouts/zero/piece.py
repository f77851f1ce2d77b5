"""What one stage of ZeRO has to tell the layout: Pieces, and how to make forward read what was written into them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ....shard import Box, Interval

EMPTY = Interval(0, 0)


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """What this rank owns of one parameter."""

    param: nn.Parameter
    shape: torch.Size
    region: Box | Interval
    tensor: Tensor  # fp32 master, or the parameter itself where there is none; 1-D for an Interval
    working: Tensor | None  # the same elements of what forward reads


class AbstractWeights(ABC):
    """How one stage holds the weights that it trains."""

    group: dist.ProcessGroup  # the ranks among which it divides them

    @abstractmethod
    def pieces(self) -> list[Piece]:
        """This rank's Piece of every parameter that is cut or has a master, in memory order, equal on all ranks."""

    @abstractmethod
    def buffers(self) -> list[Tensor]:
        """The engine's own tensors that the Pieces are views of."""

    @abstractmethod
    def alive(self) -> bool:
        """Whether the engine still steps these weights (`engine.destroy()` ends that)."""

    def release(self) -> None:  # noqa: B027 where weights are whole, forward reads them
        """Free gathered copies that forward would read instead of the Pieces."""

    @abstractmethod
    def publish(self) -> None:
        """Collective. Make what forward reads, on every rank, equal to what the owners wrote."""

    @abstractmethod
    def replicas(self) -> list[tuple[nn.Parameter, Tensor]]:
        """What publishing overwrites with other ranks' values, and of which parameter it is."""

    def publish_masters(self) -> None:  # noqa: B027 masters are rarely replicated
        """Collective. The same for masters that every rank has whole."""
