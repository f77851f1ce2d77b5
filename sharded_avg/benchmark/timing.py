"""Calls timed in turns, and ratios of their times.

    Contender   a named call that does one update, and the bytes that any such call has to move
    Case        Contenders that do the same work; the first is the base of the ratios
    Timing      a Contender's median, the median of its ratios to the base, and its floor

Rounds are A B C, C A B, ...: every contender once, in a shuffled order. A ratio is taken inside one round, and the
median over rounds is reported, so that a machine that becomes slower for a while slows both sides of it.
The floor is the bytes that have to be moved over the bandwidth of `copy_`, measured in the same rounds: a copy reads
its source, and reads and writes the memory of its target, since a processor fetches what it writes into.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles

import torch

from .. import ShardedAverage

NUM_WARMUPS = 3
OURS = "ShardedAverage.update"
_COPY = "(copy)"
_TICK_S = 1e-9  # a clock's resolution: a tiny copy may take no time at all

Clock = Callable[[], float]


@dataclass(frozen=True)
class Contender:
    """One way to do the work of a Case."""

    name: str
    call: Callable[[], object]
    moved_bytes: int  # read and written by any implementation
    target: float | None = None  # for the ratio to the base
    is_rival: bool = False  # ours has to be faster


@dataclass(frozen=True)
class Memory:
    """What one rank holds of an average."""

    local_numel: int  # averaged elements that the rank owns
    nbytes: int
    scratch_nbytes: int

    @classmethod
    def of(cls, average: ShardedAverage, local_numel: int) -> Memory:
        """Of the rank that calls, beside what it has to hold."""
        return cls(local_numel, average.nbytes, average.scratch_nbytes)

    @property
    def ratio(self) -> float:
        """To four bytes for each element."""
        return self.nbytes / max(1, 4 * self.local_numel)


@dataclass(frozen=True)
class Case:
    """Contenders that do the same work; the first is the base."""

    name: str
    contenders: list[Contender]
    memory: Memory | None = None


@dataclass(frozen=True)
class Timing:
    """What was measured of one Contender. Ratios are to the base of its Case, in the same round."""

    case: str
    name: str
    median_s: float
    ratio: float
    ratio_low: float  # 10th percentile over rounds
    ratio_high: float  # 90th
    floor_s: float
    target: float | None
    is_rival: bool
    num_rounds: int

    @property
    def met(self) -> bool | None:
        """Whether the ratio is within its target; `None` without one."""
        return None if self.target is None else self.ratio <= self.target


def clock_for(num_threads: int) -> tuple[str, Clock]:
    """CPU time of one thread where there is only one: other processes on the machine do not count. Otherwise wall."""
    if num_threads == 1:
        return "CPU time of the one thread", time.thread_time
    return "wall time", time.perf_counter


def measure(case: Case, *, num_rounds: int, clock: Clock, between: Callable[[], object] = lambda: None) -> list[Timing]:
    """Time every contender `num_rounds` times, in turns; `between` runs before each call, outside of its time.

    The order is the same on every rank.
    """
    # A copy whose source and target together are as large as what the base reads and writes.
    nbytes = max(1, case.contenders[0].moved_bytes // 3)
    source, target = torch.ones(nbytes, dtype=torch.uint8), torch.ones(nbytes, dtype=torch.uint8)
    contenders = [*case.contenders, Contender(_COPY, lambda: target.copy_(source), 3 * nbytes)]
    for contender in contenders * NUM_WARMUPS:
        between()
        contender.call()
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    order = random.Random(0)
    for _ in range(num_rounds):
        for contender in order.sample(contenders, len(contenders)):
            between()
            start = clock()
            contender.call()
            times[contender.name].append(clock() - start)
    bandwidth = contenders[-1].moved_bytes / max(median(times[_COPY]), _TICK_S)
    base = times[case.contenders[0].name]
    return [_timing(case.name, contender, times[contender.name], base, bandwidth) for contender in case.contenders]


def _timing(case: str, contender: Contender, times: list[float], base: list[float], bandwidth: float) -> Timing:
    ratios = [mine / other for mine, other in zip(times, base, strict=True)]
    low, *_, high = quantiles(ratios, n=10, method="inclusive") if len(ratios) > 1 else ratios * 9
    return Timing(
        case=case,
        name=contender.name,
        median_s=median(times),
        ratio=median(ratios),
        ratio_low=low,
        ratio_high=high,
        floor_s=contender.moved_bytes / bandwidth,
        target=contender.target,
        is_rival=contender.is_rival,
        num_rounds=len(times),
    )
