"""All ranks come to one point, and one answer is for all of them: in the job's store, without a tensor.

Ranks of one group count their meetings alike. At each of them

    say      every rank says whether it got here, and what it has for the others, under a key of its own
    decide   when all have come, group rank 0 makes one answer of that
    claim    whoever has something to say first claims the verdict: rank 0 its answer, a rank that failed its reason,
             one whose patience ended the names of those that did not come. There is one verdict; all ranks follow it

So a rank that fails waits for nobody, one that comes late reads what has happened, and ranks are never of two minds.

A local part takes its place before it runs, so that meetings inside of it (it may run a user's code) are below that: a
rank that waits in one of them looks at the verdicts above, too, and all ranks go on counting alike.
"""

from __future__ import annotations

import contextlib
import pickle
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch.distributed as dist

from ..errors import PeerError, ReplicaError, ShardedAvgError
from . import bounds, interrupts
from .groups import rank_in, size_of

_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S, _PAUSE_S_PER_RANK = 0.0005, 0.02, 0.0001
_store: Any = None  # the job's
_num_meetings: Counter[str] = Counter()  # by group, in this store
_around: list[_Point] = []  # local parts that are under way here, the innermost last

Decide = Callable[[list[Any]], Any]
UNDONE = "This rank undid its part"


class Asked(NamedTuple):
    """What a rank asks the others for, and of which model; all ranks must ask for the same.

    `text` is compared as it is. Of ranks whose models have the same parts (`model`), `chosen` must be the same, too:
    another part of a model may be on another rank, but what several have is averaged by all of them or by none.
    """

    text: str = ""
    model: int = 0
    chosen: int = 0


class Verdict(NamedTuple):
    """One answer for all ranks: `answer`, or an `error` that is everybody's, or why there is none."""

    answer: Any = None
    error: ShardedAvgError | None = None
    failed: tuple[int, str] | None = None  # the rank that failed, and its reason
    absent: tuple[int, ...] = ()  # ranks that did not come in time


def meet(
    group: dist.ProcessGroup | None,
    said: Any,
    decide: Decide,
    error: BaseException | None,
    doing: str,
    patience_s: float | None = None,
    interrupted_s: float | None = None,
    point: _Point | None = None,
) -> Verdict:
    """Collective: all ranks must call. `decide` runs on rank 0, on what all ranks have said.

    A rank with an `error` returns at once; the verdict may be another rank's. Picklable values only, and small ones.
    `interrupted_s`: how long a rank still waits after Ctrl-C, which is raised later then; not at all by default.
    `point`: the place that was taken for it, if one was.
    """
    if size_of(group) == 1:
        return Verdict(failed=(0, repr(error))) if error is not None else _decided(decide, [(doing, said)])
    point = _Point(group, doing) if point is None else point
    try:
        if error is not None:
            return point.claim(Verdict(failed=(point.me, repr(error))))
        point.say((doing, said))
        return point.wait(decide, bounds.PATIENCE_S if patience_s is None else patience_s, interrupted_s)
    except dist.DistError as failure:  # the process that kept the store has ended
        raise PeerError(
            f"the job's store cannot be reached while {doing}: {failure}. Most likely rank 0 has failed and is gone; "
            "the cause is in its output"
        ) from failure
    finally:
        with contextlib.suppress(dist.DistError):
            point.leave()


@contextmanager
def place_taken(group: dist.ProcessGroup | None, doing: str) -> Iterator[_Point | None]:
    """Where ranks will meet when the local part inside is done; `None` where there is one rank."""
    if size_of(group) == 1:
        yield None
        return
    point = _Point(group, doing)
    _around.append(point)
    try:
        yield point
    finally:
        _around.remove(point)


def claim_once(key: str, owner: str) -> str:
    """Who was the first of this job to claim `key`, for as long as the job runs: `owner`, or somebody else. Local."""
    return str(_job_store().compare_set(f"sharded_avg/{key}", "", owner).decode())


def _job_store() -> Any:
    return dist.distributed_c10d._get_default_store()  # private, but the only store that every job already has


