"""The command line where torch is absent, broken or too old: one line that says so, or `doctor`.

`sharded-avg` and `python -m sharded_avg` import the package before any code of their own runs. So the package calls
this while it is imported, when it has to raise: only here is it known whether somebody waits for a command line.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from ..errors import ShardedAvgError
from ..version import __version__
from . import doctor
from .progress import say

_FAILED = 1
_SCRIPTS = ("sharded-avg", "sharded-avg.exe", "sharded-avg-script.py")  # what installers call it


def exit_if_started(error: ImportError) -> None:
    """Do what the command line can do without torch, and exit, if this process was started as one; else return."""
    if not _is_started():
        return
    arguments = sys.argv[1:]
    if arguments == ["--version"]:
        print(f"sharded-avg {__version__}")
        sys.exit(0)
    if arguments[:1] != ["doctor"]:
        say(str(error))
        sys.exit(_FAILED)
    parser = argparse.ArgumentParser(prog="sharded-avg")
    doctor.add_to(parser.add_subparsers())
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except BrokenPipeError:  # `sharded-avg doctor | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ShardedAvgError, OSError) as failure:
        say(str(failure))
        sys.exit(_FAILED)
    sys.exit(0)


def _is_started() -> bool:
    """Whether by `python -m sharded_avg` or by the script that an installer made."""
    argv = getattr(sys, "argv", None) or [""]  # an embedded Python may have none
    if argv[0] == "-m":  # while Python looks for what it shall run
        before = sys.orig_argv[: len(sys.orig_argv) - len(argv) + 1]
        package = __package__.partition(".")[0]
        return re.search(rf"(^| )-[a-zA-Z]*m ?{package}$", " ".join(before)) is not None  # -m, -Im, -msharded_avg
    script = Path(argv[0])
    return script.name in _SCRIPTS and not script.is_dir()
