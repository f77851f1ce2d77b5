"""What can be shown, and how it went.

Check        a function of a device that raises if something is not so, and may return what it measured
Result       how one Check went: ok, failed, or could not run
CouldNotRun  raised by a check where something that it needs is not there
room         Checks of one room share a child process; what crashes or hangs in one room leaves the others alone
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import torch

Shown = Callable[[torch.device], "str | None"]
Status = Literal["ok", "FAILED", "could not run"]

# In the order in which they run: if time runs out, the last ones are left.
ROOMS = ("one process", "speed", "engines", "zero", "graphs", "trainer", "two ranks", "suite")
CHECKS: dict[str, Check] = {}  # filled by the files of checks/, when they are imported


class CouldNotRun(Exception):
    """Something that a check needs is not here; the message says what."""


@dataclass(frozen=True)
class Check:
    """One row of the table."""

    name: str  # "swaps.exceptions"
    room: str
    shows: str
    run: Shown
    needs_gpu: bool
    limit_s: float


@dataclass(frozen=True)
class Result:
    """How one Check went. `text` is what it measured, or why not; `details` a traceback or the end of a log."""

    name: str
    status: Status
    text: str
    seconds: float
    details: str = ""


def check(
    shows: str, *, room: str = "one process", needs_gpu: bool = False, limit_s: float = 60.0, name: str | None = None
) -> Callable[[Shown], Shown]:
    """Enter a function into the table, under the name of its file and its own."""

    def enter(function: Shown) -> Shown:
        noun = function.__module__.rpartition(".")[2]
        full = f"{noun}.{name or function.__name__}"
        if room not in ROOMS:
            raise ValueError(f"{full}: room={room!r} is none of {ROOMS}")
        CHECKS[full] = Check(full, room, shows, function, needs_gpu, limit_s)
        return function

    return enter


def optional(module: str) -> Any:
    """An optional package, or `CouldNotRun`: whatever keeps a third party from being imported is not our failure."""
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise CouldNotRun(f"no {module.partition('.')[0]} here ({type(error).__name__}: {_short(error)})") from error


def attempt(check: Check, device: torch.device) -> Result:
    """Run one check. An error of any kind is its Result."""
    start = perf_counter()
    try:
        if check.needs_gpu and device.type != "cuda":
            raise CouldNotRun("needs a GPU")
        text = check.run(device) or ""
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # an error of a kernel belongs to the check that started it
    except CouldNotRun as error:
        return Result(check.name, "could not run", _short(error), perf_counter() - start)
    except Exception as error:
        text = f"{type(error).__name__}: {_short(error)}"
        return Result(check.name, "FAILED", text, perf_counter() - start, traceback.format_exc())
    return Result(check.name, "ok", text, perf_counter() - start)


def _short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else ""
