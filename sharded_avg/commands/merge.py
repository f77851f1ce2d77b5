"""`sharded-avg merge`: a weighted sum of averages or of checkpoints, with its provenance."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, ConfigError
from ..files.source import AbstractSource
from ..formats.open import StrPath, open_source
from .arguments import DTYPES, add_allow_nonfinite, add_dtype, add_name, numbers
from .progress import Report, progress, say
from .sums.order import given_twice, order_of_steps
from .sums.provenance import facts_of_sum
from .sums.weighted_sum import WSM_SHAPES, WeightedSum, given, uniform, window, wsm
from .target import Target, guess_format, some_of


def merge(
    sources: Sequence[StrPath],
    target: Target,
    weights: Sequence[float],
    *,
    method: str = "weights",
    name: str | None = None,
    accumulate: torch.dtype = torch.float64,
    raw: bool = False,
    by_step: bool = False,
    as_given: bool = False,
    dtype: torch.dtype | None = None,
    allow_nonfinite: bool = False,
    report: Report | None = None,
) -> AbstractSource:
    """Write sum of weight_i * source_i to `target`, with its provenance. Sources: averages, or model checkpoints.

    Weights belong to the sources as they are given, and a source that is there twice is told; with `by_step` they
    belong to the sources in the order of their steps, oldest first, and one that is there twice is a `ConfigError`;
    with `as_given` too, the order given is taken for that of the steps.
    All sources are averages, or all plain weights, unless `raw`. Raises as `consolidate`, and `CheckpointError` if
    names or shapes differ, or if steps leave the order open where it matters.
    """
    target.refuse_sources(sources)
    opened = [open_source(source, name) for source in sources]
    plain = [str(path) for path, source in zip(sources, opened, strict=True) if "average" not in source.facts]
    if 0 < len(plain) < len(opened) and not raw:
        raise CheckpointError(
            f"{some_of(plain)} hold weights, and nothing in them says that they are averages, as the other sources "
            "are. --raw sums them all the same"
        )
    twice = given_twice(sources, opened)
    if twice is not None and by_step:
        raise ConfigError(f"{twice}: give each source once, or say with --weights how much each counts")
    if twice is not None:
        say(f"{twice}: both count")
    if by_step and not as_given:
        order = order_of_steps(sources, opened, matters=len({round(weight, 12) for weight in weights}) > 1)
        sources, opened = [sources[i] for i in order], [opened[i] for i in order]
    merged = WeightedSum(opened, weights, accumulate=accumulate, dtype=dtype, allow_nonfinite=allow_nonfinite)
    facts = facts_of_sum(sources, opened, weights, {"kind": "merge", "method": method}, accumulate)
    target.write(merged, facts, report)
    return merged


def add_to(commands: Any) -> None:
    """Add the subcommand to the parser's subparsers."""
    parser = commands.add_parser(
        "merge",
        help="write a weighted sum of averages or of checkpoints",
        description="SRCs in the order of the steps that they record; with --weights, as they are given. OUT ending "
        "in .safetensors or .pt is one file; else a folder that "
        "ShardedAverage.load reads.",
    )
    parser.add_argument("src", metavar="SRC", nargs="+")
    parser.add_argument("out", metavar="OUT", type=Path)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--weights", type=numbers, metavar="A,B,...", help="one for each SRC as given, over their sum")
    how.add_argument("--uniform", action="store_true", help="the mean")
    how.add_argument("--lawa", type=int, metavar="K", help="the mean of the last K (Kaddour 2022)")
    how.add_argument("--wsm", choices=tuple(WSM_SHAPES), help="in place of a decay (arXiv 2507.17634)")
    parser.add_argument("--accumulate", choices=("fp64", "fp32"), default="fp64", help="dtype of the sum")
    parser.add_argument("--as-given", action="store_true", help="SRCs are oldest first, whatever steps they record")
    parser.add_argument("--raw", action="store_true", help="sum averages and plain weights together")
    add_name(parser)
    add_dtype(parser)
    add_allow_nonfinite(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    count = len(args.src)
    if args.weights is not None:
        weights, method = given(args.weights), "weights"
    elif args.lawa is not None:
        weights, method = window(count, args.lawa), f"lawa {args.lawa}"
    elif args.uniform:
        weights, method = uniform(count), "uniform"
    else:
        weights, method = wsm(count, args.wsm), f"wsm {args.wsm}"
    with progress() as report:
        merge(
            args.src,
            Target(path=args.out, format=guess_format(args.out, "folder")),
            weights,
            method=method,
            name=args.name,
            accumulate=DTYPES[args.accumulate] or torch.float64,
            raw=args.raw,
            by_step=args.weights is None,
            as_given=args.as_given,
            dtype=DTYPES[args.dtype],
            allow_nonfinite=args.allow_nonfinite,
            report=report,
        )
