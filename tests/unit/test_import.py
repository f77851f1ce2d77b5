"""What `import sharded_avg` costs over `import torch`: little of its own, and nothing that torch left to be done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
AFTER_TORCH = """
import gc, json, sys, time
import torch

{before}
collections, modules, began = [], set(sys.modules), time.process_time()
gc.callbacks.append(lambda phase, info: phase == "start" and collections.append(info["generation"]))
import sharded_avg
seconds = time.process_time() - began
brought = [name for name in set(sys.modules) - modules if name.startswith("torch.")]
print(json.dumps(dict(seconds=seconds, collections=len(collections), torch=brought, collects=gc.isenabled())))
"""


def imported(cache: Path, before: str = "") -> dict[str, Any]:
    """CPU seconds, collections, and further modules of torch, in a process of its own; `before` runs after torch."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", AFTER_TORCH.format(before=before)],
        cwd=ROOT,
        env=environment | {"PYTHONPYCACHEPREFIX": str(cache)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_what_comes_with_it(tmp_path: Path) -> None:
    """No collection of what torch has made: a full one takes longer than the rest. Two young ones may have begun.

    torch.distributed.tensor, .fsdp and .checkpoint take a second each: they wait until somebody needs them.
    """
    found = imported(tmp_path)
    assert found["collections"] <= 2
    assert found["collects"]
    assert set(found["torch"]) <= {"torch.nn.utils.prune"}


def test_a_collector_that_the_user_has_stopped_stays_so(tmp_path: Path) -> None:
    assert not imported(tmp_path, "gc.disable()")["collects"]


@pytest.mark.further
def test_import_time(tmp_path: Path) -> None:
    imported(tmp_path)  # compiles
    assert min(imported(tmp_path)["seconds"] for _ in range(3)) <= 0.1
