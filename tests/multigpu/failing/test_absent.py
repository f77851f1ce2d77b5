"""A rank that does not come, or comes when the others have given up: all raise, and say which one it was."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch.distributed as dist

from sharded_avg.ranks import bounds
from tests.helpers.further import covered_by
from tests.helpers.pool import on_ranks

from .calls import CALLS, Request, Subject
from .ends import ended, told

PATIENCE_S = 1.0
# In what DCP makes of these two, and in what the user's forward does, others are waited for that are not ours to name.
OURS = [call for call in CALLS if not call.startswith("dcp.") and call != "refreshed_batch_norm"]


@pytest.mark.parametrize("row", covered_by({"ddp"}, ["ddp", "fsdp2"]))
@pytest.mark.parametrize("call", covered_by({"swapped"}, OURS))
@on_ranks(3)
def test_a_rank_that_comes_late_is_named(call: str, row: str, tmp_path: Path) -> None:
    """No wait is for ever. Afterwards ranks are in step again: the same call succeeds."""
    if (call, row) == ("republish", "fsdp2"):
        pytest.skip("there are no replicas, and nothing to wait for")
    subject, late, run = Subject(row, tmp_path), 1, CALLS[call].run
    request, kept = CALLS[call].request(subject), subject.kept()

    def delayed(request: Request) -> object:
        time.sleep(2 * PATIENCE_S if dist.get_rank() == late else 0.0)
        return run(request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounds, "PATIENCE_S", PATIENCE_S)
        ends = ended(subject, kept, delayed, request)
    case = f"{call}\n{told(ends)}"
    for rank, end in enumerate(ends):
        assert "PeerError" in end.classes, case
        assert rank == late or f"ranks [{late}] did not come" in end.text, case
        assert not end.changed, case
    again = ended(subject, kept, run, CALLS[call].request(subject) if "save" in call else request)
    assert not any(end.error for end in again), f"once more, after {case}\n{told(again)}"
