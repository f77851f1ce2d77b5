"""The command line: `sharded-avg inspect | consolidate | merge | window | posthoc | convert | doctor`.

Also as `python -m sharded_avg`.

Each command is a module with `add_to(commands)`, which adds its arguments and says what runs them; COMMANDS lists them.
Exit codes, for scripts:

    0    done
    1    failed: the disk is full, or may not be written, ...
    2    the command line cannot be: unknown option, wrong format, target that exists as something else
    3    refused: what was to be read is missing, torn, damaged, of another kind, or has no average yet
    130  interrupted (SIGINT); 143 terminated (SIGTERM)

Whatever the code, unless it is 0 there is no half file under the name that was to be written.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import CheckpointError, ConfigError, NotStartedError, ShardedAvgError
from ..version import __version__
from . import consolidate, convert, doctor, inspect, merge, posthoc, window
from .arguments import joined_numbers
from .progress import say

COMMANDS = (inspect, consolidate, merge, window, posthoc, convert, doctor)
OK, FAILED, USAGE, REFUSED = 0, 1, 2, 3


class _Stopped(BaseException):
    """SIGINT or SIGTERM, raised where the program is, so that temporary files are removed on the way out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="sharded-avg", description="Saved averages of weights: what is in them, and files that people can use."
    )
    parser.add_argument("--version", action="version", version=f"sharded-avg {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(commands)
    args = parser.parse_args(joined_numbers(sys.argv[1:] if argv is None else argv))
    with _signals_received() as received:
        try:
            args.run(args)
        except BrokenPipeError:  # `sharded-avg inspect ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (ShardedAvgError, OSError, MemoryError, _Stopped) as error:
            # torch.distributed.checkpoint turns any exception into its own, so that what was received decides.
            if received:
                say("interrupted; nothing was written")
                return 128 + received[0]
            say(str(error) or type(error).__name__)
            return _code_of(error)
    return OK


@contextmanager
def _signals_received() -> Iterator[list[int]]:
    """SIGINT and SIGTERM raise _Stopped in the body; the numbers of those that came are listed."""
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        if len(received) == 1:  # a second one must not disturb the tidying up
            raise _Stopped

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _code_of(error: BaseException) -> int:
    if _has_cause(error, OSError) and not isinstance(error, CheckpointError):
        return FAILED
    if isinstance(error, (CheckpointError, NotStartedError)):
        return REFUSED
    return USAGE if isinstance(error, ConfigError) else FAILED


def _has_cause(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None:
        if isinstance(error, kind):
            return True
        failures = getattr(error, "failures", {})  # of a CheckpointException
        if any(isinstance(failure[0], kind) for failure in failures.values()):
            return True
        error = error.__cause__
    return False
