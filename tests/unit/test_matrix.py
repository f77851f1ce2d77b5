"""The README's table of versions: rows come from reports, and rows of runs made elsewhere stay."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests import matrix

SUITE = """<testsuites><testsuite timestamp="2026-01-02T03:04:05">
<testcase classname="tests.test_zero" name="a"/><testcase classname="tests.test_zero" name="b"><failure/></testcase>
<testcase classname="tests.other" name="c"/><testcase classname="tests.other" name="d"><skipped/></testcase>
</testsuite></testsuites>"""
ELSEWHERE = """
| | Python | torch | Lightning | DeepSpeed | unit | ranks | Lightning | of the last two, DeepSpeed | date |
|---|---|---|---|---|---|---|---|---|---|
| oldest (1) | 3.10.1 | 2.8.0 | 2.6.0 | 0.16.9 | 7 of 7 | 8 of 8 | 9 of 9 | 5 of 5 | 2025-12-31 |
| newest-3.13 (2) | 3.13.0 | 2.15.0 | 2.6.6 | 0.19.8 | 7 of 7 | 8 of 8 | 9 of 9 | 5 of 5 | 2025-12-31 |

(1) The first note.
(2) The second.
"""


@pytest.fixture
def readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A README with two rows, and room for reports beside it."""
    path = tmp_path / "README.md"
    path.write_text(f"Before.\n{matrix.BEGIN}\n{ELSEWHERE}\n{matrix.END}\nAfter.\n")
    monkeypatch.setattr(matrix, "README", path)
    monkeypatch.setattr(matrix, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(sys, "argv", ["matrix", "--write"])
    return path


def report(folder: Path) -> Path:
    folder.mkdir(parents=True)
    versions = {"python": "3.13.9", "torch": "2.15.1; CUDA 13", "lightning": "2.6.7", "deepspeed": "0.20.0"}
    findings = [{"about": about, "state": "ok", "found": found} for about, found in versions.items()]
    (folder / "doctor.json").write_text(json.dumps({"findings": findings}))
    (folder / "ranks.xml").write_text(SUITE)
    return folder


def test_a_run_replaces_its_row_alone(readme: Path) -> None:
    report(readme.parent / "runs" / "newest-3.13")
    matrix.main()
    lines = readme.read_text().splitlines()
    assert "| oldest (1) | 3.10.1 | 2.8.0 | 2.6.0 | 0.16.9 | 7 of 7 | 8 of 8 | 9 of 9 | 5 of 5 | 2025-12-31 |" in lines
    assert "| newest-3.13 | 3.13.9 | 2.15.1 | 2.6.7 | 0.20.0 | - | 2 of 3 | - | 1 of 2 | 2026-01-02 |" in lines
    assert [line for line in lines if line.startswith("(")] == ["(1) The first note."]
    assert (lines[0], lines[-1]) == ("Before.", "After.")


def test_without_a_report_nothing_is_written(readme: Path) -> None:
    before = readme.read_text()
    with pytest.raises(SystemExit, match="make matrix"):
        matrix.main()
    assert readme.read_text() == before


def test_a_run_with_a_failure_ends_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["matrix", "--check", str(report(tmp_path / "newest-3.14"))])
    with pytest.raises(SystemExit) as ended:
        matrix.main()
    assert ended.value.code == 1
