"""`sharded-avg consolidate`: an average into files that people can use.

Everything streams: memory is a few slabs (source.SLAB_BYTES), whatever the size of the weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, ConfigError
from ..files.rounded import Cast
from ..files.source import AbstractSource
from ..formats.open import StrPath, open_source
from .arguments import DTYPES, add_allow_nonfinite, add_dtype, add_name, num_bytes
from .progress import Report, progress
from .target import Target, guess_format


def consolidate(
    src: StrPath,
    target: Target,
    *,
    name: str | None = None,
    raw: bool = False,
    dtype: torch.dtype | None = None,
    allow_nonfinite: bool = False,
    report: Report | None = None,
) -> AbstractSource:
    """Write the average `name` of `src` to `target`; `dtype=None` keeps each tensor's own.

    In a plain checkpoint `name` is the key of the weights that are written, and `raw` takes all of them as they are.
    Raises `CheckpointError` if `src` cannot be read, holds no average, or would not be finite (AbstractRounded),
    `NotStartedError` if it has no average yet, and `ConfigError` for a target that cannot be. Returns what was written.
    """
    target.refuse_sources([src])
    opened = open_source(src, name)
    if raw and "average" in opened.facts:
        raise ConfigError(
            f"{str(src)!r} holds the average {opened.facts['average']!r}: without --raw it is written. For weights "
            "beside it, give the key that they are under, with --name"
        )
    if "average" not in opened.facts and name is None and not raw:
        raise CheckpointError(
            f"{str(src)!r} holds weights, and nothing in it says that they are an average ({opened.facts['format']}). "
            "--raw writes them as they are, --name KEY those under one key; sharded-avg convert knows more formats"
        )
    source = Cast(opened, dtype, allow_nonfinite=allow_nonfinite)
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
    parser.add_argument("--raw", action="store_true", help="write plain weights, where there is no average")
    add_dtype(parser)
    add_allow_nonfinite(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    format = args.format or guess_format(args.out, "safetensors")
    target = Target(path=args.out, format=format, max_file_bytes=args.max_shard_size)
    with progress() as report:
        consolidate(
            args.src,
            target,
            name=args.name,
            raw=args.raw,
            dtype=DTYPES[args.dtype],
            allow_nonfinite=args.allow_nonfinite,
            report=report,
        )
