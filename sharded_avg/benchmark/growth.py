"""Models of many small parameters: what each parameter costs, however many there are.

A number that grows from left to right in its row is work that is worse than linear.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from .. import EMA, ShardedAverage
from .rivals import DECAY
from .weights import tensors

NUMEL = 16  # of each parameter: next to nothing, so that what is measured is the work beside the elements
NUM_ROUNDS = 3
WARMUP_COUNT = 10
TARGETS_US = {"build": 15.0, "swap, in and out": 8.0, "save": 150.0, "load": 150.0}  # for the largest number


@dataclass(frozen=True)
class Growth:
    """What one operation costs: microseconds a parameter, by the number of parameters."""

    what: str
    us: dict[int, float]
    target_us: float | None

    @property
    def is_missed(self) -> bool:
        """Whether the largest number of parameters costs more than the target."""
        return self.target_us is not None and self.us[max(self.us)] > self.target_us


def growth(counts: tuple[int, ...]) -> list[Growth]:
    """CPU time of this process, so that neither others on the machine nor the disk count; medians of NUM_ROUNDS."""
    _round(WARMUP_COUNT)  # imports, and what torch sets up once
    found: dict[str, dict[int, float]] = {}
    gc.freeze()  # what else this process holds is not looked through again before every operation
    try:
        for count in counts:
            rounds = [_round(count) for _ in range(NUM_ROUNDS)]
            for what in rounds[0]:
                found.setdefault(what, {})[count] = median(one[what] for one in rounds) / count * 1e6
    finally:
        gc.unfreeze()
    return [Growth(what, us, TARGETS_US.get(what)) for what, us in found.items()]


def _round(count: int) -> dict[str, float]:
    """Seconds that each operation takes, once."""
    taken: dict[str, float] = {}

    def timed(what: str, call: Callable[[], object]) -> None:
        gc.collect()
        start = time.process_time()
        call()
        taken[what] = time.process_time() - start

    model, held = tensors(count, NUMEL), list[ShardedAverage]()
    timed("build", lambda: held.append(ShardedAverage(model, EMA(decay=DECAY))))
    (average,) = held

    def swap() -> None:
        with average.swapped():
            pass

    timed("first update", average.update)
    timed("update", average.update)
    timed("swap, in and out", swap)
    with TemporaryDirectory() as folder:
        timed("save", lambda: average.save(Path(folder, "average")))
        timed("load", lambda: average.load(Path(folder, "average")))
    return taken
