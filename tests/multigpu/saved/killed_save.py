"""Kill a rank at every point of a save, and load what is left. Run as a program by test_killed_save.py.

    python -m tests.multigpu.saved.killed_save WORLD_SIZE EVERY FOLDER

A point is a file-system event (open, rename, remove, mkdir, ...) of one rank on the saved folder or its companions, as
Python's audit hooks report them, before it happens. For each rank and point, a first average is saved, a second save
is killed at the point, and a fresh process loads: it must find the first average or the second, whole. Prints how many
points were tried and what was found. With EVERY = 4, each rank is killed at every fourth of its points, and the last.
"""

from __future__ import annotations

import collections
import datetime
import importlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sharded_avg import SWA, ShardedAverage

PATIENCE_S = 20.0
GRACE_S = 1.5  # what those who live on have to tidy up; then whoever started the job kills them, too
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
FIRST, SECOND = 1.0, 2.0


def model_of(value: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def average_of(value: float, world_size: int) -> ShardedAverage:
    model = model_of(value)
    average = ShardedAverage(DistributedDataParallel(model) if world_size > 1 else model, SWA())
    average.update()
    return average


class Events:
    """Counts what this process does to files whose path contains `part`, and dies at event number `fatal`."""

    def __init__(self, part: str, fatal: int | None) -> None:
        self.count, self.part, self.fatal = 0, part, fatal
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if event in EVENTS and self.part in str(arguments[0]):
            if self.count == self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1


def save(rank: int, world_size: int, folder: Path, value: float, victim: int | None, fatal: int | None) -> int:
    """One rank of one save; the number of events that it would have."""
    if world_size > 1:
        store = dist.FileStore(str(folder / f"store-{value}"), world_size)
        timeout = datetime.timedelta(seconds=PATIENCE_S / 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    average = average_of(value, world_size)
    events = Events(str(folder / "average"), fatal if rank == victim else None)
    average.save(folder / "average")
    return events.count


def in_forks(world_size: int, body: Callable[[int], int]) -> list[int | None]:
    """Run `body(rank)` in forked processes; what each returned, `None` for one that was killed or failed."""
    readers, children = [], []
    for rank in range(world_size):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # survivors complain of a lost peer, as they should
                os.write(writer, str(body(rank)).encode())
            finally:
                os._exit(0)
        os.close(writer)
        readers.append(reader)
        children.append(child)
    deadline = time.monotonic() + PATIENCE_S
    while children and time.monotonic() < deadline:
        ended = {child: os.waitpid(child, os.WNOHANG) for child in children}
        children = [child for child in children if ended[child] == (0, 0)]
        if any(os.WIFSIGNALED(status) for _, status in ended.values()):
            deadline = min(deadline, time.monotonic() + GRACE_S)
        time.sleep(0.01)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    results = []
    for reader in readers:
        with open(reader) as pipe:
            text = pipe.read()
        results.append(int(text) if text else None)
    return results


def load(folder: Path) -> int:
    """The value that a fresh process loads; raises if it is neither average, whole."""
    average = average_of(0.0, 1)
    average.load(folder / "average")
    with average.summon_full_params() as full:
        values = {float(value) for tensor in full.values() for value in tensor.flatten()}
    if len(values) != 1 or average.n_averaged != 1:
        raise SystemExit(f"a mixture was loaded: {values}")
    return int(values.pop())


def first_save(world_size: int, folder: Path) -> None:
    """What every trial finds in `folder`."""
    folder.mkdir(parents=True)
    saved = in_forks(world_size, lambda rank: save(rank, world_size, folder, FIRST, None, None))
    if None in saved:
        raise SystemExit(f"the first save failed: {saved}")


def trial(world_size: int, folder: Path, victim: int | None, fatal: int | None) -> tuple[list[int | None], str]:
    """A second save, in which `victim` dies at event number `fatal`, of a copy of what the first one left."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(folder.with_name(f"{folder.name}-first"), folder)
    second = in_forks(world_size, lambda rank: save(rank, world_size, folder, SECOND, victim, fatal))
    [found] = in_forks(1, lambda rank: load(folder))
    if found not in (1, 2):
        raise SystemExit(f"nothing could be loaded after rank {victim} died at its event {fatal}: {os.listdir(folder)}")
    # And the next save goes through, whatever was left lying about.
    third = in_forks(world_size, lambda rank: save(rank, world_size, folder, 3.0, None, None))
    [last] = in_forks(1, lambda rank: load(folder))
    if None in third or last != 3:
        raise SystemExit(f"the save after a kill of rank {victim} at event {fatal} failed: {third}, {last}")
    return second, "first" if found == 1 else "second"


def main() -> None:
    """Try every point."""
    world_size, every, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    # Imports, once for all forks: ours of DCP, and DDP's.
    average_of(0.0, 1).save(folder.with_name("warm"))
    importlib.import_module("torch._dynamo")
    first_save(world_size, folder.with_name(f"{folder.name}-first"))
    counts, found = trial(world_size, folder, None, None)
    if None in counts or found != "second":
        raise SystemExit(f"an undisturbed save failed: {counts}, {found}")
    outcomes: collections.Counter[str] = collections.Counter()
    for victim in range(world_size):
        num_points = counts[victim] or 0
        for fatal in sorted({*range(victim, num_points, every), num_points - 1}):
            results, found = trial(world_size, folder, victim, fatal)
            if results[victim] is not None:
                raise SystemExit(f"rank {victim} was not killed at event {fatal}")
            outcomes[found] += 1
    print(f"{sum(outcomes.values())} points on {world_size} ranks: {dict(outcomes)}")


if __name__ == "__main__":
    main()
