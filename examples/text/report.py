"""What the example shows: a progress bar, medians of timings, the table, the picture.

Point    validation losses at one step
Clock    how long the named parts of the loop took
Holding  bytes that one rank keeps
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from sharded_avg.version import how_to_install

OCCASIONAL_LINES = 5  # of progress, where the output is not a terminal


@dataclass(frozen=True)
class Point:
    """Validation loss (nats per byte) of both sets of weights."""

    step: int
    raw: float
    averaged: float


@dataclass(frozen=True)
class Holding:
    """What one rank keeps between steps."""

    parameter_bytes: int
    average_bytes: int


class Clock:
    """Seconds spent in named parts of the loop."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Time what happens inside."""
        begin = time.perf_counter()
        yield
        self._seconds[part].append(time.perf_counter() - begin)

    @contextmanager
    def time_ends(self, part: str, context: AbstractContextManager[object]) -> Iterator[None]:
        """Time entering and leaving `context`, not what happens inside."""
        begin = time.perf_counter()
        with context:
            entered = time.perf_counter()
            yield
            leaving = time.perf_counter()
        self._seconds[part].append(time.perf_counter() - leaving + entered - begin)

    def median_s(self, part: str) -> float:
        """The median duration; it ignores the slow first steps."""
        return statistics.median(self._seconds[part])


def progress(num_steps: int, *, show: bool) -> Iterable[int]:
    """The steps 1 ... num_steps, with a bar on a terminal and a few lines elsewhere; silent unless `show`."""
    steps = range(1, num_steps + 1)
    if not show:
        return steps
    if not sys.stderr.isatty():
        return _with_lines(steps)
    try:
        from tqdm import tqdm
    except ImportError:
        return _with_bar(steps)
    return tqdm(steps, unit="step")


def _with_lines(steps: range) -> Iterator[int]:
    begin, every = time.perf_counter(), max(1, len(steps) // OCCASIONAL_LINES)
    for step in steps:
        yield step
        if step % every == 0:
            print(f"step {step}/{len(steps)}, {time.perf_counter() - begin:.0f} s", flush=True)


def _with_bar(steps: range) -> Iterator[int]:
    for step in steps:
        yield step
        done = 40 * step // len(steps)
        end = "\n" if step == len(steps) else ""
        print(f"\r[{'#' * done:40}] {step}/{len(steps)}", end=end, file=sys.stderr, flush=True)


def table(title: str, points: list[Point], holdings: list[Holding], clock: Clock) -> str:
    """What the run measured, for people."""
    update_s, step_s, swap_s = (clock.median_s(part) for part in ("update", "step", "swap"))
    rows = [title, "", "validation loss, nats per byte", f"{'step':>8}{'raw':>12}{'averaged':>12}{'difference':>14}"]
    rows += [f"{p.step:8}{p.raw:12.4f}{p.averaged:12.4f}{p.averaged - p.raw:+14.4f}" for p in points]
    rows += ["", "bytes kept between steps", f"{'rank':>8}{'parameters':>14}{'average':>14}"]
    rows += [f"{rank:8}{h.parameter_bytes:14,}{h.average_bytes:14,}" for rank, h in enumerate(holdings)]
    rows += [
        "",
        "time (medians on rank 0)",
        f"    one update of the average {update_s * 1e6:10.0f} us",
        f"    one training step         {step_s * 1e3:10.1f} ms   ({100 * update_s / step_s:.2f}% goes to the average)",
        f"    one swap, in and out      {swap_s * 1e3:10.1f} ms",
    ]
    return "\n".join(rows)


def plot(title: str, points: list[Point], path: Path) -> str:
    """Draw both validation curves, where matplotlib is installed; what was done, in words."""
    try:
        import matplotlib
    except ImportError:
        return f"no picture: {how_to_install('matplotlib')}"
    matplotlib.use("Agg")  # no screen needed
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = [point.step for point in points]
    axes.plot(steps, [point.raw for point in points], marker="o", label="raw weights")
    axes.plot(steps, [point.averaged for point in points], marker="o", label="averaged weights")
    axes.set(title=title, xlabel="step", ylabel="validation loss (nats per byte)")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return f"picture: {path}"
