"""What `make test` leaves to `make test-all` is covered, and every process collects the same tests."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.further import covered_by, covering
from tests.helpers.sharing import WHOLE_FILES, pool_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("strength", [1, 2])
@pytest.mark.parametrize("sizes", [(2,), (5, 2), (5, 2, 2, 3)], ids=str)
def test_a_product_is_covered(strength: int, sizes: tuple[int, ...]) -> None:
    rows = [tuple((str(name), str(value)) for name, value in enumerate(row)) for row in product(*map(range, sizes))]
    chosen = covering(rows, strength)
    groups = [set(combinations(row, min(strength, len(sizes)))) for row in rows]
    assert set().union(*groups) == set().union(*(groups[index] for index in chosen))
    largest = sorted(sizes)[-strength:]
    assert len(chosen) <= 2 * max(largest) * (min(largest) if strength > 1 else 1)


def test_rows_keep_their_order() -> None:
    table = covered_by(["b", ("c", 1)], ["a", "b", ("c", 1), ("d", 2)])
    assert table[1:3] == ["b", ("c", 1)]
    assert [(row.values, [mark.name for mark in row.marks]) for row in (table[0], table[3])] == [
        (("a",), ["further"]),
        (("d", 2), ["further"]),
    ]


def a_test(path: str, function: Any = None, **params: Any) -> Any:
    return SimpleNamespace(nodeid=f"{path}::test", callspec=SimpleNamespace(params=params), function=function)


def test_which_pool_a_test_runs_on() -> None:
    """It goes to the worker that has it."""
    body = SimpleNamespace(kind_of_pool="deepspeed")
    assert pool_of(a_test("tests/multigpu/test_a.py", body, world_size=3)) == "deepspeed-3"
    assert pool_of(a_test("tests/multigpu/test_a.py", row="zero2", world_size=2)) == "deepspeed-2"
    assert pool_of(a_test("tests/multigpu/test_a.py", row="ddp", world_size=4)) == "torch-4"
    assert pool_of(a_test("tests/lightning/test_a.py", name="fsdp2")) == "torch-2"
    assert pool_of(a_test("tests/lightning/test_a.py", name="single")) == ""
    assert pool_of(a_test("tests/unit/test_a.py", size=2)) == ""
    assert pool_of(a_test(WHOLE_FILES[0], row="ddp", world_size=4)) == WHOLE_FILES[0]
    assert all((ROOT / path).is_file() for path in WHOLE_FILES)


COLLECT = (sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider")


def collecting(seed: int, *arguments: str) -> subprocess.Popen[str]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TORCHELASTIC"))
    }
    environment |= {"PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*COLLECT, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def test_two_processes_collect_the_same_tests_in_the_same_order() -> None:
    """Or `pytest -n 2` refuses to begin: no name of a test may have an address in it, or come from a set."""
    runs = [collecting(seed, "--all") for seed in (1, 2)]
    try:
        first, second = (run.communicate(timeout=240)[0].splitlines()[:-1] for run in runs)
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], first[-20:]
    assert len(first) > 1000
    assert first == second
    assert [name for name in first if " object at 0x" in name] == []
