"""What the commands say on the standard error stream.

say       one line
progress  bytes and rate on a terminal, drawn by tqdm; nothing in a pipe, nor where tqdm is not installed
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[int, int], None]  # bytes so far, bytes in all


def say(message: str) -> None:
    """Tell people something that is no result."""
    print(f"sharded-avg: {message}", file=sys.stderr)


@contextmanager
def progress() -> Iterator[Report | None]:
    """What to report progress to, or `None` if nobody would see it: no terminal, or no tqdm (the extra `progress`)."""
    if not sys.stderr.isatty():
        yield None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield None
        return
    size = shutil.get_terminal_size()  # 80 x 24 where a terminal says 0 x 0, for which tqdm would draw nothing
    with tqdm(unit="B", unit_scale=True, ncols=size.columns, nrows=size.lines, file=sys.stderr) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report
