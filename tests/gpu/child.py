"""`python -m tests.gpu.child RESULTS DEVICE NAME...`: runs some checks, in this process.

RESULTS is a file of one JSON object a line: {"begun": NAME} before each check and its Result after it, so that the
parent knows what was done when this process hangs or dies.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from . import checks
from .check import CHECKS, Result, attempt
from .devices import chosen

BROKEN = 3  # exit code: the GPU's context is lost, and with it all further checks of this process


def main(results: str, device_name: str, *names: str) -> int:
    """Run the checks in their order."""
    device = chosen(device_name)
    with Path(results).open("a") as file:
        return _run(names, device, file)


def _run(names: Iterable[str], device: torch.device, file: Any) -> int:
    for name in names:
        _write(file, {"begun": name})
        torch.manual_seed(0)
        result = attempt(CHECKS[name], device)
        _write(file, asdict(result))
        if _is_lost(result):
            return BROKEN
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return 0


def _write(file: Any, record: dict[str, Any]) -> None:
    file.write(json.dumps(record) + "\n")
    file.flush()


def _is_lost(result: Result) -> bool:
    """Whether a kernel failed: then every later call fails, too."""
    return result.status == "FAILED" and "CUDA error" in result.text


if __name__ == "__main__":
    assert checks, "imported for what it enters into CHECKS"
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what is not worth waiting for: threads of process groups, workers of compilers
