"""A rank that asks for something else than the others, or cannot: all ranks raise within seconds, each told why.

The table is WAYS, in ways.py; afterwards all is as it was before, and the same call made rightly succeeds.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.helpers.engines import ENGINES
from tests.helpers.further import covered_by
from tests.helpers.pool import run_on_ranks

from .calls import CALLS, Subject
from .ends import SOON_S, End, ended, told
from .test_anywhere import COVER, ROWS, communicates
from .ways import WAYS, Way


@pytest.mark.each_value
@pytest.mark.parametrize(("row", "world_size"), covered_by(COVER, ROWS))
@pytest.mark.parametrize("kind", WAYS)
def test_what_one_rank_asks_for_or_cannot(kind: str, row: str, world_size: int, tmp_path: Path) -> None:
    """On each rank in turn, the first and the last."""
    if ENGINES[row].kind == "deepspeed":
        pytest.importorskip("deepspeed")
    pool = ENGINES[row].kind
    run_on_ranks(world_size, _all_ways, kind=pool, timeout_s=120.0, row=row, ways=kind, folder=tmp_path)


def _all_ways(row: str, ways: str, folder: Path) -> None:
    """On each rank."""
    subject, found = Subject(row, folder), []
    for name, way in WAYS[ways].items():
        for call in way.calls:
            if call == "refreshed_batch_norm" and communicates(row):
                continue  # the others are in the user's forward until their group's timeout
            for fails in (dist.get_world_size() - 1, 0):
                try:
                    _one_way(subject, name, way, call, fails)
                except AssertionError as error:  # on all ranks alike
                    found.append(str(error))
    assert not found, f"{len(found)} of them:\n" + "\n\n".join(found)


def _one_way(subject: Subject, name: str, way: Way, call: str, fails: int) -> None:
    """Collective. One call that goes wrong on one rank in one way. What is asserted is known to all ranks."""
    run, right = CALLS[call].run, CALLS[call].request(subject)
    kept, given = subject.kept(), replace(right, options=dict(right.options))
    began = time.monotonic()
    with ExitStack() as undo:
        if dist.get_rank() == fails:
            way.change(given, undo)
        ends = ended(subject, kept, run, given)
    case = f"{call}, {name} on rank {fails}\n{told(ends)}"
    assert max(end.at for end in ends) - began < SOON_S, case
    reached: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(reached, given.is_reached)
    try:
        if reached[fails]:
            _check(ends, fails, way, case)
        else:
            assert not any(end.error for end in ends), case
    finally:
        subject.put_back(kept)
    again = ended(subject, kept, run, CALLS[call].request(subject) if "save" in call else right)
    assert not any(end.error for end in again), f"once more, after {case}\n{told(again)}"
    subject.put_back(kept)


def _check(ends: list[End], fails: int, way: Way, case: str) -> None:
    """All have raised, the others one of this package's errors, and nothing has changed."""
    for rank, end in enumerate(ends):
        assert end.error, case
        assert rank == fails or "ShardedAvgError" in end.classes, case
        assert not (rank == fails and way.own) or end.error == way.own, case
        assert not end.changed or (rank == fails and "count" in case.split("\n")[0]), case
