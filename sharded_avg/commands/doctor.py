"""`sharded-avg doctor`: what this environment has for this package, what it lacks, and what to do about it.

examine   -> Findings, one for each thing that was looked at
table     those -> text

Whatever may hang, print, compile or end a process is tried in a process of its own: a process group, an op of
DeepSpeed's. Those have `wait` seconds together, and are ended with all that they started when these are over. Versions
are read from what installers wrote; no trainer is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..errors import EngineVersionError
from ..version import WORKS_WITH, __version__, is_too_old, requirement
from .progress import say

OK, ABSENT, FAILS = "ok", "absent", "fails"
_TRAINERS = {"lightning": "sharded_avg.lightning", "deepspeed": "ZeRO"}
_OPTIONAL = {  # package -> (what it is for, the extra that brings it)
    "numpy": ("`.numpy()` of tensors; nothing here needs it", ""),
    "safetensors": ("other programs' files; this package reads and writes safetensors itself", "safetensors"),
    "tqdm": ("progress bars of the command line", "progress"),
    "matplotlib": ("curves of the examples", "plots"),
}
_PROCESS_GROUP = """
import torch, torch.distributed as dist
dist.init_process_group("{backend}", store=dist.HashStore(), rank=0, world_size=1)
ones = torch.ones(3, device="{device}")
dist.all_reduce(ones)
print(ones.sum().item())
dist.destroy_process_group()
"""
# What DeepSpeed compiles where its ranks are processes on CPUs; on GPUs it compiles nothing before it is asked to.
# torch holds a file `lock` meanwhile, and waits for one that is there: for ever, where the build that made it was
# killed. So SIGTERM is left to ninja, which ends its compilers: the build then fails, and torch takes its lock away.
_OP = """
import signal, sys
from pathlib import Path
from torch.utils.cpp_extension import _get_build_directory
signal.signal(signal.SIGTERM, lambda *_: None)
lock = Path(_get_build_directory("deepspeed_shm_comm", False), "lock")
if lock.exists():
    sys.exit(f"{lock} is there: a build is running, or was killed and left it; DeepSpeed waits for it to go")
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
ShareMemCommBuilder().load(verbose=False)
"""
_WAIT = 300.0  # seconds: the op takes half a minute on an idle machine, and minutes on a busy one
_GRACE = 10.0  # seconds that a process has to end after SIGTERM


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `advice` says what to do, "" where nothing need be done."""

    about: str
    state: str  # OK, ABSENT or FAILS
    found: str
    advice: str = ""


def examine(*, quick: bool = False, wait: float = _WAIT) -> list[Finding]:
    """Look at everything; `quick` leaves out what starts processes, which take `wait` seconds together at most."""
    findings = [_python(), _torch(), _gpu(), *_engines()]
    findings += [_trainer("lightning"), _trainer("pytorch-lightning"), _trainer("deepspeed")]
    findings += [_optional(package) for package in _OPTIONAL]
    if not quick:
        end = time.monotonic() + wait
        findings += [_backend("gloo", "cpu", end), _backend("nccl", "cuda", end), _op(end)]
    return findings


def table(findings: list[Finding]) -> str:
    """The Findings for people: a line each, and below it what to do."""
    width = max(len(finding.about) for finding in findings)
    lines = [f"sharded-avg {__version__}"]
    for finding in findings:
        lines.append(f"  {finding.state:<6}  {finding.about:<{width}}  {finding.found}")
        if finding.advice:
            lines.append(f"          {'':<{width}}  -> {finding.advice}")
    return "\n".join(lines)


def _python() -> Finding:
    return Finding("python", OK, f"{platform.python_version()}, {sys.executable}")


def _torch() -> Finding:
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs"
    oldest, newest = WORKS_WITH["torch"]
    return Finding("torch", OK, f"{torch.__version__}, {build}; run with {oldest} to {newest}")


def _gpu() -> Finding:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Finding("GPU", OK, ", ".join(names))
    if torch.version.cuda:
        return Finding(
            "GPU", ABSENT, "none that torch sees: no driver, or no device", "nothing on a CPU; else install a driver"
        )
    return Finding("GPU", ABSENT, "this torch was built without CUDA", "nothing on a CPU; else install a CUDA build")


