"""What `import sharded_avg` costs over `import torch`: nothing that torch left to be done."""

from __future__ import annotations

import os
import subprocess
import sys

AFTER_TORCH = """
import gc
import torch

collections = []
gc.callbacks.append(lambda phase, info: phase == "start" and collections.append(info["generation"]))
{before}
import sharded_avg
print(len(collections), gc.isenabled())
"""


def imported(before: str = "") -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", AFTER_TORCH.format(before=before)]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120).stdout


def test_no_collection_of_what_torch_has_made() -> None:
    """A full one takes longer than the rest of the import. The first few modules may still begin a young one."""
    collections, enabled = imported().split()
    assert int(collections) <= 2
    assert enabled == "True"


def test_a_collector_that_the_user_has_stopped_stays_so() -> None:
    assert imported("gc.disable()").split()[1] == "False"
