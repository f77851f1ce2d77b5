"""`sharded-avg posthoc`: choose the horizon of a power average after training, out of what was saved of a few others.

Karras et al. (EDM2), 2023, arXiv 2312.02696, section 3.2: the profile of the average that is wanted is met, in least
squares, by a sum of the profiles of saved ones (rules/power_profiles.py), and so are its weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..files.source import AbstractSource
from ..rules.power_profiles import Mixture, sigma_rel_of
from ..saved.series import Series, Snapshot
from .arguments import DTYPES, add_allow_nonfinite, add_dtype
from .inspect import columns
from .progress import Report, progress, say
from .sums.profile_plot import draw_profiles, require_matplotlib
from .sums.provenance import facts_of_sum
from .sums.snapshots import open_series, summed_names, tell_rounding
from .sums.weighted_sum import WeightedSum
from .target import Target, guess_format

LISTED = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.10, 0.12, 0.15, 0.20, 0.25, 0.28)
LARGE_ERROR = 0.05


def write_mixed(
    snapshots: Sequence[Snapshot],
    mixture: Mixture,
    target: Target,
    *,
    dtype: torch.dtype | None = None,
    allow_nonfinite: bool = False,
    report: Report | None = None,
) -> AbstractSource:
    """Write the sum of the snapshots, in float64, and return it. What is not averaged is the last save's.

    Raises `CheckpointError` for saves that do not fit each other.
    """
    sources = [snapshot.source() for snapshot in snapshots]
    weights = mixture.coefficients
    tell_rounding(sources, mixture.amplification, "save averages nearer to what is wanted")
    summed = WeightedSum(
        sources, weights, dtype=dtype, allow_nonfinite=allow_nonfinite, summed=summed_names(sources[-1])
    )
    gamma = mixture.target.gamma
    rule = {"kind": "posthoc", "sigma_rel": round(sigma_rel_of(gamma), 9), "gamma": gamma, "error": mixture.error}
    target.write(summed, facts_of_sum([snapshot.path for snapshot in snapshots], sources, weights, rule), report)
    return summed


def summary(snapshots: Sequence[Snapshot], mixture: Mixture) -> str:
    """How well the profile is met, in words."""
    names = {snapshot.name for snapshot in snapshots}
    used = sum(1 for coefficient in mixture.coefficients if coefficient)
    last, off = snapshots[-1], _percent(mixture.error)
    return (
        f"sigma_rel {sigma_rel_of(mixture.target.gamma):.4g} at step {last.step} ({last.record.n_averaged} updates): "
        f"the profile is off by {off}, from {used} of {len(snapshots)} saves of {len(names)} averages; "
        f"their coefficients are {min(mixture.coefficients):.4g} to {max(mixture.coefficients):.4g}"
    )


def table(series: Series, step: int | None = None) -> str:
    """What was saved, and how well each width could be had."""
    snapshots = series.power_averages(step)
    saved = [["average", "sigma_rel", "saved at steps"]]
    for name in sorted({snapshot.name for snapshot in snapshots}):
        own = [snapshot for snapshot in snapshots if snapshot.name == name]
        widths = sorted({f"{sigma_rel_of(snapshot.gamma or 0.0):.4f}" for snapshot in own})
        steps = [str(snapshot.step) for snapshot in own]
        shown = steps if len(steps) <= 8 else [*steps[:3], "...", *steps[-3:]]
        saved.append([name, ", ".join(widths), f"{', '.join(shown)} ({len(steps)})"])
    reached = [["sigma_rel", "profile off by", "coefficients"]]
    for sigma_rel in LISTED:
        _, mixture = series.mixed(sigma_rel, step)
        span = f"{min(mixture.coefficients):.3g} to {max(mixture.coefficients):.3g}"
        reached.append([f"{sigma_rel:.2f}", _percent(mixture.error), span])
    lines = [*columns(saved), "", f"at step {snapshots[-1].step}", *columns(reached)]
    # Names come from a file that anyone may have made: no control characters reach the terminal.
    return "\n".join("".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in lines)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share >= 1e-6 else "0 %"


def add_to(commands: Any) -> None:
    """Add the subcommand to the parser's subparsers."""
    parser = commands.add_parser(
        "posthoc",
        help="choose the horizon of a power average after training",
        description="Mixes the power averages (PowerAverage, SWA) that were saved in FOLDER or below it. OUT ending in "
        ".safetensors or .pt is one file; else a folder that ShardedAverage.load reads.",
    )
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("out", metavar="OUT", type=Path, nargs="?", help="may be left out with --list or --plot")
    parser.add_argument("--sigma-rel", type=float, metavar="WIDTH", help="of training so far, such as 0.12 (EDM2)")
    parser.add_argument("--step", type=int, metavar="S", help="use saves up to this one; the last, if left out")
    parser.add_argument("--list", action="store_true", help="show what was saved, and what could be had")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the wanted and the reached profile")
    add_dtype(parser)
    add_allow_nonfinite(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    if args.sigma_rel is None and not args.list:
        raise ConfigError("--sigma-rel is needed: 0.05 to 0.15 are common; --list shows what could be had")
    if args.out is None and args.plot is None and not args.list:
        raise ConfigError("OUT is needed, unless there is --list or --plot")
    if args.plot is not None:
        require_matplotlib()
    target = None if args.out is None else Target(path=args.out, format=guess_format(args.out, "folder"))
    series = open_series(args.folder, target)
    if args.list:
        print(table(series, args.step))
    if args.sigma_rel is None:
        return
    snapshots, mixture = series.mixed(args.sigma_rel, args.step)
    if args.step not in (None, snapshots[-1].step):
        say(f"step {args.step} was not saved: the last one before it is {snapshots[-1].step}")
    if mixture.error > LARGE_ERROR:
        widths = sorted({f"{sigma_rel_of(snapshot.gamma or 0.0):.2f}" for snapshot in snapshots})
        say(
            f"the profile is missed by {_percent(mixture.error)}: save more often, or averages nearer to it than "
            f"{', '.join(widths)}"
        )
    if args.plot is not None:
        draw_profiles(mixture, args.plot)
    if target is not None:
        with progress() as report:
            write_mixed(
                snapshots,
                mixture,
                target,
                dtype=DTYPES[args.dtype],
                allow_nonfinite=args.allow_nonfinite,
                report=report,
            )
    print(summary(snapshots, mixture))
