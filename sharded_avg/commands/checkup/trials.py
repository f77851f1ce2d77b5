"""Code that is tried in a process of its own, since it may hang, print, compile or end its process.

A trial is ended at a moment that is given, with all that it started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

_GRACE = 10.0  # seconds that a process has to end after SIGTERM
_NOT_DONE = "not done within"
LONGER = "give a busy machine longer (--wait 1800); what had begun was ended"


def search_path() -> str:
    """PATH of a trial. Where an environment was not activated, the programs that it has are there all the same."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def attempt(code: str, end: float) -> str:
    """Run Python code in a process of its own until `end`; the last line that it printed if it failed, else ""."""
    began = time.monotonic()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONFAULTHANDLER"}  # comes last
    with subprocess.Popen(
        [sys.executable, "-u", "-W", "ignore", "-c", code],  # buffered, what it printed may come after why it failed
        env=environment | {"PATH": search_path()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=max(0.0, end - began))
        except subprocess.TimeoutExpired:
            return f"{_NOT_DONE} {end - began:.0f} s"
        finally:
            _end(process)
    lines = [line for line in said.splitlines() if line.strip()]
    return "" if process.returncode == 0 else (lines[-1] if lines else f"exit code {process.returncode}")


def ran_out_of_time(failure: str) -> bool:
    """Whether that is what `attempt` told."""
    return failure.startswith(_NOT_DONE)


def _end(process: subprocess.Popen[str]) -> None:
    """End it, and what it started, which may go on for long and hold the pipe open."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(OSError):  # all have ended
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
