"""Python, and what installers put beside it. Versions are those that installers wrote down: nothing is imported here.

A trial imports trainers: a version says nothing of a package that lacks another one, or was built for another torch.
"""

from __future__ import annotations

import platform
import re
import sys
from dataclasses import replace

from ...version import how_to_install, installed_version, is_too_old, require_torch, span_of
from .finding import ABSENT, FAILS, OK, Finding
from .trials import LONGER, attempt, ran_out_of_time

TRAINERS = {  # package -> (what is imported of it, what it is for)
    "lightning": ("lightning.pytorch", "sharded_avg.lightning"),
    "pytorch-lightning": ("pytorch_lightning", "sharded_avg.lightning"),
    "deepspeed": ("deepspeed", "ZeRO"),
}
OPTIONAL = {
    "numpy": "`.numpy()` of tensors; nothing here needs it",
    "safetensors": "other programs' files; this package reads and writes safetensors itself",
    "tqdm": "progress bars of the command line",
    "matplotlib": "curves of the examples, and --plot",
}


def python() -> Finding:
    """The interpreter that runs this."""
    return Finding("python", OK, f"{platform.python_version()}, {sys.executable}")


def torch() -> Finding:
    """The one thing that nothing here works without."""
    try:
        require_torch()
    except ImportError as error:
        return _without_torch(error.__cause__)
    import torch

    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs"
    return Finding("torch", OK, f"{torch.__version__}, {build}; {_run_with('torch')}")


def _without_torch(cause: BaseException | None) -> Finding:
    """`cause`: why it cannot be imported, or None for a version that is too old."""
    if cause is None:
        import torch

        found = f"{torch.__version__}, older than {span_of('torch').oldest}"
        return Finding("torch", FAILS, found, how_to_install("torch"))
    installed, failure = installed_version("torch"), " ".join(str(cause).split())
    if installed is None:
        return Finding("torch", FAILS, failure, how_to_install("torch"))
    return Finding("torch", FAILS, f"{installed}, cannot be imported: {failure}", how_to_install("torch", again=True))


def trainer(package: str) -> Finding:
    """Lightning under either of its names, or DeepSpeed."""
    version = installed_version(package)
    if version is None:
        return Finding(package, ABSENT, f"needed for {TRAINERS[package][1]} only", how_to_install(package))
    if is_too_old(package, version):
        return Finding(package, FAILS, f"{version}, older than {span_of(package).oldest}", how_to_install(package))
    return Finding(package, OK, f"{version}; {_run_with(package)}")


def imported(found: Finding, end: float) -> Finding:
    """What becomes of a trainer that was found when it is imported, in a process of its own."""
    if found.state != OK:
        return found
    failure = attempt(f"import {TRAINERS[found.about][0]}", end)
    if not failure:
        return found
    version = found.found.partition(";")[0]
    return replace(
        found, state=FAILS, found=f"{version}, cannot be imported: {failure}", advice=_advice(found.about, failure)
    )


def not_imported(found: Finding, why: str) -> Finding:
    """The same, where that is not tried."""
    return replace(found, found=f"{found.found}; not imported ({why})") if found.state == OK else found


def optional(package: str) -> Finding:
    """What is used where it is there."""
    version = installed_version(package)
    if version is None:
        return Finding(
            package, ABSENT, f"for {OPTIONAL[package]}", "" if package == "numpy" else how_to_install(package)
        )
    return Finding(package, OK, version)


def _advice(package: str, failure: str) -> str:
    if ran_out_of_time(failure):
        return LONGER
    missing = re.match(r"ModuleNotFoundError: No module named '(\w+)'", failure)
    if missing and missing[1] not in TRAINERS[package][0].split("."):
        return f"install what has the module {missing[1]}, or {package} anew, which should bring it"
    if re.match(r"(FileNotFound|Permission|NotADirectory|OS)Error: \[Errno", failure):
        return "it reads or writes there when it is imported: make that possible; HOME has to be a folder of yours"
    return f"{how_to_install(package, again=True)}, or the same with what the error names"


def _run_with(package: str) -> str:
    return "run with {} to {}".format(*span_of(package))
