"""`sharded-avg merge`: a weighted sum of averages or of checkpoints, with its provenance."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..files.source import AbstractSource, Cast
from ..formats.open import StrPath, open_source
from .arguments import DTYPES, add_dtype, add_name, numbers
from .progress import Report, progress
from .target import Target, exported_facts, guess_format
from .weighted_sum import WSM_SHAPES, WeightedSum, given, uniform, window, wsm


def merge(
    sources: Sequence[StrPath],
    target: Target,
    weights: Sequence[float],
    *,
    method: str = "weights",
    name: str | None = None,
    accumulate: torch.dtype = torch.float64,
    dtype: torch.dtype | None = None,
    report: Report | None = None,
) -> AbstractSource:
    """Write sum of weight_i * source_i to `target`, with its provenance. Sources: averages, or model checkpoints.

    Raises as `consolidate`, and `CheckpointError` if names or shapes differ.
    """
    target.refuse_sources(sources)
    opened = [open_source(source, name) for source in sources]
    merged = Cast(WeightedSum(opened, weights, accumulate=accumulate), dtype)
    first, *others = [source.facts.get("aliases", {}) for source in opened]
    shared = {alias: name for alias, name in first.items() if all(other.get(alias) == name for other in others)}
    parts = [
        {"path": Path(path).name, "weight": weight, **exported_facts({**source.facts, "aliases": None})}
        for path, weight, source in zip(sources, weights, opened, strict=True)
    ]
    provenance = {
        "kind": "merge",
        "method": method,
        "accumulate": str(accumulate).removeprefix("torch."),
        "sources": parts,
    }
    names = {source.facts.get("average") for source in opened}
    steps = [step for source in opened if isinstance(step := source.facts.get("step"), int)]
    # Averages of one run have most updates in common: the one that took in most stands for all.
    longest = max(opened, key=lambda source: source.facts.get("n_averaged") or 0).facts
    facts = {
        "average": (names.pop() if len(names) == 1 else None) or "average",
        "n_averaged": longest.get("n_averaged") or len(opened),
        "updates": longest.get("updates"),
        "step": max(steps, default=0),
        "rule": {"kind": "merge", "method": method},
        "provenance": provenance,
        "aliases": shared,
        "averaged": _averaged(opened[0]),
    }
    target.write(merged, facts, report)
    return merged


def _averaged(source: AbstractSource) -> list[str]:
    """What counts as averaged: as the source says, or else floating-point tensors but for BatchNorm's statistics."""
    if "averaged" in source.facts:
        return list(source.facts["averaged"])
    infos = source.infos
    statistics = {
        name.replace("num_batches_tracked", kind)
        for name in infos
        if name.rpartition(".")[2] == "num_batches_tracked"
        for kind in ("running_mean", "running_var")
    }
    return [name for name, info in infos.items() if info.dtype.is_floating_point and name not in statistics]


def add_to(commands: Any) -> None:
    """Add the subcommand to the parser's subparsers."""
    parser = commands.add_parser(
        "merge",
        help="write a weighted sum of averages or of checkpoints",
        description="SRCs oldest first. OUT ending in .safetensors or .pt is one file; else a folder that "
        "ShardedAverage.load reads.",
    )
    parser.add_argument("src", metavar="SRC", nargs="+")
    parser.add_argument("out", metavar="OUT", type=Path)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--weights", type=numbers, metavar="A,B,...", help="one for each SRC; divided by their sum")
    how.add_argument("--uniform", action="store_true", help="the mean")
    how.add_argument("--lawa", type=int, metavar="K", help="the mean of the last K (Kaddour 2022)")
    how.add_argument("--wsm", choices=tuple(WSM_SHAPES), help="in place of a decay (arXiv 2507.17634)")
    parser.add_argument("--accumulate", choices=("fp64", "fp32"), default="fp64", help="dtype of the sum")
    add_name(parser)
    add_dtype(parser)
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
            dtype=DTYPES[args.dtype],
            report=report,
        )
