"""`python -m tests.gpu [--only NAME ...] [--json FILE]`: 0 if nothing failed, 1 otherwise.

It runs from a checkout, installs nothing, and takes at most six minutes. What needs a package that is not here says
so. Without a GPU it says so, and nothing is checked; `--device cpu` runs what needs none.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

try:
    import sharded_avg  # noqa: F401
except ImportError as error:  # no torch, or one that is too old: it says what to install
    sys.exit(str(error))

import torch

from . import checks, report
from .check import CHECKS, ROOMS, Check, Result
from .parent import run_all

BUDGET_S = 345.0  # of six minutes; the rest is for the start and the end


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="checks, or their first letters: swaps, rules.ema")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it there, too")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for what needs no GPU")
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="SECONDS", help=f"default {BUDGET_S:.0f}")
    parser.add_argument("--list", action="store_true", help="names and what they show; nothing is run")
    return parser


def chosen(only: list[str] | None) -> list[Check]:
    """In the order in which they run."""
    found = [check for name, check in CHECKS.items() if not only or any(name.startswith(part) for part in only)]
    return sorted(found, key=lambda check: ROOMS.index(check.room))


def main(argv: list[str] | None = None) -> int:
    """Run, and print one table to stdout; progress goes to stderr."""
    start = time.monotonic()
    parser = arguments()
    options = parser.parse_args(argv)
    picked = chosen(options.only)
    if not picked:
        parser.error(f"--only {' '.join(options.only)}: no check begins with that; see --list")
    if options.list:
        print("\n".join(f"{check.name:<34} {check.shows}" for check in picked))
        return 0
    print(report.heading(), flush=True)
    if options.device != "cpu" and not torch.cuda.is_available():
        print("No GPU here: nothing was checked. `--device cpu` runs what needs none.")
        return 0
    results = run_all(picked, options.device, start + options.budget, _tell)
    seconds = time.monotonic() - start
    parts = [report.table(results), report.details(results), report.summary(results, seconds)]
    print("\n\n".join(filter(None, parts)), flush=True)
    if options.json:
        options.json.write_text(report.to_json(results, seconds))
    return int(any(result.status == "FAILED" for result in results))


def _tell(result: Result) -> None:
    print(report.line(result), file=sys.stderr, flush=True)


if __name__ == "__main__":
    assert checks, "imported for what it enters into CHECKS"
    sys.exit(main())
