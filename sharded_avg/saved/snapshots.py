"""Averages saved on a schedule of their own, apart from the training's checkpoints: what a choice after training needs.

A Snapshots begins a save at every `every_steps`-th optimizer step and ends the one before; between, bytes travel while
the training goes on. So at most one is in flight, and each folder has its name only when it is whole.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
import torch.distributed as dist

from ..errors import ConfigError
from ..ranks import all_or_none, collective, everyone, rank_in
from ..rules.numbers import whole
from .folder.place import place_of
from .folder.saving import PendingSave

_NAME = re.compile(r"step-(\d+)")


class _Average(Protocol):
    """What is asked of a ShardedAverage."""

    @property
    def num_steps(self) -> int: ...
    @property
    def n_averaged(self) -> int: ...
    @property
    def process_group(self) -> dist.ProcessGroup | None: ...
    def async_save(self, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> PendingSave: ...


class Snapshots:
    """Saves of an average at every `every_steps`-th optimizer step, in `folder/step-000001000`, ...

    Call `update()` after the average's own, on all ranks, and `close()` at the end, or use it in a `with` statement.
    `load_posthoc` and `sharded-avg posthoc` choose among what is saved.

    Args:
        average: a ShardedAverage; of several rules, most likely: two power averages make any other (EDM2).
        folder: on a disk that all ranks see.
        every_steps: optimizer steps from one save to the next.
        keep_last: how many of the newest stay; `None` is all.
        keep_every: those at multiples of so many steps stay in any case.
        dtype: of what is saved, torch.bfloat16 for half of the bytes; `None` is the average's own.

    Raises `ConfigError` for settings that cannot be.
    """

    def __init__(
        self,
        average: _Average,
        folder: str | os.PathLike[str],
        every_steps: int,
        *,
        keep_last: int | None = None,
        keep_every: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        whole("Snapshots(every_steps", every_steps, least=1)
        for name, value in (("keep_last", keep_last), ("keep_every", keep_every)):
            if value is not None:
                whole(f"Snapshots({name}", value, least=1)
        if "://" in os.fspath(folder):
            raise ConfigError(f"Snapshots(folder={folder!r}): give a folder on a disk; saves at a URL are not listed")
        if dtype is not None and not (
            isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1
        ):
            raise ConfigError(
                f"Snapshots(dtype={dtype!r}): must be a floating-point dtype of at least 16 bits, or None"
            )
        self._average, self._folder, self._every_steps, self._dtype = average, Path(folder), every_steps, dtype
        self._keep_last, self._keep_every = keep_last, keep_every
        self._pending: PendingSave | None = None
        self._latest = 0  # the step of the latest save that was begun here

    @collective
    def update(self) -> bool:
        """Collective: all ranks must call. Begin a save if it is time, and say whether it was.

        The other calls do nothing and communicate nothing. Raises `CheckpointError` if the save before failed.
        """
        step = self._average.num_steps
        if step % self._every_steps or step == self._latest or not self._average.n_averaged:
            return False
        self.close()
        self._latest = step
        self._pending = self._average.async_save(self._folder / f"step-{step:09d}", dtype=self._dtype)
        return True

    @collective
    def close(self) -> None:
        """Collective: all ranks must call. Wait for the save that is under way, name it, and drop those not kept."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        pending.result()
        group = everyone(self._average.process_group)
        with all_or_none(group, f"removing old snapshots in {str(self._folder)!r}"):
            if rank_in(group) == 0:
                for path in self._dropped():
                    place_of(path).forget()

    def _dropped(self) -> list[Path]:
        """Saves that are not to be kept."""
        if self._keep_last is None and self._keep_every is None:
            return []
        found = {int(match[1]): path for path in self._folder.iterdir() if (match := _NAME.fullmatch(path.name))}
        newest = sorted(found)[-(self._keep_last or 1) :]
        kept = {step for step in found if self._keep_every is not None and step % self._keep_every == 0}
        return [path for step, path in found.items() if step not in kept and step not in newest]

    def __enter__(self) -> Snapshots:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:  # after an error other ranks may be anywhere: what was in flight is left torn
            self.close()
