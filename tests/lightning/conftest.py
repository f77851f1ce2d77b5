"""The ranks of these tests are those of tests/multigpu: its pools, or the ranks that torchrun made."""

from __future__ import annotations

from tests.multigpu.conftest import pytest_collection_modifyitems, pytest_sessionfinish  # noqa: F401 - hooks
from tests.multigpu.pool import under_torchrun

if under_torchrun():
    from tests.multigpu.conftest import tmp_path  # noqa: F401 - a fixture
