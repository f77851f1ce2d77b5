"""How a job ends: all its ranks at once, with what they printed, and never by an abort of gloo's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers.launch import EXAMPLES, run_agents

SCRIPT = """
import sys, time
import torch, torch.distributed as dist
from sharded_avg.ranks import leave

dist.init_process_group("gloo")
groups = [dist.new_group([0, 1]) for _ in range(3)]
for group in groups:
    dist.all_reduce(torch.ones(3), group=group)
if dist.get_rank() == 1:
    time.sleep(1)
print(f"rank {dist.get_rank()} is done", end="")
if len(sys.argv) > 1 and dist.get_rank() == 1:
    raise SystemExit("rank 1 fails before it leaves")
leave()
"""


@pytest.mark.own_processes
@pytest.mark.parametrize("fails", [False, True])
def test_leave(fails: bool, tmp_path: Path) -> None:
    """Rank 0 waits for rank 1, and what hangs in its buffer is written; a rank that failed is the job's failure."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    job = ["--standalone", "--nproc_per_node=2", str(script), *(["fail"] if fails else [])]
    (finished,) = run_agents([job], tmp_path, timeout_s=120.0)
    assert finished.code == int(fails), finished.output
    assert {"rank 0 is done", "rank 1 is done"} <= set(re.findall(r"rank \d is done", finished.output))
    assert ("rank 1 fails before it leaves" in finished.output) == fails


NO_JOBS = ("text_verify.py", "which_rule.py")


def test_examples_leave() -> None:
    programs = [path for path in EXAMPLES.glob("*.py") if path.name not in NO_JOBS]
    assert len(programs) > 5
    assert [path.name for path in programs if not re.search(r"^    leave\(", path.read_text(), re.MULTILINE)] == []
