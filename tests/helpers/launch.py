"""Jobs as a user starts them: torchrun agents in processes of their own, none of which outlives its test.

agent     one torchrun: it starts the ranks of one machine and watches them
Finished  how an agent ended, and all that its ranks printed
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
GRACE_S = 40.0  # an agent that is told to stop gives its ranks up to 30 s
_OF_A_RANK = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Finished:
    """How a process ended."""

    code: int
    output: str  # stdout and stderr


def free_port() -> int:
    """A TCP port of this machine that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run_agents(agents: Sequence[Sequence[str]], folder: Path, *, timeout_s: float) -> list[Finished]:
    """Run one torchrun for each list of arguments, side by side; how each ended.

    If one fails or the time is up, the others are stopped too: they would wait for peers that never come.
    """
    processes: list[subprocess.Popen[bytes]] = []
    logs = [folder / f"agent{number}.log" for number in range(len(agents))]
    try:
        for arguments, log in zip(agents, logs, strict=True):
            processes.append(_start(["-m", "torch.distributed.run", *arguments], log))
        _wait(processes, time.monotonic() + timeout_s)
    finally:
        _stop(processes)
    return [Finished(process.returncode, log.read_text()) for process, log in zip(processes, logs, strict=True)]


def run_python(arguments: Sequence[str], folder: Path, *, timeout_s: float) -> Finished:
    """Run one fresh Python that knows of no job."""
    log = folder / "python.log"
    process = _start(arguments, log)
    try:
        _wait([process], time.monotonic() + timeout_s)
    finally:
        _stop([process])
    return Finished(process.returncode, log.read_text())


def _start(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    inherited = {name: value for name, value in os.environ.items() if name not in _OF_A_RANK}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # several ranks, which one GPU would not do; tests/gpu is what runs there
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # works on machines whose own host name does not resolve
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(processes: Sequence[subprocess.Popen[bytes]], deadline: float) -> None:
    """Until all have ended, one has failed, or the time is up."""
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes):
            return
        time.sleep(0.1)


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """An agent ends its ranks when it is asked to; killed at once, it would leave them behind."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    for process in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
    for process in running:
        if process.poll() is None:
            process.kill()
            process.wait()
