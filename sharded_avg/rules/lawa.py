"""The plain mean of the latest snapshots."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .base import AbstractRule, Moment
from .numbers import whole


@dataclass(frozen=True, kw_only=True)
class LAWA(AbstractRule):
    """Latest weight averaging: the mean of the last `last` snapshots, one every `every` optimizer steps, online.

    Kaddour, "Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight Averaging", 2022. The
    snapshots are kept in host memory (pinned where the weights are on a GPU): `last` times the bytes of the average, or
    half of that in bf16. They are saved, loaded and cut anew with the average. Until there are `last` of them, the
    average is of those that there are.

    Args:
        last: how many snapshots.
        every: optimizer steps from one to the next, among those that the schedule chooses: at the first chosen step at
            or after each multiple.
        dtype: of the snapshots; `None` is the average's own. In torch.bfloat16 each snapshot is rounded, and the mean
            of them is not.

    Raises `ConfigError` unless last >= 1, every >= 1, and dtype is a floating-point one of at least 16 bits.
    """

    last: int
    every: int = 1
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        whole("LAWA(last", self.last, least=1)
        whole("LAWA(every", self.every, least=1)
        dtype = self.dtype
        if dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
            return
        raise ConfigError(
            f"LAWA(dtype={dtype!r}): snapshots are kept in a floating-point dtype of at least 16 bits, for example "
            "torch.bfloat16; None is the average's own"
        )

    def snapshots(self) -> tuple[int, torch.dtype | None]:
        """`last` of them, in `dtype`."""
        return self.last, self.dtype

    def takes(self, step: int, latest: int) -> bool:
        """Whether a multiple of `every` lies after step `latest`, and not after `step`."""
        return step // self.every > latest // self.every

    def update_(self, averaged: Sequence[Tensor], current: Sequence[Tensor], at: Moment) -> None:
        """Take in the snapshot; the mean is made of what is kept (averages/ring.py)."""
        torch._foreach_copy_(list(averaged), list(current))

    def shares(self, moments: Iterable[Moment]) -> Iterator[float]:
        """Equal ones, for the latest."""
        found = [at for at, _ in zip(moments, range(self.last), strict=False)]
        yield from [1 / len(found)] * len(found)

    def settings(self) -> dict[str, Any]:
        """What to write into a checkpoint's manifest: the kind and the settings, a dtype by its name ("bfloat16")."""
        dtype = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        return {"kind": "LAWA", "last": self.last, "every": self.every, "dtype": dtype}
