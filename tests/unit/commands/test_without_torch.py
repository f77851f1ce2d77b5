"""The command line where torch is absent, broken or too old: `doctor` says so, and all else is one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sharded_avg.version import WORKS_WITH, how_to_install

pytestmark = pytest.mark.own_processes
ROOT = Path(__file__).resolve().parents[3]
TORCHES = {  # kind -> (a file before all others on the path, what it has, what is said of it)
    "absent": ("sitecustomize.py", "import sys\nsys.modules['torch'] = None", "import of torch halted"),
    "broken": ("torch/__init__.py", "raise OSError('libcudart.so.12: not found')", "libcudart.so.12: not found"),
    "too old": ("sitecustomize.py", "import torch\ntorch.__version__ = '2.5.1'", "2.5.1, older than 2.8"),
}
A_SCRIPT = "import sys\nfrom sharded_avg.commands.cli import main\nsys.exit(main())"  # as an installer writes it


def run(folder: Path, kind: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Python, with such a torch. `folder` is on its path."""
    name, text, _ = TORCHES[kind]
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("started", ["module", "script"])
@pytest.mark.parametrize("kind", TORCHES)
def test_doctor(kind: str, started: str, tmp_path: Path) -> None:
    (tmp_path / "sharded-avg").write_text(A_SCRIPT)
    command = ["-m", "sharded_avg"] if started == "module" else [str(tmp_path / "sharded-avg")]
    done = run(tmp_path, kind, *command, "doctor", "--json")
    assert (done.returncode, done.stderr) == (1, "sharded-avg: torch will not work here; the table says what to do\n")
    found = {finding["about"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert found["torch"]["state"] == "fails"
    assert TORCHES[kind][2] in found["torch"]["found"]
    assert found["torch"]["advice"].endswith(f"'torch>=2.8,<={WORKS_WITH['torch'].newest}'")
    assert found["lightning"]["found"].endswith("not imported (torch comes first)")
    assert {"python", "deepspeed", "numpy"} < set(found)
    assert "gloo" not in found


def test_the_table(tmp_path: Path) -> None:
    done = run(tmp_path, "broken", "-W", "error", "-m", "sharded_avg", "doctor")
    assert done.returncode == 1
    assert done.stdout.splitlines()[0].startswith("sharded-avg ")
    assert "  fails   torch " in done.stdout


def test_other_commands(tmp_path: Path) -> None:
    done = run(tmp_path, "absent", "-m", "sharded_avg", "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("sharded-avg ")
    done = run(tmp_path, "absent", "-m", "sharded_avg", "inspect", "doctor")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("sharded-avg: sharded_avg ")
    assert line.endswith(f"; {how_to_install('torch')}")
    assert run(tmp_path, "absent", "-m", "sharded_avg", "doctor", "--slow").returncode == 2


@pytest.mark.parametrize("options", [["-msharded_avg"], ["-Bm", "sharded_avg"], ["-W", "error", "-m", "sharded_avg"]])
def test_each_way_to_name_the_module(options: list[str], tmp_path: Path) -> None:
    done = run(tmp_path, "absent", *options, "--version")
    assert (done.returncode, done.stdout[:12]) == (0, "sharded-avg ")


@pytest.mark.parametrize("argv", ["sys.argv = []", "del sys.argv", "sys.argv = ['']"])
def test_an_embedded_python_gets_the_error(argv: str, tmp_path: Path) -> None:
    program = f"import sys; {argv}\ntry: import sharded_avg\nexcept ImportError: print('told')"
    assert run(tmp_path, "absent", "-c", program).stdout == "told\n"


@pytest.mark.parametrize("command", [["-m", "tool"], ["-m", "tool.sub"], ["alone.py"], ["sharded-avg.py"]])
def test_others_that_have_a_doctor_get_the_error(command: list[str], tmp_path: Path) -> None:
    """Also while Python looks for the module that it shall run, and imports packages on the way."""
    (tmp_path / "tool").mkdir()
    for name in ("tool/__init__.py", "tool/__main__.py", "tool/sub.py", "alone.py", "sharded-avg.py"):
        (tmp_path / name).write_text("import sharded_avg")
    done = run(tmp_path, "absent", *command, "doctor")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("sharded_avg.errors.EngineVersionError: sharded_avg ")
