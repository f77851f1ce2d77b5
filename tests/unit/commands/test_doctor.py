"""`sharded-avg doctor`: what it finds, what it advises, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from sharded_avg.commands.checkup import engines, packages, trials
from sharded_avg.commands.checkup import op as op_of_deepspeed
from sharded_avg.commands.checkup.finding import Finding
from sharded_avg.commands.cli import main
from sharded_avg.version import WORKS_WITH, how_to_install

ROOT = Path(__file__).resolve().parents[3]


def in_a_minute() -> float:
    return time.monotonic() + 60


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
    monkeypatch.setattr(packages, "installed_version", lambda package: None)
    assert main(["doctor", "--quick"]) == 0  # what is absent is no failure
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("sharded-avg ")
    for package in ("lightning", "pytorch-lightning", "deepspeed", "safetensors", "tqdm", "matplotlib"):
        assert sum(line.endswith(f"-> {how_to_install(package)}") for line in lines) == 1


def test_what_is_too_old_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to install, on both streams and in the exit code."""
    monkeypatch.setattr(packages, "installed_version", lambda package: "0.9.0" if package == "deepspeed" else None)
    assert main(["doctor", "--quick", "--json"]) == 1
    out, err = capsys.readouterr()
    said = json.loads(out)
    (wrong,) = [finding for finding in said["findings"] if finding["state"] == "fails"]
    oldest, newest = WORKS_WITH["deepspeed"]
    assert wrong == {
        "about": "deepspeed",
        "state": "fails",
        "found": f"0.9.0, older than {oldest}",
        "advice": "pip install setuptools wheel ninja && "
        f"DS_BUILD_OPS=0 pip install --no-build-isolation 'deepspeed>={oldest},<={newest}'",
    }
    assert said["ok"] is False
    assert err == "sharded-avg: deepspeed will not work here; the table says what to do\n"


@pytest.mark.own_processes
def test_a_process_group_is_tried() -> None:
    assert engines.process_group("gloo", "cpu", time.monotonic() + 60).state == "ok"
    nccl = engines.process_group("nccl", "cuda", time.monotonic() + 60)
    assert nccl.state == ("ok" if torch.cuda.is_available() else "absent")


@pytest.mark.own_processes
def test_what_is_tried_and_fails_or_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONFAULTHANDLER", "1")
    end = time.monotonic() + 60
    assert trials.attempt("import sys; print('first'); sys.exit('the reason')", end) == "the reason"
    assert trials.attempt("import os; os.abort()", end) == "exit code -6"
    assert trials.attempt("import time; time.sleep(60)", time.monotonic() + 0.1) == "not done within 0 s"
    assert trials.attempt("print('fine')", end) == ""


# As torch builds an op: a lock that it takes away when the compiler that it started has ended, well or not.
A_BUILD = """
import pathlib, signal, subprocess, sys
signal.signal(signal.SIGTERM, lambda *_: None)
lock = pathlib.Path({lock!r})
lock.touch()
subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"])
lock.unlink()
sys.exit("error building")
"""


