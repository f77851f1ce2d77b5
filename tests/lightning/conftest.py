"""The ranks of these tests are the pools of tests/helpers/pool.py, or the ranks that torchrun made."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.pool import close_all, under_torchrun


@pytest.fixture(scope="package", autouse=True)
def _fresh_ranks_afterwards() -> Iterator[None]:
    """Each Trainer with a device mesh leaves process groups behind, with threads: in the end there are hundreds."""
    yield
    if not under_torchrun():
        close_all()
