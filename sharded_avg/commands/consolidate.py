"""`sharded-avg consolidate`: an average into files that people can use.

Everything streams: memory is a few slabs (source.SLAB_BYTES), whatever the size of the weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ..files.source import AbstractSource, Cast
from ..formats.open import StrPath, open_source
from .arguments import DTYPES, add_dtype, add_name, num_bytes
from .progress import Report, progress
from .target import Target, guess_format


def consolidate(
    src: StrPath,
    target: Target,
    *,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    report: Report | None = None,
) -> AbstractSource:
    """Write the average `name` of `src`, or plain weights, to `target`; `dtype=None` keeps each tensor's own.

    Raises `CheckpointError` if `src` cannot be read, `NotStartedError` if it has no average yet, and `ConfigError` for
    a target that cannot be. Returns what was written.
    """
    target.refuse_sources([src])
    source = Cast(open_source(src, name), dtype)
    target.write(source, source.facts, report)
    return source


def add_to(commands: Any) -> None:
    """Add the subcommand to the parser's subparsers."""
    parser = commands.add_parser(
        "consolidate",
        help="write an average into one file, or a few",
        description="OUT ending in .safetensors or .pt is one file; else a folder with model.safetensors in it, or "
        "with several files and model.safetensors.index.json. Needs no GPU, and less than 1 GiB of memory.",
    )
    parser.add_argument("src", metavar="SRC")
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--format", choices=("safetensors", "torch"), help="by the ending of OUT, if left out")
    parser.add_argument(
        "--max-shard-size", type=num_bytes, metavar="SIZE", help="of each file in a folder, such as 5GB"
    )
    add_name(parser)
    add_dtype(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    format = args.format or guess_format(args.out, "safetensors")
    target = Target(path=args.out, format=format, max_file_bytes=args.max_shard_size)
    with progress() as report:
        consolidate(args.src, target, name=args.name, dtype=DTYPES[args.dtype], report=report)
