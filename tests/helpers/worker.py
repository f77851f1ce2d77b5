"""One rank of a pool: a process that runs test bodies until its parent goes away.

    Job      what the parent sends: which body, with which arguments
    Report   what comes back: how it went on this rank
    Rank     who this process is: kind of pool, rank, world size, folder for the rendezvous and the logs

The main thread runs the Jobs; a second one reads them, so that the parent's death is noticed while a body hangs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import os
import pickle
import queue
import resource
import shutil
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # longer than any test: the pool's own clock notices hangs, with stacks
# A process group that a test made stays: four files each, and three threads, of which one wakes 100 times a second. A
# thousand of them, in all pools, took one of two cores.
MAX_OPEN_FILES = 200


@dataclass(frozen=True)
class Job:
    """A body by module and name, with its pickled keyword arguments."""

    module: str
    function: str
    arguments: bytes


@dataclass(frozen=True)
class Report:
    """How a Job went on one rank: `text` is a traceback or a reason, `value` the pickled result."""

    rank: int
    status: Literal["passed", "failed", "skipped"]
    text: str = ""
    value: bytes = b""
    worn: bool = False  # this rank has gathered so many process groups that the pool should be replaced


@dataclass(frozen=True)
class Rank:
    """This process among its peers."""

    kind: str
    rank: int
    world_size: int
    folder: Path

    def environment(self) -> dict[str, str]:
        """What torchrun would set, so that engines which read the environment find what they expect."""
        common = {
            "RANK": self.rank,
            "LOCAL_RANK": self.rank,
            "WORLD_SIZE": self.world_size,
            "LOCAL_WORLD_SIZE": self.world_size,
            "GROUP_RANK": 0,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": 0,  # the group exists before any engine looks: nobody connects to this
            "TORCHELASTIC_RUN_ID": "pool",
            "OMP_NUM_THREADS": 1,
        }
        if sys.platform == "linux":
            common["GLOO_SOCKET_IFNAME"] = "lo"  # works on machines whose own host name does not resolve
        if self.kind == "deepspeed":
            common["DS_ACCELERATOR"] = "cpu"
            common["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # ninja
        return {name: str(value) for name, value in common.items()}


def log_path(folder: Path, rank: int) -> Path:
    """Where a rank's stdout and stderr go."""
    return folder / f"rank{rank}.log"


def stacks_path(folder: Path, rank: int) -> Path:
    """Where a rank writes its Python stacks on SIGUSR1."""
    return folder / f"rank{rank}.stacks"


def body_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """The undecorated body of an `on_ranks` test; other functions are their own body."""
    body: Callable[..., Any] = getattr(function, "body_on_ranks", function)
    return body


def main(kind: str, rank: int, world_size: int, folder: str, connection_fd: int) -> None:
    """Join the group, say so, then run Jobs for ever; the reader thread ends the process."""
    me = Rank(kind, rank, world_size, Path(folder))
    connection = Connection(connection_fd)
    with stacks_path(me.folder, rank).open("w") as stacks:
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        _allow_open_files()
        jobs = _read_jobs(connection, me.folder)
        guard = _guard_like_pytest()
        connection.send(_attempt(rank, lambda: join(me)))
        _clean_up()
        while True:
            job = jobs.get()
            with guard():
                report = _attempt(rank, lambda: run(job))  # noqa: B023 - called before the next job
            _clean_up()
            connection.send(replace(report, worn=_open_files() > MAX_OPEN_FILES))


def _read_jobs(connection: Connection, folder: Path) -> queue.SimpleQueue[Job]:
    jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()

    def read() -> None:
        while True:
            try:
                jobs.put(connection.recv())
            except (EOFError, OSError):  # the parent closed the pool or died: the main thread may hang
                shutil.rmtree(folder, ignore_errors=True)
                os._exit(0)

    threading.Thread(target=read, daemon=True, name="read-jobs").start()
    return jobs


def _guard_like_pytest() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Assertions with their values, as in the parent; the context that is returned makes the same warnings errors."""
    from _pytest.assertion import install_importhook
    from _pytest.config import apply_warning_filters

    from tests.helpers.excepted_warnings import settings_of_a_child

    config = settings_of_a_child()
    install_importhook(config)
    filters = config.getini("filterwarnings")

    @contextlib.contextmanager
    def guard() -> Iterator[None]:
        with warnings.catch_warnings():
            apply_warning_filters(filters, [])
            yield

    return guard


def _open_files() -> int:
    return len(os.listdir("/dev/fd"))


def _allow_open_files() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 10 * MAX_OPEN_FILES
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(hard, wanted), hard))


def join(me: Rank) -> None:
    """Collective. Make the default process group from a file store: no port that another run could hold."""
    os.environ.update(me.environment())
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    on_gpus = torch.cuda.device_count() >= me.world_size and me.kind != "deepspeed"
    if on_gpus:
        torch.cuda.set_device(me.rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
        store=dist.FileStore(str(me.folder / "rendezvous"), me.world_size),
        rank=me.rank,
        world_size=me.world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    dist.barrier()
    if me.kind == "deepspeed":
        import deepspeed
        from deepspeed.runtime import bf16_optimizer

        bf16_optimizer.see_memory_usage = lambda *_, **__: None  # collects garbage at every group, to print numbers
        deepspeed.init_distributed(dist_backend="gloo")  # builds its op, if this is the first time ever


def run(job: Job) -> object:
    """Run one body; the same seed on every rank and for every test."""
    import torch
    from _pytest.config import apply_warning_filters

    function = getattr(importlib.import_module(job.module), job.function)
    for mark in getattr(function, "pytestmark", []):
        if mark.name == "filterwarnings":
            apply_warning_filters([], mark.args)
    torch.manual_seed(0)
    return body_of(function)(**pickle.loads(job.arguments))


def _attempt(rank: int, action: Callable[[], object]) -> Report:
    from _pytest.outcomes import Skipped

    try:
        return Report(rank, "passed", value=pickle.dumps(action()))
    except Skipped as skip:
        return Report(rank, "skipped", str(skip))
    except BaseException as error:  # also pytest.fail and SystemExit: the parent decides what they mean
        return Report(rank, "failed", _traceback_text(error))


def _traceback_text(error: BaseException) -> str:
    """The traceback without the frames of this file, unless there are no others."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames or error.__traceback__))


def _clean_up() -> None:
    """Break the cycles that models and hooks make, so that a test does not inherit the garbage of the one before.

    What is left is for the most part what engines import at their first use. Frozen, it is not looked through again:
    that took longer than the tests.
    """
    gc.collect()
    gc.freeze()
    sys.stdout.flush()
