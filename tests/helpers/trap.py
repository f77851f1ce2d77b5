"""Errors in the middle of what ranks do together, with nothing of the package replaced.

    stretch   tensor operations of a rank that no communication interrupts; a call begins with stretch 0
    Trap      raises at the first tensor operation of one stretch, of the thread that enters it

What counts as communication: every collective of torch.distributed, whoever calls it, and whatever is asked of a store.
Tensor operations inside of one are torch's own affair, and no place for an error.
"""

from __future__ import annotations

import functools
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

_COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "batch_isend_irecv",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "irecv",
    "isend",
    "monitored_barrier",
    "new_group",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
    "send",
)
_STORE_METHODS = ("add", "check", "compare_set", "delete_key", "get", "set", "wait")
_NAMESPACES = {"c10d", "_c10d_functional", "_c10d_functional_autograd"}


class Trap(TorchDispatchMode):
    """Calls `spring` at the first tensor operation of stretch number `stretch`, if the calls inside have that many."""

    def __init__(self, stretch: int, spring: Callable[[], None]) -> None:
        super().__init__()
        self.sprung_at: float | None = None  # by the clock that all processes of a machine share
        self.where = ""  # a line of the package, and the operation
        self._wanted, self._spring, self._stretch = stretch, spring, -1
        self._has_talked, self._depth = True, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in _NAMESPACES:
            self._has_talked = True
        elif self._has_talked and not self._depth:
            self._has_talked = False
            self._stretch += 1
            if self._stretch == self._wanted:
                self.where = f"{_line()} at {func}"
                self.sprung_at = time.monotonic()
                self._spring()
        return func(*args, **(kwargs or {}))

    @contextmanager
    def listening(self) -> Iterator[Trap]:
        """Inside, the trap is set."""
        with pytest.MonkeyPatch.context() as patch:
            for name in _COLLECTIVES:
                counted = self._counted(getattr(dist, name))
                patch.setattr(dist, name, counted)
                patch.setattr(dist.distributed_c10d, name, counted)
            for name in _STORE_METHODS:
                patch.setattr(dist.Store, name, self._counted(getattr(dist.Store, name)))
            with self:
                yield self

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                self._has_talked = True

        return called


def _line() -> str:
    """The innermost line of the package, or else of whoever computes."""
    frames = traceback.extract_stack()[:-2]
    ours = [frame for frame in frames if "/sharded_avg/" in frame.filename] or frames
    return f"{ours[-1].filename}:{ours[-1].lineno} {ours[-1].name}"
