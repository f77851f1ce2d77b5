"""The README's table of versions, made from what the runs themselves reported.

    python -m tests.matrix                 print the table of all that lies in runs/matrix
    python -m tests.matrix --write         put it into the README, between its two comments
    python -m tests.matrix --check FOLDER  one run: exit 1 unless all of it passed

A run is a folder with doctor.json (`sharded-avg doctor --json`) and reports of pytest, all or some of unit.xml,
ranks.xml and lightning.xml. A column that was not run has a dash; a run of a selection says so in a file `selection`,
whose text becomes a footnote.
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


def table(runs: list[Run]) -> str:
    """Markdown: a line for each run, and what was not whole below it."""
    lines = [
        "| | Python | torch | Lightning | DeepSpeed | unit | ranks | Lightning | of the last two, DeepSpeed | date |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    notes = [run for run in runs if run.selection]
    for run in runs:
        mark = f" ({notes.index(run) + 1})" if run in notes else ""
        versions = [run.versions.get(name, "-") for name in ("python", "torch", "lightning", "deepspeed")]
        counts = [str(run.counts[column]) for column in (*SUITES, "deepspeed")]
        lines.append(f"| {' | '.join([run.name + mark, *versions, *counts, run.date])} |")
    lines += ["", *(f"({number}) {run.selection}" for number, run in enumerate(notes, start=1))]
    return "\n".join(lines).rstrip()


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    if args.check:
        run = read(args.check)
        print(table([run]))
        sys.exit(any(count.passed < count.ran for count in run.counts.values()))
    order = ("oldest", "pinned-3.11", "pinned-3.12", "newest-3.13", "newest-3.14", "nightly")
    folders = [RUNS / name for name in order if (RUNS / name / "doctor.json").exists()]
    text = table([read(folder) for folder in folders])
    print(text)
    if args.write:
        readme = (ROOT / "README.md").read_text()
        before, _, rest = readme.partition(BEGIN)
        after = rest.partition(END)[2]
        (ROOT / "README.md").write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


if __name__ == "__main__":
    main()
