"""What ranks say to each other, kept in one place because every line of it can hang.

    agree       every rank learns whether any rank failed, so that all of them raise or none does
    rendezvous  wait until every rank has come to the same point, or give up after a grace period
    meeting     both: a rendezvous, and then an agreement, after a body that may itself communicate
    leave       end a job's process, such that no rank pulls the rug from under another

A function here is called by every rank of the group, in the same order, or by none.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import LayoutChangedError, PeerError

RENDEZVOUS_GRACE_S = 30.0  # how long a rank that failed waits for the others before it shows its error
PATIENCE_S = 1800.0  # one that did not: others may still be evaluating
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.0005, 0.02
_ALL_HERE, _GAVE_UP = "all here", "gave up"
_rendezvous_calls: Counter[str] = Counter()  # by group: ranks count the calls of one group alike


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


@contextmanager
def all_or_none(group: dist.ProcessGroup | None, doing: str) -> Iterator[None]:
    """Collective: all ranks must call. What the body does may fail on one rank: then all ranks raise."""
    error: BaseException | None = None
    try:
        yield
    except BaseException as failure:
        error = failure
    agree(group, error, doing)


def agree(group: dist.ProcessGroup | None, error: BaseException | None, doing: str) -> None:
    """Collective: all ranks must call. Raise on every rank if any rank brings an `error`: its own, or `PeerError`."""
    if size_of(group) > 1:
        failed = torch.tensor([0 if error is None else 1], dtype=torch.int32, device=comm_device(group))
        dist.all_reduce(failed, group=group)
        if error is None and int(failed):
            raise PeerError(
                f"{int(failed)} other rank(s) failed while {doing}; this rank undid its part. The cause is in the "
                "traceback of the rank that failed."
            )
    if error is not None:
        raise error


def patience_s(error: BaseException | None) -> float:
    """How long a rank waits for the others at the end of a body that each of them runs for itself."""
    return PATIENCE_S if error is None else RENDEZVOUS_GRACE_S


@contextmanager
def meeting(group: dist.ProcessGroup | None, doing: str) -> Iterator[None]:
    """Collective: all ranks must call. What the body does may fail on one rank: then all ranks raise.

    Unlike `all_or_none`, for a body that may communicate: the others may be stuck in it because this rank failed, so a
    rank with an error waits for them for a while only, and then lets its error be seen.
    """
    error: BaseException | None = None
    try:
        yield
    except BaseException as failure:
        error = failure
    if rendezvous(group, grace_s=patience_s(error)):
        agree(group, error, doing)
    elif error is not None:
        raise error
    else:
        raise PeerError(
            f"another rank failed while {doing}, or did not come; this rank undid its part. The cause is in the "
            "traceback of that rank"
        )


def rendezvous(group: dist.ProcessGroup | None, *, grace_s: float) -> bool:
    """Collective: all ranks must call. Wait until every rank is here; False on all of them if one gave up.

    A rank gives up after `grace_s` seconds. Uses the store, not a collective, so that a rank whose peers never come is
    not stuck; and the store decides for all, so that none goes on to a collective that others have given up.
    """
    if size_of(group) == 1:
        return True
    store = dist.distributed_c10d._get_default_store()  # private, but the only store that every job already has
    group_name = group.group_name if group is not None else "world"
    _rendezvous_calls[group_name] += 1
    key = f"sharded_avg/rendezvous/{group_name}/{_rendezvous_calls[group_name]}"
    verdict = _GAVE_UP  # also of a rank that is interrupted: a late one must not wait for it in a collective
    try:
        if store.add(f"{key}/arrived", 1) == size_of(group):
            verdict = _ALL_HERE
        else:
            deadline, pause_s = time.monotonic() + grace_s, _SHORTEST_PAUSE_S
            while not store.check([f"{key}/verdict"]) and time.monotonic() < deadline:
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    finally:
        if store.add(f"{key}/claims", 1) == 1:  # the first that has something to say decides
            store.set(f"{key}/verdict", verdict)
    all_are_here = bool(store.get(f"{key}/verdict").decode() == _ALL_HERE)
    if store.add(f"{key}/left", 1) == size_of(group):
        for name in ("arrived", "claims", "verdict", "left"):
            store.delete_key(f"{key}/{name}")
    return all_are_here


def gather_objects(group: dist.ProcessGroup | None, value: Any) -> list[Any]:
    """Collective: all ranks must call. The small picklable values of all ranks, in rank order."""
    if size_of(group) == 1:
        return [value]
    values: list[Any] = [None] * size_of(group)
    dist.all_gather_object(values, value, group=group)
    return values


def send(buffer: Tensor, *, group: dist.ProcessGroup, src: int, dst: int | None) -> None:
    """Collective: all ranks must call. Move `buffer` from group rank `src` to `dst`, or to all if that is `None`."""
    me, source = dist.get_rank(group), dist.get_global_rank(group, src)
    if dst is None:
        dist.broadcast(buffer, src=source, group=group)
    elif me == src and src != dst:
        dist.send(buffer, dst=dist.get_global_rank(group, dst), group=group)
    elif me == dst and src != dst:
        dist.recv(buffer, src=source, group=group)


def gloo_twin(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Collective: all ranks must call. A gloo group of the same ranks, for traffic beside the training's."""
    ranks = sorted(dist.get_process_group_ranks(group))
    # Made by its members alone where the job has other ranks. Not otherwise: torch then names the group after the
    # number of groups that a rank is in, which ranks need not have in common.
    alone = len(ranks) < dist.get_world_size()
    twin: dist.ProcessGroup = dist.new_group(ranks, backend="gloo", use_local_synchronization=alone)
    return twin


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
