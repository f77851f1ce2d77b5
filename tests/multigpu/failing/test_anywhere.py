"""A rank that fails anywhere in a collective method: all ranks raise within seconds, and all is as it was before.

For every collective method, on one rank, at the first tensor operation after each communication that the method has:
MemoryError, or Ctrl-C. Nothing of the package is replaced, and a new method is in it by itself.
"""

from __future__ import annotations

import signal
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.helpers.engines import ENGINES
from tests.helpers.further import covered_by
from tests.helpers.pool import run_on_ranks
from tests.helpers.trap import Trap

from .calls import CALLS, Subject, collective_methods
from .ends import Expected, Outcome, ended, judged, once_more, require_fine, told

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
SAID = {
    "republish": "call republish()",
    "restore_raw": "call republish()",
    "writeback": "may hold a part of the edits",
    "writeback from all": "may hold a part of the edits",
}


def test_every_collective_method_is_called():
    """A method whose docstring begins "Collective" has a way to be called in `CALLS`."""
    called = {call.method for call in CALLS.values()}
    assert collective_methods() <= called
    assert called - collective_methods() == {"state_dict", "load_state_dict"}  # in what DCP makes of them, collective


def is_users(call: str, row: str) -> bool:
    """Whether ranks wait for each other in a forward of this engine, which the call runs."""
    return call == "refreshed_batch_norm" and row.startswith(("fsdp", "zero3"))


def no_memory() -> None:
    raise MemoryError("of the test")


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


NOWHERE = "nothing was to fail"
SWEPT = [call for call in CALLS if not call.startswith("dcp.")]  # DCP waits there, not we


@pytest.mark.each_value
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("row", "world_size"), covered_by(COVER, ROWS))
@pytest.mark.parametrize("call", SWEPT)
def test_a_failure_anywhere_is_told_to_all(call: str, row: str, world_size: int, fault: str, tmp_path: Path) -> None:
    """A row is one method on one engine, and in it every place where a rank can fail."""
    if ENGINES[row].kind == "deepspeed":
        pytest.importorskip("deepspeed")
    if is_users(call, row):
        pytest.skip("forward is the user's: the others are in it until their group's timeout")
    require_fine(swept(call, row, world_size, fault, tmp_path))


def swept(call: str, row: str, world_size: int, fault: str, folder: Path) -> list[Outcome]:
    """Of one method on one engine, in every place where the first or the last rank can fail."""
    options = {"row": row, "call": call, "fault": fault, "folder": folder}
    outcomes: list[Outcome] = run_on_ranks(world_size, _sweep, kind=ENGINES[row].kind, timeout_s=120.0, **options)[0]
    return outcomes


def _sweep(row: str, call: str, fault: str, folder: Path) -> list[Outcome]:
    """On each rank. The same on all."""
    subject, found = Subject(row, folder), []
    for fails in (dist.get_world_size() - 1, 0):
        for stretch in count():
            outcome = _fails_at(subject, call, stretch, fault, fails)
            if outcome is not None:
                found.append(outcome)
            if outcome is None or outcome.way == NOWHERE:
                break
    return found


def _fails_at(subject: Subject, call: str, stretch: int, fault: str, fails: int) -> Outcome | None:
    """Collective. One call that fails in one place; `None` if it has no such place."""
    request, run = CALLS[call].request(subject), CALLS[call].run
    kept = subject.kept()
    trap = Trap(stretch, no_memory if fault == "MemoryError" else ctrl_c)
    ends = ended(subject, kept, run, request, trap.listening if dist.get_rank() == fails else nullcontext)
    places: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(places, (trap.where, trap.sprung_at))
    where, began = places[fails]
    subject.put_back(kept)
    if began is None:
        if any(end.error for end in ends):
            return Outcome(call, NOWHERE, fails, "wrong error", told=told(ends))
        return None
    expected = Expected(
        own="MemoryError" if fault == "MemoryError" else "KeyboardInterrupt",
        said=SAID.get(call, ""),
        # Ctrl-C when the work was done is raised when the others have returned; and leaving these two is local.
        may_be_late=fault == "Ctrl-C" or "evaluation/kept.py" in where,
    )
    took_s = max(end.at for end in ends) - began
    outcome = Outcome(
        call,
        f"{fault} in stretch {stretch}, {where}",
        fails,
        judged(ends, fails, took_s, expected),
        took_s,
        told(ends),
    )
    return once_more(outcome, subject, CALLS[call], request, kept)
