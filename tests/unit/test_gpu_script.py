"""`python -m tests.gpu` works: what needs no GPU runs here on the CPU, and whatever happens to a child is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ..gpu import checks, report
from ..gpu.__main__ import chosen, main
from ..gpu.check import CHECKS, Check, CouldNotRun, Result, attempt
from ..gpu.checks.suite import failures
from ..gpu.checks.two_ranks import report as report_of_pair
from ..gpu.pair import judge
from ..gpu.parent import run_all

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
ROOMS_HERE = ("one process", "graphs", "speed")  # the others make process groups, and get a process of their own
OF_ENGINES = ("engines.fsdp2", "trainer.skipped_steps", "zero.stage3_bf16")  # one of each room
THE_OTHERS = ("engines.ddp", "engines.fsdp1_flat", "engines.tp", "trainer.one_device", "trainer.model_parallel")
THE_OTHERS += ("zero.stage2_bf16",)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # said by the thread of an async_save
@pytest.mark.parametrize("name", [c.name for c in CHECKS.values() if c.room in ROOMS_HERE and not c.needs_gpu])
def test_checks_that_need_no_gpu(name: str) -> None:
    result = attempt(CHECKS[name], CPU)
    assert result.status == "ok", f"{result.text}\n{result.details}"


@pytest.mark.own_processes
@pytest.mark.parametrize(
    "names", [OF_ENGINES, pytest.param(THE_OTHERS, marks=pytest.mark.further)], ids=["cover", "others"]
)
def test_checks_of_engines(names: tuple[str, ...], tmp_path: Path) -> None:
    """In one process of their own, which takes less time than the rooms that they have on a GPU."""
    results = tmp_path / "results"
    command = [sys.executable, "-m", "tests.gpu.child", str(results), "cpu", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [record for record in map(json.loads, results.read_text().splitlines()) if "begun" not in record]
    assert [record["name"] for record in found] == list(names)
    failed = [f"{record['name']}: {record['details']}" for record in found if record["status"] == "FAILED"]
    assert not failed, "\n".join(failed)


@pytest.mark.own_processes
def test_with_an_old_torch_it_says_so_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import torch\ntorch.__version__ = '2.5.1'")
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("torch 2.5.1 is older than ")


@pytest.mark.own_processes
@pytest.mark.skipif(torch.cuda.is_available(), reason="what the script says where there is no GPU")
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


# What a rank does: its engine says how the proof ends, and how the control.
RANK = """
import faulthandler, os, signal, sys, time
folder, device, engine, part, rank = sys.argv[1:]
faulthandler.enable()
def gather_what_crashes():
    os.kill(os.getpid(), signal.SIGSEGV)
end = dict(zip(("proof", "control"), engine.split("_")))[part]
if end == "crashes":
    gather_what_crashes()
if end == "raises" and rank == "1":
    open(f"{folder}/rank1.why", "w").write("AssertionError: 3 of 7 differ")
    print("a traceback")
    sys.exit(1)
if end == "raises" or end == "hangs":
    time.sleep(60)
"""


@pytest.mark.own_processes
def test_a_pair_that_fails_is_judged_by_a_control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.gpu.pair.GRACE_S", 0.2)
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    names = ["passes_", "crashes_crashes", "crashes_passes", "raises_passes", "raises_crashes"]
    verdicts = judge(names, "cpu", [sys.executable, str(script)])

    def told(name: str) -> Result:
        return attempt(a_check(name, run=lambda device: report_of_pair(name, verdicts[name], device)), CPU)

    assert told("passes_").status == "ok"
    lost = told("crashes_crashes")
    assert (lost.status, lost.text[:33]) == ("could not run", "torch's own crashes_crashes over ")
    assert "(control, without sharded_avg: signal 11 in gather_what_crashes (rank.py:" in lost.text
    ours = told("crashes_passes")
    assert ours.status == "FAILED"
    assert ours.text.startswith("AssertionError: signal 11 in gather_what_crashes (rank.py:")
    assert ours.text.endswith("; a control, without sharded_avg, passed")
    assert "Fatal Python error: Segmentation fault" in ours.details
    raised = told("raises_passes")
    assert raised.text == "AssertionError: AssertionError: 3 of 7 differ; a control, without sharded_avg, passed"
    assert "a traceback" in raised.details
    assert told("raises_crashes").status == "could not run"


@pytest.mark.own_processes
def test_pairs_that_have_no_time_left(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    verdicts = judge(["hangs_passes", "passes_"], "cpu", [sys.executable, str(script)], limit_s=-1)
    assert verdicts == {"hangs_passes": None, "passes_": None}
    with pytest.raises(CouldNotRun, match="not enough"):
        report_of_pair("passes_", None, CPU)


@pytest.mark.own_processes
def test_a_control_does_without_the_package() -> None:
    script = "import sys; from tests.gpu import rank; sys.exit('sharded_avg' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=120, check=True)


PYTEST_SAYS = """
FF.
=================================== FAILURES ===================================
______________________________ test_it[DataParallel] ______________________________
tests/unit/test_a.py:7: in test_it
    assert found == expected
E   AssertionError: tensor(1., device='cuda:0')
____________________________________ test_b ____________________________________
tests/unit/test_a.py:9: in test_b
E   KeyError: 'b'
=========================== short test summary info ============================
FAILED tests/unit/test_a.py::test_it[DataParallel] - AssertionError: tensor
FAILED tests/unit/test_a.py::test_b - KeyError: 'b'
2 failed, 1 passed in 0.1s
"""


def test_why_tests_failed_is_kept() -> None:
    lines = failures(PYTEST_SAYS).splitlines()
    assert lines[1] == "FAILED tests/unit/test_a.py::test_b - KeyError: 'b'"
    assert lines[2] == "--- test_it[DataParallel]"
    assert "E   AssertionError: tensor(1., device='cuda:0')" in lines
    assert lines[-1] == "E   KeyError: 'b'"
    assert failures("INTERNALERROR> what is this") == "INTERNALERROR> what is this"


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
