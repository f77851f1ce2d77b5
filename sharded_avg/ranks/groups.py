"""Who is in it: ranks of a group, devices that values travel on, and the end of a job."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import sys
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from ..errors import LayoutChangedError, PeerError
from . import bounds


def rank_in(group: dist.ProcessGroup | None) -> int:
    """This process's rank in `group`; without a group, its rank in the job (0 if there is no process group at all)."""
    if group is not None:
        _require_alive()
        return dist.get_rank(group)
    return dist.get_rank() if dist.is_initialized() else 0


def everyone(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """`group`, or all ranks of the job where it is not given and there is a job."""
    return dist.group.WORLD if group is None and dist.is_initialized() else group


def size_of(group: dist.ProcessGroup | None) -> int:
    """Number of ranks in `group`; 1 without one."""
    if group is None:
        return 1
    _require_alive()
    return dist.get_world_size(group)


def _require_alive() -> None:
    if not dist.is_initialized():
        raise LayoutChangedError(
            "the process group that shards this model is gone (destroy_process_group() was called): save or export "
            "averages before that"
        )


def comm_device(group: dist.ProcessGroup | None, prefer: torch.device | None = None) -> torch.device:
    """Where tensors must lie to travel over `group`: on `prefer` or the CPU if a backend is there, else on the GPU."""
    if group is None:
        return torch.device("cpu")
    backends = dist.get_backend_config(group)
    if prefer is not None and f"{prefer.type}:" in backends:
        return prefer
    if "cpu:" in backends or dist.get_backend(group) == "gloo":
        return torch.device("cpu")
    return accelerator() or torch.device("cpu")


def accelerator() -> torch.device | None:
    """The device of the accelerator that this process uses; `None` where torch was built for one and none is there."""
    if not torch.accelerator.is_available() or (current := torch.accelerator.current_accelerator()) is None:
        return None
    return torch.device(current.type, torch.accelerator.current_device_index())


def part_group(ranks: list[int]) -> dist.ProcessGroup:
    """Collective: all of these ranks must call. A group of them, made once.

    Until it is there they cannot tell each other anything: a rank that fails before is waited for as long as one that
    does not come. Raises `PeerError` then.
    """
    name = _name_of(ranks)
    known = [group for group, its_name in dist.distributed_c10d._world.pg_names.items() if its_name == name]
    if known:
        return known[0]
    try:
        return _made_by_its_members(ranks, name, datetime.timedelta(seconds=bounds.PATIENCE_S))
    except RuntimeError as error:  # which one, and its words, depend on the store
        raise PeerError(
            f"no group of ranks {_few(ranks)}, which hold this model together, could be made: {error}. Most likely one "
            f"is not in this call, or failed before it (others wait for {bounds.PATIENCE_S:g} s): see its output"
        ) from error


_NAME = "sharded_avg"  # begins those of our groups; torch keeps a list of the groups that there are, by name
_MAX_TOLD = 16  # ranks that an error lists


def _name_of(ranks: list[int]) -> str:
    """Of one length, however many they are: it begins keys of the job's store, which refuses those over 8 KiB."""
    digest = hashlib.sha1(",".join(map(str, ranks)).encode(), usedforsecurity=False).hexdigest()
    return f"{_NAME}:{digest}"


def _few(ranks: list[int]) -> str:
    if len(ranks) <= _MAX_TOLD:
        return str(ranks)
    return f"[{', '.join(map(str, ranks[: _MAX_TOLD - 1]))}, ..., {ranks[-1]}] ({len(ranks)} of them)"


def _made_by_its_members(ranks: list[int], name: str, patience: datetime.timedelta) -> dist.ProcessGroup:
    """What `new_group(ranks, use_local_synchronization=True)` would make, but under a name that is the same on all.

    torch names it by how many groups the process knows (to 2.13; pytorch#173608) or has made (2.14; pytorch#189073):
    members that are in different groups besides would wait for each other under different names, and from 2.14 on ranks
    that are no members would number every group that the job makes later otherwise than these do, and wait in vain.
    Up to 2.13 this group counts, too: a local synchronisation of the user's own, later, of members and others, waits.

    A job that is bound to a device makes each group of nccl by a split in which all its ranks have to take part
    (pytorch#134314): gloo does not.
    """
    c10d = dist.distributed_c10d
    job = c10d._get_default_group()
    backend, store = c10d._world.pg_map[job]
    if job.bound_device_id is not None:
        backend = dist.Backend.GLOO
    place = {rank: index for index, rank in enumerate(ranks)}
    make: Any = c10d._new_process_group_helper
    made: dist.ProcessGroup
    made, _ = make(
        len(ranks), place[dist.get_rank()], ranks, dist.Backend(backend), store, name, timeout=patience, group_desc=name
    )
    c10d._world.pg_group_ranks[made] = place
    return made


def leave(code: int = 0) -> NoReturn:
    """Collective: all ranks must call. The last line of a program that runs on several ranks: end with exit `code`.

    A Python that simply comes to its end takes gloo's threads down one by one, while peers may still talk to them: once
    in many runs that aborts it ("terminate called without an active exception"), after its work was done, and whoever
    started it sees a job that failed. So wait for all, write out what was printed, and be gone. What `atexit` would
    run does not run. In a process that is in no job it only ends the process.
    """
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # a rank that never comes has failed already, and says so itself
            dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
