"""The command line: `sharded-avg inspect | consolidate | merge | convert`, also as `python -m sharded_avg`.

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
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from ..errors import CheckpointError, ConfigError, NotStartedError, ShardedAvgError
from ..version import __version__
from .consolidate import Target, consolidate, guess_format, merge
from .convert import add_convert
from .inspect import describe, human_bytes, table
from .merge import WSM_SHAPES, given, uniform, window, wsm

OK, FAILED, USAGE, REFUSED = 0, 1, 2, 3
_DTYPES = {
    "keep": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


class _Stopped(BaseException):
    """SIGINT or SIGTERM, raised where the program is, so that temporary files are removed on the way out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = _parser().parse_args(argv)
    received: list[int] = []
    before = {number: signal.signal(number, _stop(received)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _run(args, received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(received: list[int]) -> Callable[[int, Any], None]:
    def handle(number: int, frame: Any) -> None:
        received.append(number)
        if len(received) == 1:  # a second one must not disturb the tidying up
            raise _Stopped

    return handle


def _run(args: argparse.Namespace, received: Sequence[int]) -> int:
    try:
        args.command(args)
    except BrokenPipeError:  # `sharded-avg inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ShardedAvgError, OSError, MemoryError, _Stopped) as error:
        # torch.distributed.checkpoint turns any exception into its own, so that what was received decides.
        if received:
            return _told("interrupted; nothing was written", 128 + received[0])
        return _told(str(error) or type(error).__name__, _code_of(error))
    return OK


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


def _told(message: str, code: int) -> int:
    print(f"sharded-avg: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sharded-avg", description="Saved averages of weights: what is in them, and files that people can use."
    )
    parser.add_argument("--version", action="version", version=f"sharded-avg {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_inspect(commands)
    _add_consolidate(commands)
    _add_merge(commands)
    add_convert(commands)
    return parser


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser("inspect", help="say what a file or folder of weights holds")
    parser.add_argument("src", metavar="SRC", help="a saved average, a checkpoint that has one, or plain weights")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--tensors", action="store_true", help="names, shapes and dtypes too")
    parser.set_defaults(command=_inspect)


def _add_consolidate(commands: Any) -> None:
    parser = commands.add_parser(
        "consolidate",
        help="write an average into one file, or a few",
        description="OUT ending in .safetensors or .pt is one file; else a folder with model.safetensors in it, or "
        "with several files and model.safetensors.index.json. Needs no GPU, and less than 1 GiB of memory.",
    )
    parser.add_argument("src", metavar="SRC")
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--format", choices=("safetensors", "torch"), help="by the ending of OUT, if left out")
    parser.add_argument("--max-shard-size", type=_bytes, metavar="SIZE", help="of each file in a folder, such as 5GB")
    _add_common(parser)
    parser.set_defaults(command=_consolidate)


def _add_merge(commands: Any) -> None:
    parser = commands.add_parser(
        "merge",
        help="write a weighted sum of averages or of checkpoints",
        description="SRCs oldest first. OUT ending in .safetensors or .pt is one file; else a folder that "
        "ShardedAverage.load reads.",
    )
    parser.add_argument("src", metavar="SRC", nargs="+")
    parser.add_argument("out", metavar="OUT", type=Path)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--weights", type=_numbers, metavar="A,B,...", help="one for each SRC; divided by their sum")
    how.add_argument("--uniform", action="store_true", help="the mean")
    how.add_argument("--lawa", type=int, metavar="K", help="the mean of the last K (Kaddour 2022)")
    how.add_argument("--wsm", choices=tuple(WSM_SHAPES), help="in place of a decay (arXiv 2507.17634)")
    parser.add_argument("--accumulate", choices=("fp64", "fp32"), default="fp64", help="dtype of the sum")
    _add_common(parser)
    parser.set_defaults(command=_merge)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", help="which average; in a plain checkpoint, the key that the weights are under")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="keep", help="of floating-point tensors")


def _inspect(args: argparse.Namespace) -> None:
    found = describe(args.src, tensors=args.tensors)
    print(json.dumps(found, indent=1) if args.json else table(found))


def _consolidate(args: argparse.Namespace) -> None:
    target = Target(
        path=args.out,
        format=args.format or guess_format(args.out, "safetensors"),
        max_file_bytes=args.max_shard_size,
    )
    with _Bar(sys.stderr) as bar:
        consolidate(args.src, target, name=args.name, dtype=_DTYPES[args.dtype], report=bar.report)


def _merge(args: argparse.Namespace) -> None:
    weights, method = _weights(args)
    with _Bar(sys.stderr) as bar:
        merge(
            args.src,
            Target(path=args.out, format=guess_format(args.out, "folder")),
            weights,
            method=method,
            name=args.name,
            accumulate=_DTYPES[args.accumulate] or torch.float64,
            dtype=_DTYPES[args.dtype],
            report=bar.report,
        )


def _weights(args: argparse.Namespace) -> tuple[list[float], str]:
    count = len(args.src)
    if args.weights is not None:
        return given(args.weights), "weights"
    if args.lawa is not None:
        return window(count, args.lawa), f"lawa {args.lawa}"
    return (uniform(count), "uniform") if args.uniform else (wsm(count, args.wsm), f"wsm {args.wsm}")


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _bytes(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 5GB, 500MB or 2GiB")
    base = 1024 if match[3] else 1000
    return max(1, int(float(match[1]) * base ** " kmgt".index(match[2].lower() or " ")))


class _Bar:
    """Bytes and rate on a terminal; nothing in a pipe."""

    _WIDTH, _EVERY_S = 30, 0.1

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream if stream.isatty() else None
        self._start = self._last = time.monotonic()

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._stream is not None:
            self._stream.write("\n")

    def report(self, done: int, total: int) -> None:
        """Draw the bar, at most ten times a second and at the end."""
        now = time.monotonic()
        if self._stream is None or (now - self._last < self._EVERY_S and 0 < done < total):
            return
        self._last = now
        share = done / total if total else 1.0
        filled = "=" * int(share * self._WIDTH)
        rate = human_bytes(done / (now - self._start)) if now > self._start else "- bytes"
        line = f"[{filled:<{self._WIDTH}}] {share:4.0%}  {human_bytes(done)} of {human_bytes(total)}, {rate}/s"
        self._stream.write(f"\r{line:<79}")
        self._stream.flush()
