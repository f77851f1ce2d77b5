"""A rank that asks for something else than the others, or cannot: all ranks raise within seconds, each told why.

The table is WAYS, in ways.py; afterwards all is as it was before, and the same call made rightly succeeds.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.helpers.engines import ENGINES
from tests.helpers.further import covered_by
from tests.helpers.pool import run_on_ranks

from .calls import CALLS, Subject
from .ends import Expected, Outcome, ended, judged, once_more, require_fine, told
from .test_anywhere import COVER, ROWS
from .ways import WAYS, Way


@pytest.mark.each_value
@pytest.mark.parametrize(("row", "world_size"), covered_by(COVER, ROWS))
@pytest.mark.parametrize("kind", WAYS)
def test_what_one_rank_asks_for_or_cannot(kind: str, row: str, world_size: int, tmp_path: Path) -> None:
    """On each rank in turn, the first and the last."""
    if ENGINES[row].kind == "deepspeed":
        pytest.importorskip("deepspeed")
    require_fine(tried(kind, row, world_size, tmp_path))


def tried(kind: str, row: str, world_size: int, folder: Path) -> list[Outcome]:
    """Of all ways of one kind on one engine."""
    options = {"row": row, "ways": kind, "folder": folder}
    outcomes: list[Outcome] = run_on_ranks(world_size, _all_ways, kind=ENGINES[row].kind, timeout_s=120.0, **options)[0]
    return outcomes


def _all_ways(row: str, ways: str, folder: Path) -> list[Outcome]:
    """On each rank. The same on all."""
    subject, found = Subject(row, folder), []
    for name, way in WAYS[ways].items():
        for call in way.calls:
            for fails in (dist.get_world_size() - 1, 0):
                found.append(_one_way(subject, name, way, call, fails))
    return [outcome for outcome in found if outcome is not None]


def _one_way(subject: Subject, name: str, way: Way, call: str, fails: int) -> Outcome | None:
    """Collective. One call that goes wrong on one rank in one way; `None` if that rank was not asked for it."""
    run, right = CALLS[call].run, CALLS[call].request(subject)
    kept, given = subject.kept(), replace(right, options=dict(right.options))
    began = time.monotonic()
    with ExitStack() as undo:
        if dist.get_rank() == fails:
            way.change(given, undo)
        ends = ended(subject, kept, run, given)
    took_s = max(end.at for end in ends) - began
    reached: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reached, given.is_reached)
    subject.put_back(kept)
    if not reached[fails]:
        if any(end.error for end in ends):
            return Outcome(call, f"{name}: was not asked for", fails, "wrong error", told=told(ends))
        return None
    expected = Expected(own=way.own or "", may_change_it="count" in name)
    outcome = Outcome(call, name, fails, judged(ends, fails, took_s, expected), took_s, told(ends))
    return once_more(outcome, subject, CALLS[call], right, kept)