class _Point:
    """One meeting of one group."""

    def __init__(self, group: dist.ProcessGroup | None, doing: str) -> None:
        global _store
        store = _job_store()
        if store is not _store:  # another job of the same process
            _store = store
            _num_meetings.clear()
        self.me, self.group, self.doing = rank_in(group), group, doing
        self._ranks = dist.get_process_group_ranks(group)
        self._outer = [point for point in _around if set(self._ranks) <= set(point._ranks)]
        self._num_inside: Counter[str] = Counter()
        name = "world" if group is None or group is dist.group.WORLD else group.group_name
        name = f"{name}/{zlib.crc32(repr(self._ranks).encode()):08x}"  # groups that lie side by side may share a name
        counts = self._outer[-1]._num_inside if self._outer else _num_meetings
        counts[name] += 1
        self._key: str = f"{self._outer[-1]._key if self._outer else 'sharded_avg'}/{name}/{counts[name]}"
        self._store, self._num_ranks = store, len(self._ranks)

    def say(self, said: Any) -> None:
        self._store.set(f"{self._key}/said/{self.me}", pickle.dumps(said))
        self._store.add(f"{self._key}/arrived", 1)

    def wait(self, decide: Decide, patience_s: float, interrupted_s: float | None) -> Verdict:
        """Until there is a verdict. An interruption becomes one, if it is not too late for that."""
        deadline, pause_s = time.monotonic() + patience_s, _SHORTEST_PAUSE_S
        held: BaseException | None = None
        longest_s = max(_LONGEST_PAUSE_S, _PAUSE_S_PER_RANK * self._num_ranks)
        try:
            while not self._store.check([f"{self._key}/verdict"]):
                if (failed_around := self._around_failed()) is not None:
                    return self.claim(Verdict(error=failed_around))
                if (interruption := interrupts.take_noted()) is not None:
                    if interrupted_s is None or held is not None:
                        raise interruption
                    held, deadline = interruption, min(deadline, time.monotonic() + interrupted_s)
                if self.me == 0 and self._store.add(f"{self._key}/arrived", 0) == self._num_ranks:
                    return self.claim(lambda: _decided(decide, self._all_said()))
                if time.monotonic() >= deadline:
                    return self.claim(lambda: Verdict(absent=tuple(self._absent())))
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, longest_s)
            return self._verdict()
        except BaseException as failure:
            verdict = self.claim(Verdict(failed=(self.me, repr(failure))))
            if verdict.failed is not None and verdict.failed[0] == self.me:
                raise
            interrupts.note(failure)  # the others go on, and so must this rank, until it can tell them
            return verdict
        finally:
            if held is not None:
                interrupts.note(held)

    def _around_failed(self) -> PeerError | None:
        """Whether a rank has failed in a local part that this meeting is in: it will not come here."""
        for outer in self._outer:
            if self._store.check([f"{outer._key}/verdict"]):
                return _peer_error(outer._verdict(), outer.group, outer.doing, UNDONE)
        return None

    def claim(self, verdict: Verdict | Callable[[], Verdict]) -> Verdict:
        """The verdict: this one, if none was claimed before. What makes it runs only then."""
        if self._store.add(f"{self._key}/claims", 1) > 1:
            return self._verdict()
        try:
            made = verdict() if callable(verdict) else verdict
        except BaseException as failure:
            self._store.set(f"{self._key}/verdict", pickle.dumps(Verdict(failed=(self.me, repr(failure)))))
            raise
        self._store.set(f"{self._key}/verdict", pickle.dumps(made))
        return made

    def _verdict(self) -> Verdict:
        deadline, pause_s = time.monotonic() + bounds.PATIENCE_S, _SHORTEST_PAUSE_S
        while not self._store.check([f"{self._key}/verdict"]):  # claimed, and on its way: rank 0 may be at its disk
            if time.monotonic() >= deadline:
                return Verdict(absent=(0,))
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        found: Verdict = pickle.loads(self._store.get(f"{self._key}/verdict"))
        return found

    def _all_said(self) -> list[Any]:
        keys = [f"{self._key}/said/{rank}" for rank in range(self._num_ranks)]
        return [pickle.loads(value) for value in self._store.multi_get(keys)]

    def _absent(self) -> list[int]:
        return [rank for rank in range(self._num_ranks) if not self._store.check([f"{self._key}/said/{rank}"])]

    def leave(self) -> None:
        """The last one clears the place: a long job does not fill the memory of whoever keeps the store."""
        if self._store.add(f"{self._key}/left", 1) == self._num_ranks:
            for rank in range(self._num_ranks):
                self._store.delete_key(f"{self._key}/said/{rank}")
            for name in ("arrived", "claims", "verdict", "left"):
                self._store.delete_key(f"{self._key}/{name}")


