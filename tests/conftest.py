"""Every test starts from the same seed, on one thread."""

from __future__ import annotations

import pytest
import torch


def pytest_configure() -> None:
    """One thread: test tensors are tiny, and the ranks of the pool need the other cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    torch.manual_seed(0)
