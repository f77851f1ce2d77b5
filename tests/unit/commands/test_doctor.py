"""`sharded-avg doctor`: what it finds, what it advises, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from sharded_avg.commands import doctor
from sharded_avg.commands.cli import main
from sharded_avg.version import WORKS_WITH

ROOT = Path(__file__).resolve().parents[3]


def findings(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, Any]]:
    assert main(["doctor", "--json", "--quick", *arguments]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] is True
    return {finding["about"]: finding for finding in said["findings"]}


def test_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    found = findings(capsys)
    assert found["torch"]["found"].startswith(f"{torch.__version__}, built for ")
    for name in ("one process", "DDP", "FSDP1", "FSDP2", "TP", "saving"):
        assert (found[name]["state"], found[name]["advice"]) == ("ok", "")
    for package in ("lightning", "pytorch-lightning", "deepspeed"):
        assert found[package]["state"] == "ok"
        assert found[package]["found"].startswith(metadata.version(package))
    assert found["GPU"]["state"] == ("ok" if torch.cuda.is_available() else "absent")


def test_for_people(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version_of", lambda package: None)
    assert main(["doctor", "--quick"]) == 0  # what is absent is no failure
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("sharded-avg ")
    assert sum("pip install 'sharded-avg[deepspeed]'" in line for line in lines) == 1
    for extra in ("lightning", "safetensors", "progress", "plots"):
        assert any(f"pip install 'sharded-avg[{extra}]'" in line for line in lines)


def test_what_is_too_old_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to install, on both streams and in the exit code."""
    monkeypatch.setattr(doctor, "_version_of", lambda package: "0.9.0" if package == "deepspeed" else None)
    assert main(["doctor", "--quick", "--json"]) == 1
    out, err = capsys.readouterr()
    said = json.loads(out)
    (wrong,) = [finding for finding in said["findings"] if finding["state"] == "fails"]
    oldest, newest = WORKS_WITH["deepspeed"]
    assert wrong == {
        "about": "deepspeed",
        "state": "fails",
        "found": f"0.9.0, older than {oldest}",
        "advice": f"pip install 'deepspeed>={oldest},<={newest}'",
    }
    assert said["ok"] is False
    assert err == "sharded-avg: deepspeed will not work here; the table says what to do\n"


@pytest.mark.own_processes
def test_a_process_group_is_tried() -> None:
    assert doctor._backend("gloo", "cpu").state == "ok"
    assert doctor._backend("nccl", "cuda").state == ("ok" if torch.cuda.is_available() else "absent")


@pytest.mark.own_processes
def test_what_is_tried_and_fails_or_hangs() -> None:
    assert doctor._try("import sys; print('first'); sys.exit('the reason')", timeout=60) == "the reason"
    assert doctor._try("import os; os.abort()", timeout=60) == "exit code -6"
    assert doctor._try("import time; time.sleep(60)", timeout=0.1) == "nothing within 0 s"
    assert doctor._try("print('fine')", timeout=60) == ""


@pytest.mark.further
@pytest.mark.own_processes
def test_all_of_it() -> None:
    """Compiles DeepSpeed's op where that has not been done."""
    done = subprocess.run(
        [sys.executable, "-m", "sharded_avg", "doctor", "--json"], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    found = {finding["about"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert found["DeepSpeed's op"]["state"] == found["gloo"]["state"] == "ok"
