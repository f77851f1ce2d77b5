"""The table: as text, as Markdown, as JSON.

Report   what was measured, on what machine, with what versions
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date

import torch

from ..version import installed_version
from .growth import Growth
from .timing import OURS, Memory, Timing

Table = Callable[[tuple[str, ...], Sequence[tuple[str, ...]]], str]  # headers and rows to text

_HEADERS = ("case", "what", "median", "ratio", "10-90 %", "target", "floor")
_MEMORY_HEADERS = ("case", "local elements x 4", "bytes held", "ratio", "scratch")
_GROWTH = "many small parameters"


@dataclass
class Report:
    """All rows of one run."""

    clock: str
    num_threads: int
    num_rounds: int
    is_quick: bool = False  # then the sizes are not those that targets are for
    timings: list[Timing] = field(default_factory=list)
    memory: dict[str, Memory] = field(default_factory=dict)
    growth: list[Growth] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # job -> why

    def add(self, timings: list[Timing], memory: Memory | None) -> None:
        """Take in what one Case gave."""
        self.timings += timings
        if memory is not None:
            self.memory[timings[0].case] = memory

    @property
    def missed(self) -> list[Timing]:
        """Rows whose ratio is above its target."""
        return [timing for timing in self.timings if timing.met is False]

    @property
    def not_beaten(self) -> list[Timing]:
        """Rivals that are as fast as `ShardedAverage.update` in their case, or faster."""
        ours = {timing.case: timing.ratio for timing in self.timings if timing.name == OURS}
        return [timing for timing in self.timings if timing.is_rival and timing.ratio <= ours[timing.case]]

    def to_json(self) -> str:
        """Everything, seconds and bytes as numbers."""
        return json.dumps({**asdict(self), "machine": machine(), "versions": versions()}, indent=2)

    def to_text(self) -> str:
        """For a terminal."""
        return self._render(_text_table)

    def to_markdown(self) -> str:
        """For docs/benchmarks.md."""
        return self._render(_markdown_table)

    def _render(self, table: Table) -> str:
        packages = ", ".join(f"{name} {number}" for name, number in versions().items())
        heading = (
            f"{date.today().isoformat()}; {machine()}; {packages}. Threads: {self.num_threads} "
            f"(OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}). Medians of {self.num_rounds} rounds, "
            f"contenders in turns, each ratio to the first line of its case in the same round. Clock: {self.clock}; "
            "wall time where there are several ranks. Floor: bytes that have to be moved over the bandwidth of copy_, "
            "measured on as many bytes in the same rounds."
        )
        rows = [
            (
                timing.case,
                timing.name,
                _time(timing.median_s),
                f"{timing.ratio:.2f}",
                f"{timing.ratio_low:.2f}-{timing.ratio_high:.2f}",
                "" if timing.target is None else f"<= {timing.target:g}",
                _time(timing.floor_s),
            )
            for timing in self.timings
        ]
        held = [
            (case, f"{4 * m.local_numel:,}", f"{m.nbytes:,}", f"{m.ratio:.4f}", f"{m.scratch_nbytes:,}")
            for case, m in self.memory.items()
        ]
        tables = [table(headers, lines) for headers, lines in ((_HEADERS, rows), (_MEMORY_HEADERS, held)) if lines]
        if self.growth:
            counts = sorted(self.growth[0].us)
            headers = (_GROWTH, "us a parameter", *(f"{count:,}" for count in counts), "target")
            tables.append(table(headers, [_growth_row(one, counts) for one in self.growth]))
        return "\n\n".join([heading, *tables, *self._notes()])

    def _notes(self) -> Iterator[str]:
        for job, why in self.skipped.items():
            yield f"Not measured: {job}: {why}."
        if self.is_quick:
            yield "Targets are for the sizes of a run without --quick."
            return
        missed = [f"{t.case}, {t.name}: {t.ratio:.2f} > {t.target:g}" for t in self.missed]
        missed += [
            f"{one.what}: {one.us[max(one.us)]:.1f} > {one.target_us:g} us" for one in self.growth if one.is_missed
        ]
        yield f"Above target: {'; '.join(missed) or 'none'}."
        yield f"Rivals that are not slower: {'; '.join(f'{t.case}, {t.name}' for t in self.not_beaten) or 'none'}."


def _text_table(headers: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Columns padded to one width, numbers to the right; a case is named once."""
    shown = [headers, *_without_repeats(rows)]
    widths = [max(len(row[column]) for row in shown) for column in range(len(headers))]
    lines = []
    for row in shown:
        cells = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        cells += [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _markdown_table(headers: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A pipe table; a case is named once."""
    lines = [headers, tuple("---" if column < 2 else "---:" for column in range(len(headers)))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [*lines, *_without_repeats(rows)])


def _without_repeats(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    cases = ["", *(row[0] for row in rows)]
    return [("" if row[0] == before else row[0], *row[1:]) for row, before in zip(rows, cases[:-1], strict=True)]


def _growth_row(one: Growth, counts: list[int]) -> tuple[str, ...]:
    target = "" if one.target_us is None else f"<= {one.target_us:g}"
    return (_GROWTH, one.what, *(f"{one.us[count]:.1f}" for count in counts), target)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def machine() -> str:
    """What there is to say about the hardware without naming the machine."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} cores, {platform.machine()}, {gpu}"


def versions() -> dict[str, str]:
    """Versions of everything that is measured, as far as installed."""
    found = {"Python": platform.python_version(), "torch": torch.__version__}  # its build, too, which metadata may lack
    named = {package: installed_version(package) for package in ("lightning", "ema-pytorch", "deepspeed")}
    return found | {package: version for package, version in named.items() if version is not None}
