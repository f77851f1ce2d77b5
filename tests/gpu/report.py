"""The table, and what it was measured on."""

from __future__ import annotations

import json
import platform
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import PackageNotFoundError, version

import torch

from .check import CHECKS, Result

_PACKAGES = ("triton", "lightning", "pytorch-lightning", "deepspeed", "pytest", "numpy")


def machine() -> dict[str, str]:
    """Hardware and versions; "none" for a package that is not here."""
    found = {"date": date.today().isoformat(), "Python": platform.python_version(), "torch": torch.__version__}
    found |= {package: _version(package) for package in _PACKAGES}
    found["CUDA"] = torch.version.cuda or "none"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["GPU"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        found["driver"] = _driver()
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    else:
        found["GPU"] = "none"
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _driver() -> str:
    """As its own tool has it: no torch call tells."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split()[0]
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return "unknown"


def heading() -> str:
    return "; ".join(f"{name} {value}" for name, value in machine().items())


def line(result: Result) -> str:
    """One row, as it comes."""
    return f"{result.status:<14} {result.name:<34} {result.seconds:6.1f} s  {result.text}"


def table(results: Sequence[Result]) -> str:
    """A pipe table: readable as it is, and in Markdown."""
    rows = [("check", "what it shows", "result", "seconds"), ("---", "---", "---", "---:")]
    for result in results:
        said = ": ".join(filter(None, [result.status, result.text])).replace("|", "/")
        rows.append((result.name, CHECKS[result.name].shows, said, f"{result.seconds:.1f}"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def summary(results: Sequence[Result], seconds: float) -> str:
    counts = Counter(result.status for result in results)
    told = ", ".join(f"{counts[status]} {status}" for status in ("ok", "FAILED", "could not run") if counts[status])
    return f"{len(results)} checks: {told or 'none'}; {seconds:.0f} s"


def details(results: Sequence[Result]) -> str:
    """Tracebacks and ends of logs of what failed."""
    return "\n\n".join(f"--- {r.name}\n{r.details.rstrip()}" for r in results if r.status == "FAILED" and r.details)


def to_json(results: Sequence[Result], seconds: float) -> str:
    rows = [{**asdict(result), "shows": CHECKS[result.name].shows} for result in results]
    return json.dumps({"machine": machine(), "seconds": seconds, "results": rows}, indent=2) + "\n"
