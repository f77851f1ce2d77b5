"""Values on their way from rank to rank, out of memory that was prepared.

Every rank takes part in every message, whatever has happened to it: the others wait for it. What goes wrong between two
messages is noted, and raised at the end, on all ranks; what was sent meanwhile is worth nothing then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..errors import PeerError
from . import bounds
from .groups import rank_in
from .interrupts import uninterrupted
from .meeting import UNDONE, agree


class Traffic:
    """The messages of one exchange. Each method is collective: ranks call the same ones, in one order.

    A message is a window into prepared memory, and a slice is a tensor operation, which can fail: so what gives the
    window is called here, and once more if it fails.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.error: BaseException | None = None
        self._is_cut = False  # the backend failed: nothing more can be sent

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """For what is local, between two messages: what it raises is noted."""
        try:
            yield
        except BaseException as failure:
            self.error = self.error or failure

    def send(self, window: Callable[[], Tensor], *, src: int, dst: int | None) -> None:
        """Move a window from group rank `src` to `dst`, or to all if that is `None`; only these two must call."""
        group = self.group
        me, source = rank_in(group), dist.get_global_rank(_given(group), src)
        if dst is None:
            self._take_part(window, lambda part: dist.broadcast(part, src=source, group=group, async_op=True))
        elif me == src != dst:
            target = dist.get_global_rank(_given(group), dst)
            self._take_part(window, lambda part: dist.isend(part, dst=target, group=group))
        elif me == dst != src:
            self._take_part(window, lambda part: dist.irecv(part, src=source, group=group))

    def all_gather(self, sent: Callable[[], Tensor], received: Callable[[], Tensor]) -> None:
        """Every rank's window `sent`, one after the other in rank order."""
        self._take_part(
            sent, lambda part: dist.all_gather_into_tensor(received(), part, group=self.group, async_op=True)
        )

    def all_reduce(self, window: Callable[[], Tensor]) -> None:
        """The sum over the ranks."""
        self._take_part(window, lambda part: dist.all_reduce(part, group=self.group, async_op=True))

    def _take_part(self, window: Callable[[], Tensor], start: Callable[[Tensor], Any]) -> None:
        """Start, and once more if that fails: it does at once where the backend is broken. Then wait."""
        for is_last in (False, True):
            if self._is_cut:
                return
            try:
                part = window()
                work = start(part)
                break
            except BaseException as failure:
                self.error = self.error or failure
                self._is_cut = is_last
        else:
            return
        try:
            if part.device.type == "cpu":
                work.wait(timedelta(seconds=bounds.TRAFFIC_S))
            else:
                work.wait()  # only orders streams; the group's own timeout bounds it
        except BaseException as failure:
            self._is_cut = True
            cause = PeerError(f"a message between ranks was lost: {failure}")
            cause.__cause__ = failure
            self.error = self.error or (cause if isinstance(failure, RuntimeError) else failure)


def _given(group: dist.ProcessGroup | None) -> Any:
    return dist.group.WORLD if group is None else group


@contextmanager
def traffic(group: dist.ProcessGroup | None, doing: str, left: str = UNDONE) -> Iterator[Traffic]:
    """Collective: all ranks must call. The body sends what `all_or_none` has prepared; then all go on, or none."""
    with uninterrupted():
        messages = Traffic(group)
        with messages.attempt():
            yield messages
        agree(group, messages.error, doing, left=left)
