"""Ranks that save or load together: every rank says what it has, rank 0 decides, and all get the same answer.

Whatever a rank would have raised before is part of what it says, so that no rank waits for one that failed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from ..errors import CheckpointError, PeerError, ShardedAvgError
from ..ranks import rank_in, size_of

Said = TypeVar("Said")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class _Failed:
    """`reasons` of ranks by rank; or an error that is everybody's."""

    reasons: dict[int, str]
    error: ShardedAvgError | None = None


def decided(
    group: dist.ProcessGroup | None,
    say: Callable[[], Said],
    decide: Callable[[list[Said]], Answer],
    doing: str,
) -> Answer:
    """Collective: all ranks must call. `say` runs on every rank, then `decide` on rank 0, on what all have said.

    If `say` fails on a rank, that rank raises its error and the others `PeerError`. An error of this package's that
    `decide` raises is raised on all ranks; any other is rank 0's own, and one of the file system's a `CheckpointError`.
    """
    error: BaseException | None = None
    said = None
    try:
        said = say()
    except BaseException as failure:
        error = failure
    all_said = _gathered(group, (said, None if error is None else repr(error)))
    answer: Any = None
    if rank_in(group) == 0:
        reasons = {rank: reason for rank, (_, reason) in enumerate(all_said) if reason is not None}
        try:
            answer = _Failed(reasons) if reasons else decide([what for what, _ in all_said])
        except ShardedAvgError as failure:
            answer = _Failed({}, failure)
        except Exception as failure:  # a disk, or whatever a storage backend raises
            answer = _Failed({}, CheckpointError(f"{doing} failed: {failure!r}"))
            answer.error.__cause__ = failure
        except BaseException as failure:
            error, answer = failure, _Failed({0: repr(failure)})
    answer = _from_rank_0(group, answer)
    if error is not None:
        raise error
    if isinstance(answer, _Failed):
        if answer.error is not None:
            raise answer.error
        causes = "; ".join(f"rank {rank}: {reason}" for rank, reason in answer.reasons.items())
        raise PeerError(f"{doing} failed elsewhere, and nothing was changed here. {causes}")
    return answer  # type: ignore[no-any-return]


def _gathered(group: dist.ProcessGroup | None, value: Any) -> list[Any]:
    """Collective: all ranks must call. What all ranks have, on rank 0; elsewhere nothing."""
    if size_of(group) == 1:
        return [value]
    values: list[Any] | None = [None] * size_of(group) if rank_in(group) == 0 else None
    dist.gather_object(value, values, dst=dist.get_global_rank(_given(group), 0), group=group)
    return values or []


def _from_rank_0(group: dist.ProcessGroup | None, value: Any) -> Any:
    """Collective: all ranks must call. What rank 0 has."""
    if size_of(group) == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=dist.get_global_rank(_given(group), 0), group=group)
    return values[0]


def _given(group: dist.ProcessGroup | None) -> Any:
    return dist.group.WORLD if group is None else group


def claim_path(identity: str, ranks: list[int]) -> None:
    """Refuse a path that other ranks of this job have saved to: they hold another model, or another part of it.

    The store remembers who was first, for as long as the job runs. Local.
    """
    store = dist.distributed_c10d._get_default_store()  # private, but the only store that every job already has
    mine = ",".join(map(str, ranks))
    owner = store.compare_set(f"sharded_avg/saved/{identity}", "", mine).decode()
    if owner != mine:
        raise CheckpointError(
            f"ranks [{owner}] of this job have saved to {identity!r}, and these are ranks [{mine}], which hold another "
            "model, or another part of it: saving there would replace theirs. Give each group of ranks a path of its "
            "own; one checkpoint of all of them is torch.distributed.checkpoint.save({'average': average}, ...)"
        )


def part_group(ranks: list[int]) -> dist.ProcessGroup:
    """Collective: all of these ranks must call. A group of them, made once."""
    key = tuple(ranks)
    if key not in _groups or _groups[key][0] is not dist.group.WORLD:
        made: dist.ProcessGroup = dist.new_group(ranks, use_local_synchronization=True)
        _groups[key] = (dist.group.WORLD, made)
    return _groups[key][1]


_groups: dict[tuple[int, ...], tuple[Any, dist.ProcessGroup]] = {}
