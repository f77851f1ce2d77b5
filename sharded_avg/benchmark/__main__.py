"""`python -m sharded_avg.benchmark [--quick] [--json | --markdown]`: exit code 0 whatever the ratios are."""

from __future__ import annotations

import argparse
import gc
import sys
import warnings
from collections.abc import Callable
from functools import partial

import torch

from .growth import growth
from .local import cases
from .ranks import JOBS, Outcome, Settings, run
from .report import Report
from .timing import Case, clock_for, measure
from .weights import QUICK, Sizes

MANY = "many"


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m sharded_avg.benchmark", description=__doc__)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: does it run?")
    parser.add_argument("--rounds", type=int, help="times each contender is called (60; with --quick 5)")
    parser.add_argument("--threads", type=int, default=1, help="torch.set_num_threads (default 1)")
    keys = [key for key, _ in cases(QUICK)] + [MANY] + [job.key for job in JOBS]
    parser.add_argument(
        "--only", nargs="+", choices=keys, default=keys, metavar="CASE", help=f"any of: {' '.join(keys)}"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure, and print one report to stdout; progress goes to stderr."""
    options = arguments().parse_args(argv)
    warnings.simplefilter("ignore")  # rivals', about their own deprecations
    rounds = options.rounds or (5 if options.quick else 60)
    settings = Settings(QUICK if options.quick else Sizes(), rounds, options.threads)
    torch.set_num_threads(settings.num_threads)
    report = Report(clock_for(settings.num_threads)[0], settings.num_threads, settings.num_rounds, options.quick)
    measurements: dict[str, Callable[[], Outcome]]
    measurements = {key: partial(_here, build, settings) for key, build in cases(settings.sizes)}
    measurements[MANY] = lambda: Outcome(growth=growth(settings.sizes.many))
    measurements |= {job.key: partial(run, job, settings) for job in JOBS}
    for key, measured in measurements.items():
        if key not in options.only:
            continue
        print(f"{key} ...", file=sys.stderr, flush=True)
        try:
            outcome = measured()
        except ModuleNotFoundError as error:
            report.skipped[key] = str(error)
        else:
            report.add(outcome.timings, outcome.memory)
            report.growth += outcome.growth
        gc.collect()  # the next case needs the memory
    print(report.to_json() if options.json else report.to_markdown() if options.markdown else report.to_text())
    return 0


def _here(build: Callable[[], Case], settings: Settings) -> Outcome:
    case = build()
    clock = clock_for(settings.num_threads)[1]
    return Outcome(measure(case, num_rounds=settings.num_rounds, clock=clock), case.memory)


if __name__ == "__main__":
    sys.exit(main())
