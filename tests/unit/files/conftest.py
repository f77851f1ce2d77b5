"""A saved average to be tampered with, and what notices code that ran."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .hostile import make


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "canary"
    yield file
    assert not file.exists(), "something in the file was run"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return make(tmp_path / "average")
