"""Tests that run on several ranks.

    @on_ranks(2, 3)
    def test_sum(world_size):          # this body runs on every rank, in a gloo group of 2 and then of 3;
        ...                            # the test fails if any rank fails, and shows that rank's traceback

    values = run_on_ranks(2, body, path=tmp_path)     # several world sizes in one test: one value from each rank

Nouns
    body   a module-level function that every rank runs; its arguments are pickled, `tmp_path` is the same on all ranks
    kind   "torch", or "deepspeed": its ranks run with DS_ACCELERATOR=cpu, in processes that nothing else uses
    Pool   the processes of one (kind, world size): started at first use, kept for the session, replaced after a failure
    outer  the ranks that torchrun made, when pytest itself runs under it: then there are no Pools
"""

from __future__ import annotations

import functools
import inspect
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist

from .worker import Job, Report, body_of, log_path, stacks_path

START_S = {"torch": 120.0, "deepspeed": 600.0}  # importing torch on a busy machine; building DeepSpeed's op once
STARTING = {
    "torch": "start-up",
    "deepspeed": "start-up (if a build was killed, remove $TORCH_EXTENSIONS_DIR/*/lock)",
}
HANG_S = 120.0  # several times the slowest body on a machine that others load, too
PEERS_S = 3.0  # after one rank failed, how long the others may take to report: most are stuck waiting for it
LOG_LINES = 30
ROOT = Path(__file__).resolve().parents[2]

Test = TypeVar("Test", bound=Callable[..., None])


class RanksFailedError(AssertionError):
    """At least one rank failed, died or hung; the message holds tracebacks or stacks, rank by rank."""


def on_ranks(
    *world_sizes: int, further: Sequence[int] = (), kind: str = "torch", timeout_s: float = HANG_S
) -> Callable[[Test], Test]:
    """Make a plain function a test whose body runs on every rank, once for each world size; `further`: with --all only.

    The body may take `world_size`, `tmp_path`, and whatever `pytest.mark.parametrize` and fixtures give it, as long as
    it can be pickled. A body that takes longer than `timeout_s` counts as hung.
    """

    all_sizes = (*world_sizes, *further)

    def decorate(body: Test) -> Test:
        signature = inspect.signature(body)
        wanted = tuple(signature.parameters)

        @functools.wraps(body)
        def test(**arguments: Any) -> None:
            world_size = arguments["world_size"]
            kept = {name: arguments[name] for name in wanted}
            failure = ""
            try:
                _run(world_size, body, kept, kind, timeout_s)
            except RanksFailedError as error:
                failure = str(error)
            if failure:  # raised out here, lest pytest prints both exceptions
                pytest.fail(failure, pytrace=False)

        extra = () if "world_size" in wanted else (inspect.Parameter("world_size", inspect.Parameter.KEYWORD_ONLY),)
        test.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *extra])  # type: ignore[attr-defined]
        test.body_on_ranks = body  # type: ignore[attr-defined]
        test.kind_of_pool = kind  # type: ignore[attr-defined]
        marked = pytest.mark.timeout(timeout_s + START_S[kind] + 60)(test)  # the pool's clock rings first
        sizes = [pytest.param(n, id=f"{n}ranks", marks=pytest.mark.further if n in further else ()) for n in all_sizes]
        return pytest.mark.parametrize("world_size", sizes)(marked)

    return decorate


def run_on_ranks(
    world_size: int, body: Callable[..., Any], /, *, kind: str = "torch", timeout_s: float = HANG_S, **arguments: Any
) -> list[Any]:
    """Run a module-level `body` on every rank and return what each rank returned, in rank order.

    Raises:
        RanksFailedError: a rank failed, died or hung; the pool is replaced on next use.
    """
    return _run(world_size, body, arguments, kind, timeout_s)


def _run(
    world_size: int, body: Callable[..., Any], arguments: dict[str, Any], kind: str, timeout_s: float
) -> list[Any]:
    if under_torchrun():
        from .outer import run_in_process

        return run_in_process(world_size, body_of(body), arguments, kind)
    job = Job(body.__module__, body.__qualname__, pickle.dumps(arguments))
    pool = _pool(kind, world_size)
    try:
        reports = pool.run(job, timeout_s)
    except BaseException:  # also Ctrl-C: the ranks may be out of step
        close(kind, world_size)
        raise
    if any(report.worn for report in reports):
        close(kind, world_size)
    skips = [report.text for report in reports if report.status == "skipped"]
    if skips:
        pytest.skip(skips[0])
    return [pickle.loads(report.value) for report in reports]


def rank_device() -> torch.device:
    """This rank's GPU where there is one for every rank, else the CPU."""
    if torch.cuda.device_count() < dist.get_world_size():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def under_torchrun() -> bool:
    """Whether torchrun started this pytest."""
    return "TORCHELASTIC_RUN_ID" in os.environ


