"""Which optimizer steps an average has taken in.

A History is a count and the steps themselves as Strides, so that a million regular updates are one entry. It is
immutable: an update gives a new one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..rules.base import Moment

MAX_STRIDES = 256


@dataclass(frozen=True, slots=True)
class Stride:
    """The steps first, first + every, ..., last."""

    first: int
    last: int
    every: int = 1

    @property
    def count(self) -> int:
        return (self.last - self.first) // self.every + 1

    def extended(self, step: int) -> Stride | None:
        """With one more step, if it continues the stride."""
        if self.first == self.last and step > self.last:
            return Stride(self.first, step, step - self.first)
        return Stride(self.first, step, self.every) if step == self.last + self.every else None


@dataclass(frozen=True, slots=True)
class History:
    """`n_averaged` updates of one average, oldest first; `strides` lists all of them, or the first and the latest.

    An irregular schedule gives a stride for every step or two: what is beyond MAX_STRIDES is counted and forgotten.
    """

    strides: tuple[Stride, ...] = ()
    n_averaged: int = 0

    def after(self, step: int) -> History:
        """This history and an update at `step`."""
        longer = self.strides[-1].extended(step) if self.strides else None
        if longer is not None:
            return History((*self.strides[:-1], longer), self.n_averaged + 1)
        return History(_shortened((*self.strides, Stride(step, step))), self.n_averaged + 1)

    @property
    def latest(self) -> int:
        """The step of the latest update; 0 if there was none, or if it is not known."""
        return self.strides[-1].last if self.strides else 0

    def moment(self, step: int) -> Moment:
        """Of an update at `step`. Where the steps of earlier ones are not known, there was one at every step."""
        if not self.strides:
            return Moment(self.n_averaged)
        return Moment(self.n_averaged, step - self.strides[0].first, step - self.strides[-1].last)

    def as_lists(self) -> list[list[int]]:
        """[first, last, every] for each stride, as a manifest has it."""
        return [[stride.first, stride.last, stride.every] for stride in self.strides]

    @classmethod
    def from_lists(cls, lists: Iterable[Iterable[int]], n_averaged: int) -> History:
        """Read what `as_lists` wrote of `n_averaged` updates; raises `ValueError` for what no run can have done."""
        strides = tuple(Stride(*(int(value) for value in values)) for values in lists)
        for stride in strides:
            if stride.every < 1 or stride.last < stride.first or (stride.last - stride.first) % stride.every:
                raise ValueError(f"{stride} is no sequence of steps")
        listed = sum(stride.count for stride in strides)
        if listed > n_averaged:
            raise ValueError(f"{listed} steps are listed for {n_averaged} updates")
        return cls(_shortened(strides), n_averaged)


def _shortened(strides: tuple[Stride, ...]) -> tuple[Stride, ...]:
    return strides if len(strides) <= MAX_STRIDES else (strides[0], *strides[1 - MAX_STRIDES :])
