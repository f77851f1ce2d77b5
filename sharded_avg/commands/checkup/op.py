"""The op that DeepSpeed compiles at its first `initialize` on CPUs. On GPUs it compiles none before it is asked to."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from ...version import how_to_install
from ..progress import say
from .finding import ABSENT, FAILS, OK, Finding
from .trials import LONGER, attempt, ran_out_of_time, search_path

# torch holds a file `lock` meanwhile, and waits for one that is there: for ever, where the build that made it was
# killed. So SIGTERM is left to ninja, which ends its compilers: the build then fails, and torch takes its lock away.
# What fails before a compiler is started is said in words of our own.
_NO_FOLDER, _LOCKED, _NO_BUILDER = "no folder for what is compiled", "a build is running, or was killed", "no builder"
_BUILD = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as B; B().load()"
_OP = f"""
import os, signal, sys
from pathlib import Path
from torch.utils.cpp_extension import _get_build_directory
signal.signal(signal.SIGTERM, lambda *_: None)
try:
    folder = Path(_get_build_directory("deepspeed_shm_comm", False))
except OSError as error:
    sys.exit(f"{_NO_FOLDER}: {{error}}")
if not os.access(folder, os.W_OK):
    sys.exit(f"{_NO_FOLDER}: {{folder}} may not be written")
lock = folder / "lock"
if lock.exists():
    sys.exit(f"{{lock}} is there: {_LOCKED} and left it; DeepSpeed waits for it to go")
try:
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
except ImportError as error:
    sys.exit(f"{_NO_BUILDER}: {{error}}")
ShareMemCommBuilder().load(verbose=False)
"""


def op(deepspeed: Finding, end: float) -> Finding:
    """Whether it is compiled, or can be; `deepspeed` is what was found of the package."""
    about = "DeepSpeed's op"
    if deepspeed.state == ABSENT:
        return Finding(about, ABSENT, "without DeepSpeed there is none")
    if deepspeed.state == FAILS:
        return Finding(about, ABSENT, "not tried: DeepSpeed itself fails")
    say("DeepSpeed's op is compiled where that has not been done: half a minute to minutes")
    failure = attempt(_OP, end)
    if not failure:
        return Finding(about, OK, "compiled, or was already: ranks on CPUs can be started", _of_ninjas())
    return Finding(about, FAILS, failure, f"{_advice(failure)}; on GPUs it is not needed")


def _advice(failure: str) -> str:
    if failure.startswith(_NO_FOLDER):
        return "set TORCH_EXTENSIONS_DIR, or HOME, to a folder that can be written"
    if failure.startswith(_NO_BUILDER):
        return how_to_install("deepspeed")
    if _LOCKED in failure:
        return "wait for the build, or, if none is running, delete that file"
    if ran_out_of_time(failure):
        return LONGER
    missing = [name for name in ("c++", "ninja") if not shutil.which(name, path=search_path())]
    if missing:
        return f"put {' and '.join(missing)} on the PATH: install them, or activate the environment that has them"
    return f'read all that it says: python -c "{_BUILD}"'


def _of_ninjas() -> str:
    """Ranks look for ninja on the PATH, and two releases take each other's work for stale: minutes of compiling."""
    own, found = shutil.which("ninja", path=str(Path(sys.executable).parent)), shutil.which("ninja")
    if own is None or (found is not None and Path(own).samefile(found)):
        return ""
    if found is None:
        return f"{own} compiled it, and is not on the PATH, where ranks look for it: activate the environment"
    return f"{own} compiled it, and {found} would again: activate the environment, so that all have one of them"
