"""Every test starts from the same seed, on one thread; engines that compile something keep it in this environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch


def pytest_configure() -> None:
    """Settings of this process, and of all that it starts."""
    torch.set_num_threads(1)  # test tensors are tiny, and the ranks of the pool need the other cores
    # DeepSpeed compiles its ops at first use, with paths of this environment. In the user's common cache, two
    # environments would rebuild them in turns, and wait for each other's locks.
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    torch.manual_seed(0)