def _decided(decide: Decide, all_said: list[tuple[str, Any]]) -> Verdict:
    """What rank 0 makes of what was said: an error of this package is everybody's, any other is rank 0's own."""
    try:
        return Verdict(decide([said for _, said in all_said]))
    except ShardedAvgError as failure:
        return Verdict(error=failure)
    except Exception:
        doings = [doing for doing, _ in all_said]
        if len(set(doings)) == 1:
            raise
        told = "; ".join(f"rank {rank} of the group is {doing}" for rank, doing in enumerate(doings))
        return Verdict(error=PeerError(f"ranks are in different calls: {told}. All must make the same ones, in order"))


def agree(
    group: dist.ProcessGroup | None,
    error: BaseException | None,
    doing: str,
    asked: Asked | None = None,
    left: str = UNDONE,
    point: _Point | None = None,
) -> None:
    """Collective: all ranks must call. Raise on every rank if any rank brings an `error`, or asks for something else.

    A rank raises its own error, and `PeerError` for another's, which says with `left` how this rank was left.
    """
    verdict = meet(
        group, asked or Asked(), lambda all_asked: _require_one(all_asked, group, doing), error, doing, point=point
    )
    answer_of(verdict, error, group, doing, left)


def answer_of(
    verdict: Verdict, error: BaseException | None, group: dist.ProcessGroup | None, doing: str, left: str = UNDONE
) -> Any:
    """What was decided, or raise why it was not."""
    if error is not None:
        raise error
    if verdict.error is not None:
        raise verdict.error
    if verdict.failed is not None or verdict.absent:
        raise _peer_error(verdict, group, doing, left)
    return verdict.answer


def _require_one(all_asked: list[Asked], group: dist.ProcessGroup | None, doing: str) -> None:
    ranks = dist.get_process_group_ranks(group) if group is not None else [0]
    texts: dict[str, list[int]] = {}
    chosen: dict[int, dict[int, list[int]]] = {}
    for rank, asked in zip(ranks, all_asked, strict=True):
        texts.setdefault(asked.text, []).append(rank)
        chosen.setdefault(asked.model, {}).setdefault(asked.chosen, []).append(rank)
    if len(texts) > 1:
        told = "; ".join(f"rank(s) {those}: {text}" for text, those in texts.items())
        raise PeerError(
            f"{doing}: ranks ask for different things, and nothing was changed. {told}. All ranks must make the same "
            "calls with the same arguments, and take the same steps into the average"
        )
    for apart in chosen.values():
        if len(apart) > 1:
            raise ReplicaError(
                f"{doing}: ranks {' and '.join(map(str, apart.values()))} have the same model and average other "
                "parameters of it. Nothing was changed. Give all ranks the same `include`, and the same parameters to "
                "train"
            )


def _peer_error(verdict: Verdict, group: dist.ProcessGroup | None, doing: str, left: str) -> PeerError:
    """What a rank raises that has not failed itself."""
    ranks = [0] if size_of(group) == 1 else dist.get_process_group_ranks(group)
    if verdict.failed is not None:
        rank, reason = verdict.failed
        return PeerError(
            f"rank {ranks[rank]} failed while {doing}: {reason}. {left}. More is in the traceback of that rank"
        )
    return PeerError(
        f"ranks {[ranks[rank] for rank in verdict.absent]} did not come while {doing}: they failed, or are busy "
        f"elsewhere. {left}. All ranks must make this call; how long they wait for each other is "
        "sharded_avg.ranks.bounds.PATIENCE_S"
    )