class Pool:
    """`world_size` processes joined in one process group, that run one Job at a time."""

    def __init__(self, kind: str, world_size: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self.processes: list[subprocess.Popen[bytes]] = []
        self.connections: list[Connection] = []
        self.log_starts = [0] * world_size  # where the output of the current Job begins
        try:
            for rank in range(world_size):
                self._start(kind, rank, world_size)
            self._collect(START_S[kind], STARTING[kind])
        except BaseException:
            self.close()
            raise

    def _start(self, kind: str, rank: int, world_size: int) -> None:
        ours, theirs = multiprocessing.Pipe()
        arguments = (kind, rank, world_size, str(self.folder), theirs.fileno())
        code = f"from tests.helpers.worker import main; main(*{arguments!r})"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": _path_with(ROOT), "PYTEST_ADDOPTS": ""}
        if torch.cuda.device_count() < world_size:  # then ranks are as on a machine without any
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with theirs, log_path(self.folder, rank).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", code],
                cwd=ROOT,
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the parent only, which then closes the pool
            )
        self.processes.append(process)
        self.connections.append(ours)

    def run(self, job: Job, timeout_s: float) -> list[Report]:
        """Run one Job on every rank. Raises `RanksFailedError`; after that the pool must be closed."""
        for rank, connection in enumerate(self.connections):
            self.log_starts[rank] = log_path(self.folder, rank).stat().st_size
            try:
                connection.send(job)
            except OSError:
                raise RanksFailedError(f"rank {rank} died before this test\n{self._log(rank)}") from None
        return self._collect(timeout_s, f"{job.module}.{job.function}")

    def _collect(self, timeout_s: float, what: str) -> list[Report]:
        """One Report from every rank, or what went wrong."""
        deadline, waiting = time.monotonic() + timeout_s, dict(enumerate(self.connections))
        reports: dict[int, Report] = {}
        failed = False
        while waiting and (ready := wait(list(waiting.values()), max(0.0, deadline - time.monotonic()))):
            for rank in [rank for rank, connection in waiting.items() if connection in ready]:
                reports[rank] = self._receive(rank, waiting.pop(rank))
                if reports[rank].status == "failed" and not failed:
                    failed, deadline = True, min(deadline, time.monotonic() + PEERS_S)
        if failed or waiting:
            raise RanksFailedError(self._explain(what, timeout_s, reports, failed))
        return [reports[rank] for rank in sorted(reports)]

    def _receive(self, rank: int, connection: Connection) -> Report:
        try:
            report: Report = connection.recv()
        except (EOFError, OSError):
            code = self.processes[rank].wait()
            return Report(rank, "failed", f"the process died with exit code {code}")
        return report

    def _explain(self, what: str, timeout_s: float, reports: dict[int, Report], failed: bool) -> str:
        stacks = self._stacks([rank for rank in range(len(self.processes)) if rank not in reports])
        title = "failed" if failed else f"hung: not done after {timeout_s:g} s"
        parts = [f"{what} {title} on {len(self.processes)} ranks"]
        shown: dict[str, int] = {}
        for rank in [*reports, *stacks]:  # in the order of arrival: the cause before its consequences
            if rank in stacks:
                parts.append(f"--- rank {rank} was still running, here:\n{stacks[rank]}")
            elif reports[rank].status != "failed":
                parts.append(f"--- rank {rank} {reports[rank].status} {reports[rank].text}".rstrip())
            elif (text := reports[rank].text) in shown:
                parts.append(f"--- rank {rank} failed like rank {shown[text]}")
            else:
                shown[text] = rank
                parts.append(f"--- rank {rank} failed\n{text.rstrip()}\n{self._log(rank)}".rstrip())
        return "\n".join(parts)

    def _stacks(self, ranks: Sequence[int]) -> dict[int, str]:
        """The Python stacks of every thread of ranks that have not reported."""
        for rank in ranks:
            self.processes[rank].send_signal(signal.SIGUSR1)
        if ranks:
            time.sleep(0.5)
        return {rank: _read(stacks_path(self.folder, rank)) + "\n" + self._log(rank) for rank in ranks}

    def _log(self, rank: int) -> str:
        lines = _read(log_path(self.folder, rank), self.log_starts[rank]).splitlines()[-LOG_LINES:]
        return "\n".join(["(last lines that it printed)", *lines]) if lines else ""

    def close(self) -> None:
        """End the processes and remove the folder. They hold nothing worth a goodbye."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


_pools: dict[tuple[str, int], Pool] = {}


def _pool(kind: str, world_size: int) -> Pool:
    if (kind, world_size) not in _pools:
        _pools[kind, world_size] = Pool(kind, world_size)
    return _pools[kind, world_size]


def close(kind: str, world_size: int) -> None:
    """Retire one pool; the next use makes a new one."""
    pool = _pools.pop((kind, world_size), None)
    if pool is not None:
        pool.close()


def close_all() -> None:
    """Retire every pool of this session."""
    for kind, world_size in list(_pools):
        close(kind, world_size)


def _path_with(root: Path) -> str:
    return os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])


def _read(path: Path, start: int = 0) -> str:
    return path.read_bytes()[start:].decode(errors="replace").strip() if path.exists() else ""