@pytest.mark.own_processes
@pytest.mark.parametrize("stopped", [False, True], ids=["time_is_over", "ctrl_c"])
def test_a_build_that_hangs_is_ended_with_its_compiler(
    stopped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had gone on for minutes, and left its lock when it was killed, which DeepSpeed then waited for without end."""
    lock, began = tmp_path / "lock", time.monotonic()
    until_compiling(lock, monkeypatch, stopped)
    code = A_BUILD.format(lock=str(lock))
    if stopped:
        with pytest.raises(KeyboardInterrupt):
            trials.attempt(code, time.monotonic() + 60)
    else:
        assert trials.attempt(code, time.monotonic() + 60).startswith("not done within ")
    assert not lock.exists()
    assert time.monotonic() - began < 30


def until_compiling(lock: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool) -> None:
    """Stand in for the time of a try, or for Ctrl-C: it is over half a second after the build has begun."""

    def communicate(self: subprocess.Popen[str], timeout: float) -> tuple[str, None]:
        while not lock.exists():
            time.sleep(0.05)
        time.sleep(0.5)
        raise KeyboardInterrupt if stopped else subprocess.TimeoutExpired("", timeout)

    monkeypatch.setattr(subprocess.Popen, "communicate", communicate)


def all_of_it(extensions: Path, *arguments: str, **environment: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """The whole command, with ops of DeepSpeed in a folder of their own; exit code and findings."""
    done = subprocess.run(
        [sys.executable, "-m", "sharded_avg", "doctor", "--json", *arguments],
        cwd=ROOT,
        env=os.environ | {"TORCH_EXTENSIONS_DIR": str(extensions)} | environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    return done.returncode, {finding["about"]: finding for finding in json.loads(done.stdout)["findings"]}


@pytest.mark.further
@pytest.mark.own_processes
def test_all_of_it() -> None:
    """Compiles DeepSpeed's op where that has not been done."""
    code, found = all_of_it(Path(os.environ["TORCH_EXTENSIONS_DIR"]))
    assert code == 0
    assert found["DeepSpeed's op"]["state"] == found["gloo"]["state"] == "ok"


@pytest.mark.own_processes
def test_the_lock_of_a_build_is_told_and_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    told = op_of_deepspeed.op(packages.trainer("deepspeed"), in_a_minute())
    assert told.state == "fails"
    assert told.found.startswith(f"{lock} is there: a build is running, or was killed")
    assert told.advice.startswith("wait for the build, or, if none is running, delete that file")
    assert lock.exists()  # another's


def test_another_ninja_on_the_path_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert op_of_deepspeed._of_ninjas() == ""  # here ranks and commands have this environment's
    (tmp_path / "ninja").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert op_of_deepspeed._of_ninjas().startswith(f"{Path(sys.executable).parent / 'ninja'} compiled it, and")
    (tmp_path / "ninja").unlink()
    assert "is not on the PATH, where ranks look for it" in op_of_deepspeed._of_ninjas()


@pytest.mark.own_processes
def test_what_is_tried_finds_the_programs_of_this_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it was not activated: ninja was advised to those who had it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    name = Path(sys.executable).name
    assert trials.attempt(f"import shutil, sys; sys.exit(shutil.which({name!r}))", in_a_minute()) == sys.executable


@pytest.mark.own_processes
@pytest.mark.parametrize(
    ("package", "error", "advice"),
    [
        ("lightning", ImportError("built for another torch"), "pip install --force-reinstall --no-deps 'lightning>=2"),
        (
            "pytorch-lightning",
            ModuleNotFoundError("No module named 'torchmetrics'"),
            "install what has the module torch",
        ),
        ("deepspeed", PermissionError(13, "Permission denied"), "it reads or writes there"),
        ("deepspeed", RuntimeError("no accelerator"), "pip install setuptools wheel ninja && DS_BUILD_OPS=0 pip"),
    ],
)
def test_a_trainer_that_cannot_be_imported_fails(
    package: str, error: Exception, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was ok by its metadata."""
    (tmp_path / package.replace("-", "_")).mkdir()
    (tmp_path / package.replace("-", "_") / "__init__.py").write_text(f"raise {error!r}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    told = packages.imported(packages.trainer(package), in_a_minute())
    assert told.state == "fails"
    assert told.found == f"{metadata.version(package)}, cannot be imported: {type(error).__name__}: {error}"
    assert told.advice.startswith(advice)


@pytest.mark.own_processes
def test_an_import_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deepspeed.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    told = packages.imported(packages.trainer("deepspeed"), time.monotonic() + 0.5)
    assert told.state == "fails"
    assert "not done within " in told.found
    assert "--wait" in told.advice


def test_quick_imports_nothing_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    found = findings(capsys)
    for package in packages.TRAINERS:
        assert found[package]["found"].endswith("not imported (--quick)")


@pytest.mark.own_processes
def test_the_op_where_no_compiler_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is told to read what it says."""
    deepspeed = Finding("deepspeed", "ok", "0.19.8")
    with monkeypatch.context() as patch:
        patch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        patch.delenv("XDG_CACHE_HOME", raising=False)
        patch.setenv("HOME", "/proc/nowhere")
        told = op_of_deepspeed.op(deepspeed, in_a_minute())
    assert told.state == "fails"
    assert told.found.startswith("no folder for what is compiled: [Errno 2] No such file or directory: '/proc/nowhere")
    assert told.advice.startswith("set TORCH_EXTENSIONS_DIR, or HOME, to a folder that can be written")
    (tmp_path / "deepspeed.py").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    told = op_of_deepspeed.op(deepspeed, in_a_minute())
    assert told.found.startswith("no builder: No module named 'deepspeed.ops'")
    assert told.advice.startswith(how_to_install("deepspeed"))
    told = op_of_deepspeed.op(Finding("deepspeed", "fails", "0.19.8, cannot be imported"), in_a_minute())
    assert (told.state, told.advice) == ("absent", "")


@pytest.mark.further
@pytest.mark.own_processes
def test_it_ends_in_time_where_the_compiler_hangs(tmp_path: Path) -> None:
    """With a real build, whose lock is gone afterwards, and whose compilers are."""
    compiler = tmp_path / "compiler"
    compiles = f"for word; do [ $word = -c ] && echo $$ >> {tmp_path}/pids && exec sleep 250; done"
    compiler.write_text(f'#!/bin/bash\n{compiles}\nexec c++ "$@"\n')  # it may be asked for its version
    compiler.chmod(0o755)
    began = time.monotonic()
    code, found = all_of_it(tmp_path / "extensions", "--wait", "60", CXX=str(compiler))
    assert time.monotonic() - began < 120  # with the imports
    assert code == 1
    assert found["DeepSpeed's op"]["state"] == "fails"
    assert found["DeepSpeed's op"]["found"].startswith("not done within ")
    assert "--wait" in found["DeepSpeed's op"]["advice"]
    assert not list(tmp_path.rglob("lock"))
    pids = (tmp_path / "pids").read_text().split()  # it had come that far
    assert pids
    assert not [pid for pid in pids if Path("/proc", pid).exists()]
