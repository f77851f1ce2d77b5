"""A rank that fails anywhere in a collective method: all ranks raise within seconds, and all is as it was before.

For every collective method, on one rank, at the first tensor operation after each communication that the method has:
MemoryError, or Ctrl-C. Nothing of the package is replaced, and a new method is in it by itself.
"""

from __future__ import annotations

import signal
from contextlib import nullcontext
from itertools import count
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.helpers.engines import ENGINES
from tests.helpers.further import covered_by
from tests.helpers.pool import run_on_ranks
from tests.helpers.trap import Trap

from .calls import CALLS, Subject, collective_methods
from .ends import SOON_S, End, ended, told

ROWS = [
    ("ddp", 2),
    ("ddp", 3),
    ("fsdp1-full-views", 2),
    ("fsdp1-full-flat", 3),
    ("fsdp2", 2),
    ("fsdp2", 3),
    ("zero1-bf16", 2),
    ("zero1-groups", 3),
    ("zero2", 2),
    ("zero3", 2),
    ("zero3-bf16-groups", 3),
]
COVER = {("ddp", 2), ("fsdp1-full-flat", 3), ("fsdp2", 3), ("zero1-bf16", 2), ("zero2", 2), ("zero3", 2)}
FAULTS = ["MemoryError", "Ctrl-C"]
# What cannot be undone, and is said instead. The rank that failed shows its own error.
TOLD = {
    "republish": "call republish()",
    "restore_raw": "call republish()",
    "writeback": "may hold a part of the edits",
    "writeback from all": "may hold a part of the edits",
}


NOT_YET = {"load_posthoc"}  # needs a series of saved snapshots: tests/multigpu/saved has its own tests of it


def test_every_collective_method_is_called():
    """A method whose docstring begins "Collective" has a way to be called in `CALLS`."""
    called = {call.method for call in CALLS.values()}
    assert collective_methods() - NOT_YET <= called
    assert called - collective_methods() == {"state_dict", "load_state_dict"}  # in what DCP makes of them, collective


def communicates(row: str) -> bool:
    """Whether ranks wait for each other in a forward of this engine."""
    return row.startswith(("fsdp", "zero3"))


def no_memory() -> None:
    raise MemoryError("of the test")


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.each_value
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("row", "world_size"), covered_by(COVER, ROWS))
@pytest.mark.parametrize("call", [call for call in CALLS if not call.startswith("dcp.")])  # DCP waits there, not we
def test_a_failure_anywhere_is_told_to_all(call: str, row: str, world_size: int, fault: str, tmp_path: Path) -> None:
    """A row is one method on one engine, and in it every place where a rank can fail."""
    if ENGINES[row].kind == "deepspeed":
        pytest.importorskip("deepspeed")
    if call == "refreshed_batch_norm" and communicates(row):
        pytest.skip("forward is the user's: the others are in it until their group's timeout")
    kind = ENGINES[row].kind
    run_on_ranks(world_size, _sweep, kind=kind, timeout_s=120.0, row=row, call=call, fault=fault, folder=tmp_path)


def _sweep(row: str, call: str, fault: str, folder: Path) -> float:
    """On each rank. How long the last rank took at most, in seconds."""
    subject, longest_s, found = Subject(row, folder), 0.0, []
    for fails in (dist.get_world_size() - 1, 0):
        for stretch in count():
            try:
                took_s = _fails_at(subject, call, stretch, fault, fails)
            except AssertionError as error:  # on all ranks alike
                found.append(str(error))
                continue
            if took_s is None:
                break
            longest_s = max(longest_s, took_s)
    assert not found, f"{len(found)} of them:\n" + "\n\n".join(found)
    return longest_s


def _fails_at(subject: Subject, call: str, stretch: int, fault: str, fails: int) -> float | None:
    """Collective. One call that fails in one place; `None` if it has no such place. All ranks know what is asserted."""
    request, run = CALLS[call].request(subject), CALLS[call].run
    kept = subject.kept()
    trap = Trap(stretch, no_memory if fault == "MemoryError" else ctrl_c)
    ends = ended(subject, kept, run, request, trap.listening if dist.get_rank() == fails else nullcontext)
    places: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(places, (trap.where, trap.sprung_at))
    where, began = places[fails]
    case = f"{call}, {fault} on rank {fails}, stretch {stretch}, {where}\n{told(ends)}"
    if began is None:
        assert not any(end.error for end in ends), case
        subject.put_back(kept)
        return None
    own = "MemoryError" if fault == "MemoryError" else "KeyboardInterrupt"
    took_s = max(end.at for end in ends) - began
    try:
        assert took_s < SOON_S, case
        if _was_late(ends, fails, fault, where):
            assert ends[fails].error in (own, ""), case
        else:
            _check(ends, fails, own, TOLD.get(call), case)
    finally:
        subject.put_back(kept)
    again = ended(subject, kept, run, CALLS[call].request(subject) if "save" in call else request)
    assert not any(end.error for end in again), f"once more, after {case}\n{told(again)}"
    subject.put_back(kept)
    return took_s


def _was_late(ends: list[End], fails: int, fault: str, where: str) -> bool:
    """Whether the others had no part in it any more.

    Ctrl-C when the work was done is raised when the others have returned; and leaving these two is local.
    """
    others = [end for rank, end in enumerate(ends) if rank != fails]
    return (fault == "Ctrl-C" or "evaluation/kept.py" in where) and not any(end.error for end in others)


def _check(ends: list[End], fails: int, own: str, told_as: str | None, case: str) -> None:
    """All have raised. All is as it was before, or the ranks that did not fail say what is not."""
    is_told = told_as is not None and any(told_as in end.text for rank, end in enumerate(ends) if rank != fails)
    for rank, end in enumerate(ends):
        # What goes wrong while writing is told by all ranks alike, with its cause.
        assert end.error == own or ("ShardedAvgError" in end.classes and (rank != fails or own in end.text)), case
        assert not end.changed or is_told, case
