"""`sharded-avg window`: the mean of a stretch of training, out of two saved means of all that was before.

With S_a and S_b the means of the first a and b updates, (b S_b - a S_a) / (b - a) is the mean of updates a + 1 to b. So
one running SWA that is saved now and then has every window between two saves, and no ring of snapshots is needed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, ConfigError
from ..files.source import AbstractSource
from ..formats.open import StrPath
from ..saved.series import Series, Snapshot
from .arguments import DTYPES, add_allow_nonfinite, add_dtype
from .progress import Report, progress
from .sums.provenance import facts_of_sum
from .sums.snapshots import open_series, summed_names, tell_rounding
from .sums.weighted_sum import WeightedSum
from .target import Target, guess_format, some_of


def window(
    folder: StrPath,
    target: Target,
    first: int,
    last: int,
    *,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    allow_nonfinite: bool = False,
    report: Report | None = None,
) -> AbstractSource:
    """Write the mean of the updates after step `first` and up to step `last`, at both of which `folder` has saves.

    The sum is in float64. What is not averaged is the later save's. `name` chooses among several equal-weight averages.
    Raises `CheckpointError` for steps that were not saved, rules of other weights and saves of two runs, and
    `ConfigError` if `first` is not before `last`. Returns what was written.
    """
    if not 0 <= first < last:
        raise ConfigError(f"--from {first} --to {last}: a window goes from an earlier step to a later one")
    series = open_series(folder, target)
    before, after = (_saved_at(step, series, str(folder), name) for step in (first, last))
    if before.name != after.name:
        raise CheckpointError(
            f"step {first} has the equal-weight average {before.name!r} and step {last} {after.name!r}: name one"
        )
    a, b = before.record.n_averaged, after.record.n_averaged
    updates = _updates_between(before, after)
    sources = [before.source(), after.source()]
    tell_rounding(sources, (a + b) / (b - a), f"take a longer window than {b - a} of {b} updates")
    weights = [-a / (b - a), b / (b - a)]
    summed = WeightedSum(
        sources, weights, dtype=dtype, allow_nonfinite=allow_nonfinite, summed=summed_names(sources[1])
    )
    facts = facts_of_sum([before.path, after.path], sources, weights, {"kind": "window", "from": first, "to": last})
    target.write(summed, {**facts, "n_averaged": b - a, "updates": updates, "rule": after.record.rule}, report)
    return summed


def _saved_at(step: int, series: Series, folder: str, name: str | None) -> Snapshot:
    """The equal-weight average of a step."""
    here = [snapshot for snapshot in series.snapshots if snapshot.step == step]
    if not here:
        raise CheckpointError(
            f"{folder!r} has no save of step {step}; it has steps {some_of(map(str, series.steps()))}"
        )
    named = [snapshot for snapshot in here if name in (None, snapshot.name)]
    if not named:
        raise CheckpointError(f"step {step} has no average {name!r}; it has {[snapshot.name for snapshot in here]}")
    equal = [snapshot for snapshot in named if snapshot.gamma == 0]
    if not equal:
        rules = ", ".join(f"{snapshot.name!r} is {snapshot.record.rule}" for snapshot in named)
        raise CheckpointError(
            f"step {step} has no average of equal weights ({rules}): a window is the difference of two plain means, "
            "which SWA() and PowerAverage(1) save"
        )
    if len(equal) > 1:
        raise CheckpointError(
            f"step {step} has several averages of equal weights: name one of {[s.name for s in equal]}"
        )
    return equal[0]


def _updates_between(before: Snapshot, after: Snapshot) -> list[list[int]]:
    """The steps in the window, as a manifest lists them. Raises `CheckpointError` if the saves are of two runs."""
    early, late = before.record, after.record
    inside = _clipped(late.updates, before.step + 1, after.step)
    listed = _count(late.updates) == late.n_averaged and _count(early.updates) == early.n_averaged
    goes_on = early.n_averaged < late.n_averaged and _count(inside) <= late.n_averaged - early.n_averaged
    if listed:  # a run of many irregular updates lists the last ones only
        goes_on = goes_on and _clipped(late.updates, 0, before.step) == _clipped(early.updates, 0, before.step)
    if not goes_on:
        raise CheckpointError(
            f"{str(after.path)!r} ({late.n_averaged} updates at {late.updates[:5]}) does not go on from "
            f"{str(before.path)!r} ({early.n_averaged} updates at {early.updates[:5]}): there is no update between "
            "them, or they are two runs, or an average that began anew"
        )
    return inside


def _clipped(updates: list[list[int]], low: int, high: int) -> list[list[int]]:
    """The updates at steps low..high, of lists [first, last, every]."""
    found = []
    for first, last, every in updates:
        first += max(0, -((first - low) // every)) * every
        last -= max(0, -((high - last) // every)) * every
        if first <= last:
            found.append([first, last, every if first < last else 1])
    return found


def _count(updates: list[list[int]]) -> int:
    return sum((last - first) // every + 1 for first, last, every in updates)


def add_to(commands: Any) -> None:
    """Add the subcommand to the parser's subparsers."""
    parser = commands.add_parser(
        "window",
        help="write the mean of a stretch of training, out of two saved means",
        description="The mean of the updates after step FROM and up to step TO, at both of which FOLDER has an average "
        "of equal weights (SWA). OUT ending in .safetensors or .pt is one file; else a folder that ShardedAverage.load "
        "reads.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="saved averages, in it or below it")
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--from", dest="first", type=int, required=True, metavar="STEP", help="of the earlier save")
    parser.add_argument("--to", dest="last", type=int, required=True, metavar="STEP", help="of the later save")
    parser.add_argument("--name", help="which average, where several have equal weights")
    add_dtype(parser)
    add_allow_nonfinite(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    with progress() as report:
        window(
            args.folder,
            Target(path=args.out, format=guess_format(args.out, "folder")),
            args.first,
            args.last,
            name=args.name,
            dtype=DTYPES[args.dtype],
            allow_nonfinite=args.allow_nonfinite,
            report=report,
        )
