"""Starts children, one for each room, and watches the time.

A check that takes longer than its limit is killed with its child, and so is everything when the time of the visit is
up. A child that dies or is killed costs one check: another child goes on with the next one.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import IO

from .check import Check, Result

ROOT = Path(__file__).resolve().parents[2]
START_S = 90.0  # until a child's first check: torch is imported, from a cold disk
TICK_S = 0.05
LOG_LINES = 15
_OF_A_RANK = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

CHILD = (sys.executable, "-m", "tests.gpu.child")

Tell = Callable[[Result], None]


def run_all(
    checks: Iterable[Check], device: str, deadline: float, tell: Tell, command: Sequence[str] = CHILD
) -> list[Result]:
    """Every check's Result, in order; `tell` is called as each comes. `deadline` is of `time.monotonic()`.

    `command` starts a child, given a file for results, a device, and names of checks.
    """
    results: list[Result] = []

    def take(result: Result) -> None:
        results.append(result)
        tell(result)

    with tempfile.TemporaryDirectory(prefix="tests-gpu-") as folder:
        for number, (_, room) in enumerate(groupby(checks, key=lambda check: check.room)):
            left = list(room)
            attempts = 0
            while left:
                child = _Child(left, device, Path(folder) / f"room{number}-{attempts}", command)
                for result in child.results(deadline):
                    take(result)
                    left = [check for check in left if check.name != result.name]
                attempts += 1
    return results


@dataclass
class _Child:
    """One process, and what it has said so far."""

    checks: list[Check]
    device: str
    base: Path  # of its files
    command: Sequence[str]
    begun: str = ""  # the check that it is at
    since: float = 0.0  # when that began; of `time.monotonic()`
    rest: str = ""  # of a line that is not written to its end
    done: set[str] = field(default_factory=set)

    def results(self, deadline: float) -> Iterator[Result]:
        """Results as they come, until the process ends or is killed; then what is to be said of the check it was at."""
        if time.monotonic() >= deadline:
            yield from self._out_of_time()
            return
        process = self._start()
        try:
            with self.base.with_suffix(".results").open() as file:
                while process.poll() is None:
                    yield from self._read(file)
                    if time.monotonic() >= min(deadline, self._limit()):
                        break
                    time.sleep(TICK_S)
                yield from self._read(file)
        finally:
            _kill(process)
        if time.monotonic() >= deadline:
            yield from self._out_of_time()
        else:
            yield from self._ended(process.returncode)

    def _start(self) -> subprocess.Popen[bytes]:
        results, log = self.base.with_suffix(".results"), self.base.with_suffix(".log")
        results.touch()
        inherited = {name: value for name, value in os.environ.items() if name not in _OF_A_RANK}
        ours = {
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PYTHONFAULTHANDLER": "1",
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # one workspace, so that equal products have equal bits
        }
        self.since = time.monotonic()
        with log.open("wb") as output:
            return subprocess.Popen(
                [*self.command, str(results), self.device, *(check.name for check in self.checks)],
                cwd=ROOT,
                env=inherited | ours,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _read(self, file: IO[str]) -> Iterator[Result]:
        *lines, self.rest = (self.rest + file.read()).split("\n")
        for line in lines:
            record = json.loads(line)
            if "begun" in record:
                self.begun, self.since = record["begun"], time.monotonic()
            else:
                result = Result(**record)
                self.begun = ""
                self.since = time.monotonic()
                self.done.add(result.name)
                yield result

    def _left(self) -> list[Check]:
        return [check for check in self.checks if check.name not in self.done]

    def _limit(self) -> float:
        """When the check that is running, or the start, has taken too long."""
        limits = {check.name: check.limit_s for check in self.checks}
        return self.since + limits.get(self.begun, START_S)

    def _ended(self, code: int | None) -> Iterator[Result]:
        """Of a process that ended, by itself or killed for one check: that check failed. Others get another child."""
        took = time.monotonic() - self.since
        failed = [check for check in self.checks if check.name == self.begun]
        if not failed and code != 0 and not self.done:
            failed = self._left()  # it cannot even start
        if not failed and code == 0:
            failed = self._left()
        for check in failed:
            late = took >= (check.limit_s if self.begun else START_S)
            why = f"killed after {took:.0f} s" if late else f"the process ended with code {code}"
            yield Result(check.name, "FAILED", why, took, self._log())

    def _out_of_time(self) -> Iterator[Result]:
        for check in self._left():
            yield Result(check.name, "could not run", "the time of this visit was over", 0.0)

    def _log(self) -> str:
        log = self.base.with_suffix(".log")
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        return "\n".join(lines[-LOG_LINES:])


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The process and whatever it has started; nothing else is in its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
