"""Two ranks over gloo that share the device; nccl wants a GPU for each. One pair of processes for each engine."""

from __future__ import annotations

from functools import cache

import torch

from ..check import CouldNotRun, check
from ..engines import ENGINES
from ..pair import LIMIT_S, Verdict, Verdicts, judge

PAIRED = tuple(name for name in ENGINES if "offload" not in name)  # pinned memory is shown by one rank


def _enter(name: str) -> None:
    @check(
        "two ranks that share the device, over gloo: bits of weights that really are cut, swap, files",
        room="two ranks",
        limit_s=LIMIT_S + 20,
        name=name,
    )
    def pair(device: torch.device) -> None:
        report(name, _verdicts(device)[name], device)


for _name in PAIRED:
    _enter(_name)


@cache
def _verdicts(device: torch.device) -> Verdicts:
    """All pairs at once: the first row waits for them, and has their time."""
    return judge(PAIRED, str(device))


def report(name: str, verdict: Verdict | None, device: torch.device) -> None:
    """What torch's own engine cannot do without an average is no failure of the average."""
    if verdict is None:
        raise CouldNotRun(f"{LIMIT_S:.0f} s were not enough for all pairs")
    if verdict.proof and verdict.control:
        raise CouldNotRun(
            f"torch's own {name} over gloo on {device.type} fails (control, without sharded_avg: {verdict.control.why})"
        )
    if verdict.proof:
        raise AssertionError(f"{verdict.proof.why}; a control, without sharded_avg, passed\n{verdict.proof.log}")
