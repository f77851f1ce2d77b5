"""`python -m tests.gpu` works: what needs no GPU runs here on the CPU, and whatever happens to a child is told."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ..gpu import checks, report
from ..gpu.__main__ import chosen, main
from ..gpu.check import CHECKS, Check, CouldNotRun, Result, attempt
from ..gpu.parent import run_all

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
ROOMS_HERE = ("one process", "graphs", "speed")  # the others make process groups, and get a process of their own
OF_ENGINES = (
    *("engines.ddp", "engines.fsdp1_flat", "engines.fsdp2", "engines.tp"),
    *("trainer.one_device", "trainer.skipped_steps", "trainer.model_parallel"),
    *("zero.stage2_bf16", "zero.stage3_bf16"),
)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # said by the thread of an async_save
@pytest.mark.parametrize("name", [c.name for c in CHECKS.values() if c.room in ROOMS_HERE and not c.needs_gpu])
def test_checks_that_need_no_gpu(name: str) -> None:
    result = attempt(CHECKS[name], CPU)
    assert result.status == "ok", f"{result.text}\n{result.details}"


@pytest.mark.own_processes
def test_checks_of_engines(tmp_path: Path) -> None:
    """In one process of their own, which takes less time than the rooms that they have on a GPU."""
    results = tmp_path / "results"
    command = [sys.executable, "-m", "tests.gpu.child", str(results), "cpu", *OF_ENGINES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [record for record in map(json.loads, results.read_text().splitlines()) if "begun" not in record]
    assert [record["name"] for record in found] == list(OF_ENGINES)
    failed = [f"{record['name']}: {record['details']}" for record in found if record["status"] == "FAILED"]
    assert not failed, "\n".join(failed)


@pytest.mark.own_processes
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert "No GPU here: nothing was checked" in done.stdout
    assert f"torch {torch.__version__}" in done.stdout


def test_what_a_check_says() -> None:
    def raises(error: BaseException) -> Result:
        def run(device: torch.device) -> str:
            raise error

        return attempt(a_check("a", run=run), CPU)

    assert attempt(a_check("a"), CPU).status == "ok"
    assert attempt(a_check("a", needs_gpu=True), CPU).text == "needs a GPU"
    assert raises(CouldNotRun("no such thing")).status == "could not run"
    failed = raises(AssertionError("3 of 7 differ\nand more"))
    assert (failed.status, failed.text) == ("FAILED", "AssertionError: 3 of 7 differ")
    assert "Traceback" in failed.details


def a_check(
    name: str, room: str = "room", *, run: object = lambda device: None, needs_gpu: bool = False, limit_s: float = 30.0
) -> Check:
    return Check(name, room, "something", run, needs_gpu, limit_s)  # type: ignore[arg-type]


# What a child does, by the first word of a check's name.
CHILD = """
import json, os, sys, time
results, device, *names = sys.argv[1:]
with open(results, "a") as file:
    def say(**record):
        file.write(json.dumps(record) + "\\n")
        file.flush()
    for name in names:
        if name == "dies_between":
            print("no last words")
            os._exit(1)
        say(begun=name)
        if name == "crashes":
            print("last words")
            sys.stdout.flush()
            os._exit(9)
        if name == "hangs":
            time.sleep(60)
        say(name=name, status="ok", text=device, seconds=0.0, details="")
"""


def run_children(tmp_path: Path, names: list[Check], seconds: float = 60.0) -> dict[str, Result]:
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    told: list[Result] = []
    results = run_all(names, "cpu", time.monotonic() + seconds, told.append, [sys.executable, str(script)])
    assert told == results
    assert [result.name for result in results] == [check.name for check in names]
    return {result.name: result for result in results}


@pytest.mark.own_processes
def test_a_crash_and_a_hang_cost_one_check_each(tmp_path: Path) -> None:
    found = run_children(
        tmp_path,
        [
            *(a_check("first"), a_check("crashes"), a_check("second"), a_check("hangs", limit_s=0.5)),
            *(a_check("third"), a_check("dies_between", "another room"), a_check("fourth", "last room")),
        ],
    )
    assert [found[name].status for name in ("first", "second", "third", "fourth")] == ["ok"] * 4
    assert (found["crashes"].status, found["crashes"].text) == ("FAILED", "the process ended with code 9")
    assert "last words" in found["crashes"].details
    assert (found["hangs"].status, found["hangs"].text) == ("FAILED", "killed after 1 s")
    assert (found["dies_between"].status, found["dies_between"].text) == ("FAILED", "the process ended with code 1")


@pytest.mark.own_processes
def test_when_the_time_is_up(tmp_path: Path) -> None:
    found = run_children(tmp_path, [a_check("first"), a_check("hangs"), a_check("next", "another room")], seconds=2.0)
    assert found["first"].status == "ok"
    for name in ("hangs", "next"):
        assert (found[name].status, found[name].text) == ("could not run", "the time of this visit was over")


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    results = [
        Result("rules.ema", "ok", "equal | bits", 1.25),
        Result("rules.swa", "FAILED", "AssertionError: no", 0.5, "Traceback ..."),
        Result("zero.stage1_fp32", "could not run", "no deepspeed here", 0.0),
    ]
    lines = report.table(results).splitlines()
    assert all(line.count("|") == 5 for line in lines)
    assert "ok: equal / bits" in lines[2]
    assert report.summary(results, 7.0) == "3 checks: 1 ok, 1 FAILED, 1 could not run; 7 s"
    assert report.details(results) == "--- rules.swa\nTraceback ..."
    assert json.loads(report.to_json(results, 7.0))["machine"]["torch"] == torch.__version__
    assert main(["--list", "--only", "swaps"]) == 0
    assert "swaps.exceptions" in capsys.readouterr().out


def test_names() -> None:
    assert checks
    assert [check.name for check in chosen(["rules.ema"])] == ["rules.ema", "rules.ema_warmup", "rules.ema_half_life"]
    assert {check.name for check in chosen(None)} == CHECKS.keys()
    assert [check.room for check in chosen(["suite", "rules.ema"])][-1] == "suite"
    with pytest.raises(SystemExit):
        main(["--only", "nothing"])
