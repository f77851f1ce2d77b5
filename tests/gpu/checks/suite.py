"""The ordinary tests of one process, with this machine's torch and packages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from ..check import CouldNotRun, check, optional

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "tests" / "unit"
LIMIT_S = 150.0
WORKERS = 14
MAX_FAILURES = 10
MAX_LINES = 12  # of each


@check("the ordinary tests of one process pass here, too", room="suite", needs_gpu=True, limit_s=LIMIT_S)
def unit_tests(device: torch.device) -> str:
    for plugin in ("pytest", "pytest_timeout"):
        optional(plugin)
    if not FOLDER.is_dir():
        raise CouldNotRun(f"no folder {FOLDER.relative_to(ROOT)} here")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
        "--no-header",
        "--tb=short",
    ]
    try:
        optional("xdist")
        command += ["-n", str(min(WORKERS, os.cpu_count() or 1))]
    except CouldNotRun:
        pass
    ours = [str(FOLDER.relative_to(ROOT)), f"--ignore={(FOLDER / 'test_gpu_script.py').relative_to(ROOT)}"]
    with tempfile.TemporaryFile("w+") as output:
        try:
            code = subprocess.run(
                [*command, *ours], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=LIMIT_S - 10
            ).returncode
        except subprocess.TimeoutExpired as error:
            raise CouldNotRun(f"not done after {LIMIT_S - 10:.0f} s") from error
        output.seek(0)
        text = output.read()
    print(text)
    summary = next((line for line in reversed(text.splitlines()) if re.search(r"\d+ (passed|failed|error)", line)), "")
    if code:
        raise AssertionError(f"{summary.strip('= ') or f'pytest ended with code {code}'}\n{failures(text)}")
    return summary.strip("= ")


def failures(text: str) -> str:
    """Of what pytest says: the names of tests that failed, and the ends of their reports."""
    names = re.findall(r"^(?:FAILED|ERROR) .*", text, re.MULTILINE)
    reports = re.split(r"^_{3,} (.+?) _{3,}$", text, flags=re.MULTILINE)[1:]
    told = names[:MAX_FAILURES]
    for title, report in list(zip(reports[::2], reports[1::2], strict=True))[:MAX_FAILURES]:
        lines = re.split(r"^=+ ", report, maxsplit=1, flags=re.MULTILINE)[0].splitlines()
        told += [f"--- {title}", *[line[:300] for line in lines if line.strip()][-MAX_LINES:]]
    return "\n".join(told) or text[-1000:]
