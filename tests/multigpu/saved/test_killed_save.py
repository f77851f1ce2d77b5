"""A save killed at any point leaves an average that loads; see killed_save.py for how."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.further import further
from tests.helpers.pool import ROOT, under_torchrun

pytestmark = [
    pytest.mark.own_processes,
    pytest.mark.skipif(under_torchrun(), reason="forks its own ranks"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]


@pytest.mark.timeout(420)
@pytest.mark.parametrize(("world_size", "every"), [(1, 1), (2, 4), further(2, 1)])
def test_killed_at_every_point(world_size, every, tmp_path):
    """P88, P96: whatever rank dies, and whenever, the previous average loads, or else the new one, whole."""
    shared_memory = Path("/dev/shm")  # syncing a hundred small files to a disk takes minutes
    folder = shared_memory / f"killed-{os.getpid()}" if shared_memory.is_dir() else tmp_path
    command = [
        *(sys.executable, "-m", "tests.multigpu.saved.killed_save"),
        *(str(world_size), str(every), str(folder / "saved")),
    ]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=400)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            subprocess.run(["rm", "-rf", str(folder)], check=False)
    assert process.returncode == 0, f"{out}\n{err}"
    assert "points on" in out
    assert "'first'" in out
    assert "'second'" in out
