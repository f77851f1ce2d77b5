"""Ends the pools with the session; under torchrun, keeps the ranks that it made in step."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import pool


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under torchrun, leave out the tests that start processes of their own."""
    if not pool.under_torchrun():
        return
    for item in items:
        if item.get_closest_marker("own_processes"):
            item.add_marker(pytest.mark.skip(reason="starts processes of its own: run it without torchrun"))


def pytest_sessionfinish() -> None:
    """No rank outlives the session."""
    pool.close_all()


if pool.under_torchrun():
    from tests.helpers import outer

    outer.start()

    @pytest.fixture
    def tmp_path(tmp_path: Path) -> Path:
        """Collective. Rank 0's folder, on every rank."""
        return outer.from_rank_0(tmp_path)
