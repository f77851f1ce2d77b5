"""The latest snapshots of one average, in host memory.

A Ring says which of its places holds which snapshot; the values lie in columns of the store, `name/0` to
`name/(size - 1)`, which are laid out as the average is. `turn` writes the newest snapshot over the oldest and makes the
mean anew, from the oldest to the newest: no error adds up, and the bits do not depend on where in the ring one is.

On a GPU everything is in the order of its stream: nothing is waited for, and whoever reads places on the host
synchronises first (`Store.settle`). `room` is scratch, for a place that has another dtype or device than the average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Ring:
    """Which place holds which snapshot. `dtype`: `None` is the average's own."""

    name: str
    size: int
    dtype: torch.dtype | None
    newest: int = 0  # a place
    filled: int = 0

    def place(self, age: int) -> int:
        """Where the snapshot is that came so many before the newest."""
        return (self.newest - age) % self.size

    def column(self, age: int) -> str:
        """The name of that place among the columns of the store."""
        return f"{self.name}/{self.place(age)}"

    @property
    def columns(self) -> list[str]:
        return [f"{self.name}/{place}" for place in range(self.size)]

    def advanced(self) -> Ring:
        """With room for one more."""
        newest = (self.newest + 1) % self.size if self.filled else 0
        return Ring(self.name, self.size, self.dtype, newest, min(self.size, self.filled + 1))


def place_dtype(average: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    """In which a snapshot is kept; complex ones as the average is."""
    return average if asked is None or average.is_complex else asked


def room_dtype(average: Tensor, place: Tensor) -> torch.dtype | None:
    """Of the scratch that copying between these takes; `None` if it takes none."""
    if average.device == place.device:
        return None if average.dtype == place.dtype else average.dtype
    return place.dtype  # what crosses to another device must not change its dtype on the way, or torch takes memory


def turn(average: Tensor, places: Sequence[Tensor], room: Tensor | None) -> None:
    """`average`, flat, holds the newest snapshot: into the first place; then the mean of all places, newest first."""
    step = average.numel() if room is None else room.numel()
    for start in range(0, average.numel(), max(1, step)):
        part = average[start : start + step]
        scratch = part if room is None else room[: part.numel()]
        newest, *others = [place[start : start + step] for place in places]
        if newest.device != part.device:
            scratch.copy_(part)
            newest.copy_(scratch, non_blocking=True)
        else:
            newest.copy_(part)
        oldest, *later = [*reversed(others), newest]
        part.copy_(_brought(oldest, scratch, room))
        for place in later:
            part.add_(_brought(place, scratch, room))
        if later:
            part.div_(len(places))


def _brought(place: Tensor, scratch: Tensor, room: Tensor | None) -> Tensor:
    return place if room is None else scratch.copy_(place, non_blocking=True)