def _engines() -> Iterator[Finding]:
    yield Finding("one process", OK, "ShardedAverage(model, rule)")
    if not dist.is_available():
        yield Finding("DDP, FSDP, TP", ABSENT, "torch was built without torch.distributed", "install another build")
        return
    yield Finding("DDP", OK, "ShardedAverage(DistributedDataParallel(model), rule)")
    for name, module, attribute in (
        ("FSDP1", "torch.distributed.fsdp", "FullyShardedDataParallel"),
        ("FSDP2", "torch.distributed.fsdp", "FSDPModule"),
        ("TP", "torch.distributed.tensor", "DTensor"),
        ("saving", "torch.distributed.checkpoint", "DefaultSavePlanner"),
    ):
        try:
            getattr(__import__(module, fromlist=[attribute]), attribute)
            yield Finding(name, OK, f"{module}.{attribute}")
        except (ImportError, AttributeError) as error:
            yield Finding(name, FAILS, f"{module}.{attribute}: {error}", f"pip install '{requirement('torch')}'")


def _trainer(package: str) -> Finding:
    """Lightning under either of its names, or DeepSpeed."""
    known = "deepspeed" if package == "deepspeed" else "lightning"
    version = _version_of(package)
    if version is None:
        return Finding(package, ABSENT, f"needed for {_TRAINERS[known]} only", f"pip install 'sharded-avg[{known}]'")
    oldest, newest = WORKS_WITH[known]
    if is_too_old(known, version):
        return Finding(package, FAILS, f"{version}, older than {oldest}", f"pip install '{requirement(known)}'")
    return Finding(package, OK, f"{version}; run with {oldest} to {newest}")


def _optional(package: str) -> Finding:
    use, extra = _OPTIONAL[package]
    version = _version_of(package)
    if version is None:
        return Finding(package, ABSENT, f"for {use}", f"pip install 'sharded-avg[{extra}]'" if extra else "")
    return Finding(package, OK, version)


def _backend(backend: str, device: str, end: float) -> Finding:
    """A process group of one rank, in a process of its own: it may wait for a network that is not there."""
    if not (dist.is_available() and dist.is_backend_available(backend)):
        return Finding(
            backend, ABSENT, "torch was built without it", "" if device == "cuda" else "install another build"
        )
    if device == "cuda" and not torch.cuda.is_available():
        return Finding(backend, ABSENT, "it needs a GPU")
    failure = _try(_PROCESS_GROUP.format(backend=backend, device=device), end)
    if not failure:
        return Finding(backend, OK, "a process group of one rank sums")
    interface = "GLOO_SOCKET_IFNAME=lo" if backend == "gloo" else "NCCL_DEBUG=INFO, and NCCL_SOCKET_IFNAME"
    return Finding(backend, FAILS, failure, f"if it names a host or an interface, set {interface} (see `ip address`)")


def _op(end: float) -> Finding:
    """The op that DeepSpeed compiles at its first `initialize` on CPUs."""
    about = "DeepSpeed's op"
    if _version_of("deepspeed") is None:
        return Finding(about, ABSENT, "without DeepSpeed there is none")
    missing = [name for name in ("c++", "ninja") if not shutil.which(name)]
    say("DeepSpeed's op is compiled where that has not been done: half a minute to minutes")
    failure = _try(_OP, end)
    if not failure:
        return Finding(about, OK, "compiled, or was already: ranks on CPUs can be started", _of_two_ninjas())
    if missing:
        need = f"put {' and '.join(missing)} on the PATH: install them, or activate the environment that has them"
    elif "lock is there" in failure:
        need = "wait for the build, or, if none is running, delete that file"
    elif failure.startswith("not done"):
        need = "give a busy machine longer (--wait 1800); what had begun was ended"
    else:
        need = "read what the compiler says"
    return Finding(about, FAILS, failure, f"{need}; on GPUs it is not needed")


def _of_two_ninjas() -> str:
    """Two releases take each other's work for stale: ranks of a launcher that has the other compile for minutes."""
    own, found = shutil.which("ninja", path=str(Path(sys.executable).parent)), shutil.which("ninja")
    if own is None or found is None or Path(own).samefile(found):
        return ""
    return f"{found} compiled it, and {own} would again: activate the environment, so that all have one of them"


def _try(code: str, end: float) -> str:
    """Run Python code in a process of its own until `end`; the last line that it printed if it failed, else ""."""
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code],
        env={name: value for name, value in os.environ.items() if name != "PYTHONFAULTHANDLER"},  # its stacks come last
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=max(0.0, end - began))
        except subprocess.TimeoutExpired:
            return f"not done within {end - began:.0f} s"
        finally:
            _end(process)
    lines = [line for line in said.splitlines() if line.strip()]
    return "" if process.returncode == 0 else (lines[-1] if lines else f"exit code {process.returncode}")


def _end(process: subprocess.Popen[str]) -> None:
    """End it, and what it started, which may go on for long and hold the pipe open."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(OSError):  # all have ended
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def add_to(commands: Any) -> None:
    """Add the subcommand to the parser's subparsers."""
    parser = commands.add_parser("doctor", help="say what this environment has and lacks, and what to do about it")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--quick", action="store_true", help="start no processes: no process group, no compiler")
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
