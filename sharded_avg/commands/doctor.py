"""`sharded-avg doctor`: what this environment has for this package, what it lacks, and what to do about it.

examine   -> Findings, one for each thing that was looked at
table     those -> text

Whatever may hang, print, compile or end a process is tried in a process of its own: an import, a process group, an op
of DeepSpeed's. Those have `wait` seconds together, and are ended with all that they started when these are over.
Where torch is absent, broken or too old, this runs all the same (without_torch.py), and says what installers wrote.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from typing import Any

from ..errors import EngineVersionError
from ..version import __version__
from .checkup import packages
from .checkup.finding import FAILS, OK, Finding
from .checkup.op import op

_WAIT = 300.0  # seconds: the op takes half a minute on an idle machine, and minutes on a busy one


def examine(*, quick: bool = False, wait: float = _WAIT) -> list[Finding]:
    """Look at everything; `quick` leaves out what starts processes, which take `wait` seconds together at most."""
    end = time.monotonic() + wait
    torch, trainers = packages.torch(), [packages.trainer(package) for package in packages.TRAINERS]
    others = [packages.optional(package) for package in packages.OPTIONAL]
    if torch.state != OK:
        trainers = [packages.not_imported(trainer, "torch comes first") for trainer in trainers]
        return [packages.python(), torch, *trainers, *others]
    from .checkup import engines  # imports torch

    found = [packages.python(), torch, engines.gpu(), *engines.engines()]
    if quick:
        return [*found, *(packages.not_imported(trainer, "--quick") for trainer in trainers), *others]
    trainers = [packages.imported(trainer, end) for trainer in trainers]
    groups = [engines.process_group("gloo", "cpu", end), engines.process_group("nccl", "cuda", end)]
    deepspeed = next(trainer for trainer in trainers if trainer.about == "deepspeed")
    return [*found, *trainers, *others, *groups, op(deepspeed, end)]


def table(findings: list[Finding]) -> str:
    """The Findings for people: a line each, and below it what to do."""
    width = max(len(finding.about) for finding in findings)
    lines = [f"sharded-avg {__version__}"]
    for finding in findings:
        lines.append(f"  {finding.state:<6}  {finding.about:<{width}}  {finding.found}")
        if finding.advice:
            lines.append(f"          {'':<{width}}  -> {finding.advice}")
    return "\n".join(lines)


def add_to(commands: Any) -> None:
    """Add the subcommand to the parser's subparsers."""
    parser = commands.add_parser("doctor", help="say what this environment has and lacks, and what to do about it")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--quick", action="store_true", help="start no processes: import no trainer, compile nothing")
    parser.add_argument(
        "--wait",
        type=float,
        default=_WAIT,
        metavar="SECONDS",
        help="how long those may take together, a compiler most of it (default: %(default).0f)",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    findings = examine(quick=args.quick, wait=args.wait)
    failing = [finding.about for finding in findings if finding.state == FAILS]
    if args.json:
        print(json.dumps({"package": __version__, "ok": not failing, "findings": [*map(asdict, findings)]}, indent=1))
    else:
        print(table(findings))
    if failing:
        raise EngineVersionError(f"{', '.join(failing)} will not work here; the table says what to do")
