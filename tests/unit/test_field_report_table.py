"""docs/field_reports.md: all reports are there, once, and the tests that it names exist and name the report."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "field_reports.md"
ROW = re.compile(r"^\| ([PLR]\d+) \|")
TEST = re.compile(r"`(tests/[\w/]+\.py)::([\w:]+)`")
PENDING = "pending"
FEWEST_WORDS = 4  # of a reason

NOT_GIVEN = {16, 21, 29, 38, 48, 49, 53, 61, 104, 107}  # numbers of P that no report has
IDS = [*(f"P{n:02}" for n in range(1, 110) if n not in NOT_GIVEN), *(f"L{n}" for n in range(1, 19))]
SECOND_ROUND = [f"R{n:02}" for n in (*range(1, 22), 30)]


@cache
def rows() -> list[list[str]]:
    """The cells of each row: ID, symptom, reported, answered by."""
    lines = [line for line in TABLE.read_text().splitlines() if ROW.match(line)]
    return [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in lines]


@cache
def tree_of(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text())


def documented(file: str, name: str) -> Iterator[str]:
    """The docstrings of a module, of the classes around a test, and of the test. Raises LookupError if one is gone."""
    node: ast.Module | ast.ClassDef | ast.FunctionDef = tree_of(file)
    yield ast.get_docstring(node) or ""
    for part in name.split("::"):
        inside = [child for child in node.body if isinstance(child, (ast.ClassDef, ast.FunctionDef))]
        node = next((child for child in inside if child.name == part), None)  # type: ignore[assignment]
        if node is None:
            raise LookupError(f"{file} has no {part}")
        yield ast.get_docstring(node) or ""


def test_every_report_has_one_row() -> None:
    ids = [row[0] for row in rows()]
    assert [name for name, count in Counter(ids).items() if count > 1] == []
    assert [name for name in ids if name not in SECOND_ROUND] == IDS


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_row(row: list[str]) -> None:
    """Four cells; tests that exist and name the report; or else a reason, in words."""
    assert len(row) == 4
    assert row[1]
    assert row[2] == "-" or row[2].startswith("[")
    tests = TEST.findall(row[3])
    assert len(tests) == row[3].count("`tests/"), f"{row[0]} names something that is no test: {row[3]}"
    for file, name in tests:
        assert (ROOT / file).is_file(), f"{row[0]} names {file}, which is not there"
        assert name.split("::")[-1].startswith("test_")
        docstrings = " ".join(documented(file, name))
        assert re.search(rf"\b{row[0]}\b", docstrings), f"{file}::{name} does not name {row[0]}"
    assert tests or PENDING in row[3] or len(row[3].split()) >= FEWEST_WORDS, f"{row[0]} has no answer"


def test_no_row_is_pending() -> None:
    assert [row[0] for row in rows() if PENDING in row[3]] == []


@pytest.mark.parametrize(
    ("file", "name", "error"),
    [("tests/unit/test_averager.py", "test_nothing_of_this_name", "has no test_nothing_of_this_name")],
)
def test_a_test_that_is_gone_is_noticed(file: str, name: str, error: str) -> None:
    """Or the table could not fail."""
    with pytest.raises(LookupError, match=error):
        list(documented(file, name))
