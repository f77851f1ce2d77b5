"""The README's table of versions, made from what the runs themselves reported.

    python -m tests.matrix                 print the table of all that lies in runs/matrix
    python -m tests.matrix --write         put it into the README, between its two comments
    python -m tests.matrix --check FOLDER  one run: exit 1 unless all of it passed

A run is a folder with doctor.json (`sharded-avg doctor --json`) and reports of pytest, all or some of unit.xml,
ranks.xml and lightning.xml. A column that was not run has a dash; tests that were skipped are in no count. What a
reader should know of a run (that it was of a selection, say) is in its file `selection`, which becomes a footnote.
The README's rows of runs that are not in runs/matrix here stay as they are.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "matrix"
README = ROOT / "README.md"
ORDER = ("oldest", "pinned-3.11", "pinned-3.12", "newest-3.13", "newest-3.14", "nightly")
BEGIN, END = "<!-- python -m tests.matrix --write -->", "<!-- end -->"
SUITES = ("unit", "ranks", "lightning")
ABOUT_DEEPSPEED = re.compile(r"zero|deepspeed", re.IGNORECASE)


@dataclass
class Count:
    """Tests that passed and that ran, skipped ones left out."""

    passed: int = 0
    ran: int = 0

    def __str__(self) -> str:
        return f"{self.passed:,} of {self.ran:,}" if self.ran else "-"


@dataclass
class Run:
    """One environment: versions, and a Count for each column."""

    name: str
    versions: dict[str, str]
    counts: dict[str, Count]
    date: str
    selection: str


@dataclass
class Row:
    """A line of the table: what stands behind the name, and the footnote, if any."""

    name: str
    cells: list[str]
    note: str


def read(folder: Path) -> Run:
    """What lies in a folder of runs/matrix."""
    findings = {f["about"]: f for f in json.loads((folder / "doctor.json").read_text())["findings"]}
    wanted = ("python", "torch", "lightning", "deepspeed")
    versions = {
        name: re.split("[,;]", findings[name]["found"])[0] for name in wanted if findings[name]["state"] == "ok"
    }
    counts, dates = {column: Count() for column in (*SUITES, "deepspeed")}, set()
    for suite in SUITES:
        report = folder / f"{suite}.xml"
        if report.exists():
            dates |= {found.get("timestamp", "")[:10] for found in ElementTree.parse(report).iter("testsuite")}
            _count(report, suite, counts)
    note = folder / "selection"
    return Run(
        folder.name, versions, counts, max(dates, default="-"), note.read_text().strip() if note.exists() else ""
    )


def _count(report: Path, suite: str, counts: dict[str, Count]) -> None:
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("skipped") is not None:
            continue
        failed = case.find("failure") is not None or case.find("error") is not None
        about = ABOUT_DEEPSPEED.search(f"{case.get('classname')} {case.get('name')}") and suite != "unit"
        for column in (suite, *(["deepspeed"] if about else [])):
            counts[column].ran += 1
            counts[column].passed += not failed


def row_of(run: Run) -> Row:
    """A run's line, and its footnote."""
    versions = [run.versions.get(name, "-") for name in ("python", "torch", "lightning", "deepspeed")]
    counts = [str(run.counts[column]) for column in (*SUITES, "deepspeed")]
    return Row(run.name, [*versions, *counts, run.date], run.selection)


def rows_in(text: str) -> list[Row]:
    """The rows of a table that `table` has made."""
    notes = dict(re.findall(r"^\((\d+)\) (.+)$", text, re.MULTILINE))
    rows = []
    for name, mark, cells in re.findall(r"^\| ([a-z][\w.-]*)(?: \((\d+)\))? \| (.+) \|$", text, re.MULTILINE):
        rows.append(Row(name, cells.split(" | "), notes.get(mark, "")))
    return rows


def table(rows: list[Row]) -> str:
    """Markdown: a line for each run, and the footnotes below it."""
    lines = [
        "| | Python | torch | Lightning | DeepSpeed | unit | ranks | Lightning | of the last two, DeepSpeed | date |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    noted = [row for row in rows if row.note]
    for row in rows:
        mark = f" ({noted.index(row) + 1})" if row.note else ""
        lines.append(f"| {' | '.join([row.name + mark, *row.cells])} |")
    lines += ["", *(f"({number}) {row.note}" for number, row in enumerate(noted, start=1))]
    return "\n".join(lines).rstrip()


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    if args.check:
        run = read(args.check)
        print(table([row_of(run)]))
        sys.exit(any(count.passed < count.ran for count in run.counts.values()))
    found = {name: row_of(read(RUNS / name)) for name in ORDER if (RUNS / name / "doctor.json").exists()}
    if not found:
        sys.exit(f"no run has left its reports in {RUNS}: make matrix")
    before, _, rest = README.read_text().partition(BEGIN)
    inside, _, after = rest.partition(END)
    rows = {row.name: row for row in rows_in(inside)} | found
    text = table([rows[name] for name in ORDER if name in rows])
    print(text)
    if args.write:
        README.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


if __name__ == "__main__":
    main()
