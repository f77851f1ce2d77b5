"""Two ranks that share a device, in processes of their own: a crash costs one engine.

Verdict   how an engine did
judge     a proof for each engine, side by side; and a control, without sharded_avg, of each that failed
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 100.0  # of all pairs
PAIR_LIMIT_S = 50.0
GRACE_S = 2.0  # of a rank whose partner has failed: how it ends itself says more than a kill
LOG_LINES = 25

RANK = (sys.executable, "-m", "tests.gpu.rank")


@dataclass(frozen=True)
class Failure:
    """Why a pair failed, in a line, and the ends of its logs."""

    why: str
    log: str


@dataclass(frozen=True)
class Verdict:
    """`None` is no failure. There is a control where the proof failed."""

    proof: Failure | None
    control: Failure | None = None


Verdicts = dict[str, Verdict | None]
_NO_TIME = Failure("no time", "")


def judge(engines: Iterable[str], device: str, command: Sequence[str] = RANK, limit_s: float = LIMIT_S) -> Verdicts:
    """As many pairs at a time as there are cores for; no verdict where the time did not suffice for one.

    `command` starts a rank, given what tests.gpu.rank is given.
    """
    names = list(engines)
    run = partial(_run, device=device, command=command, deadline=time.monotonic() + limit_s)
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        proofs = dict(zip(names, pool.map(partial(run, part="proof"), names), strict=True))
        failed = [name for name in names if proofs[name]]
        controls = dict(zip(failed, pool.map(partial(run, part="control"), failed), strict=True))
    found = {name: Verdict(proof, controls.get(name)) for name, proof in proofs.items()}
    return {name: None if _NO_TIME in (v.proof, v.control) else v for name, v in found.items()}


def _run(engine: str, *, device: str, part: str, command: Sequence[str], deadline: float) -> Failure | None:
    if time.monotonic() > deadline:
        return _NO_TIME
    with tempfile.TemporaryDirectory(prefix="tests-gpu-pair-") as folder:
        logs = [Path(folder, f"rank{rank}.log") for rank in range(2)]
        ranks = []
        for rank, log in enumerate(logs):
            with log.open("wb") as output:
                arguments = [*command, folder, device, engine, part, str(rank)]
                ranks.append(
                    subprocess.Popen(
                        arguments, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
                    )
                )
        codes = _codes(ranks, deadline)
        if codes == [0, 0]:
            return None
        ended = [rank for rank, code in enumerate(codes) if code]  # the other one only waited, if one did
        told = [_why(Path(folder, f"rank{rank}.why"), logs[rank], codes[rank]) for rank in ended or range(2)]
        ends = ["\n".join([f"rank {r}:", *_lines(log)[-LOG_LINES:]]) for r, log in enumerate(logs)]
        return Failure("; ".join(dict.fromkeys(told)), "\n".join(ends))


def _codes(ranks: list[subprocess.Popen[bytes]], deadline: float) -> list[int | None]:
    """Exit codes; `None` of a rank that had to be killed."""
    deadline = min(deadline, time.monotonic() + PAIR_LIMIT_S)
    try:
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
            if any(rank.poll() for rank in ranks):
                deadline = min(deadline, time.monotonic() + GRACE_S)
            time.sleep(0.05)
        return [rank.poll() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def _why(told: Path, log: Path, code: int | None) -> str:
    if told.exists():
        return told.read_text()
    if not code:
        return "not done in time"
    if code > 0:
        return f"exit code {code}"
    text = "\n".join(_lines(log))
    where = re.search(r'File "([^"]+)", line (\d+) in (\S+)', text[max(0, text.find("Fatal Python error")) :])
    return f"signal {-code}" + (f" in {where[3]} ({Path(where[1]).name}:{where[2]})" if where else "")


def _lines(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines()
