"""The tables of docs/deepspeed.md say what happens: zero_configurations.py trains, and writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.further import covered_by
from tests.helpers.pool import run_on_ranks

from . import zero_configurations as tables

pytest.importorskip("deepspeed")
FILES = [name for name in tables.CONFIGURATIONS if name.endswith(".json")]
COVER = [*FILES, "stage 3, the same, sub-groups of 20 elements, pipelined"]


@pytest.mark.parametrize("name", covered_by(COVER, tables.CONFIGURATIONS))
def test_a_configuration(name: str, tmp_path: Path) -> None:
    """Trained on two ranks, beside full masters that this package has no part in; fp16 with a step that is skipped."""
    outcomes = run_on_ranks(2, tables.run_here, kind="deepspeed", names=[name], tmp_path=tmp_path)
    if outcomes[0][name].startswith(tables.NOT_HERE):
        pytest.skip(outcomes[0][name])
    assert outcomes == [{name: tables.outcomes_on_the_page()[name]}] * 2


def test_the_page_has_all_of_them() -> None:
    page = tables.outcomes_on_the_page()
    assert list(page) == list(tables.CONFIGURATIONS)
    assert {page[name] for name in FILES} == {tables.EQUAL}


def test_the_refusals_on_the_page_are_those_of_the_code() -> None:
    assert tables.between("refusals") == tables.table_of_refusals()
