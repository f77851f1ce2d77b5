"""Which xdist worker runs what: tests of one pool go to one worker, so that no pool is started twice.

What needs no pool is a unit of its own, and fills up whichever worker has nothing to do. A worker knows what a test's
parameters are, and tells the controller, which deals the tests out, in a file. (xdist's own `--dist loadgroup` changes
node IDs, and pytest 9.2 does not let it: all tests of a group were dealt out singly, without a word.)
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

FOLDER = "TESTS_POOLS"  # the variable that names where the files are
# Whose module-scoped fixture runs on every pool.
WHOLE_FILES = ("tests/multigpu/saved/test_reshard.py",)


def start(config: pytest.Config) -> None:
    """In the controller, before there are workers."""
    if not _is_worker(config):
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="tests-pools-")


def tell(config: pytest.Config, items: Iterable[pytest.Item]) -> None:
    """In a worker: the pool of each test."""
    if _is_worker(config):
        path = Path(os.environ[FOLDER], f"{config.workerinput['workerid']}.json")  # type: ignore[attr-defined]
        path.write_text(json.dumps({item.nodeid: pool for item in items if (pool := pool_of(item))}))


def end(config: pytest.Config) -> None:
    """In the controller, when the workers have ended."""
    if not _is_worker(config):
        shutil.rmtree(os.environ.pop(FOLDER, ""), ignore_errors=True)


def by_pool(config: pytest.Config, log: Any) -> Any:
    """A scheduler of xdist, for which a unit of work is all tests of one pool, or one test; the largest come first."""
    from xdist.scheduler import LoadScopeScheduling

    class ByPool(LoadScopeScheduling):
        @cached_property
        def _pools(self) -> dict[str, str]:
            told = [json.loads(path.read_text()) for path in Path(os.environ[FOLDER]).glob("*.json")]
            return told[0] if told else {}

        def _split_scope(self, nodeid: str) -> str:
            return self._pools.get(nodeid, nodeid)

    return ByPool(config, log)


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def pool_of(item: pytest.Item) -> str:
    """Such as "torch-2", as far as a test's parameters say it; else ""."""
    path = item.nodeid.partition("::")[0]
    if path in WHOLE_FILES:
        return path
    params: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    kind = getattr(getattr(item, "function", None), "kind_of_pool", "")
    if kind:
        return f"{kind}-{params['world_size']}"
    if path.startswith("tests/lightning/"):
        return next(filter(None, map(_of_strategy, params.values())), "")
    if "world_size" in params and isinstance(params.get("row"), str):
        return _of_engine(params["row"], params["world_size"])
    return ""


def _of_engine(row: str, world_size: int) -> str:
    from .engines import ENGINES

    return f"{ENGINES[row].kind}-{world_size}" if row in ENGINES and world_size > 1 else ""


def _of_strategy(name: Any) -> str:
    from tests.lightning.strategies import STRATEGIES

    row = STRATEGIES.get(name) if isinstance(name, str) else None
    return f"{row.where}-{row.world_size}" if row and row.where in ("torch", "deepspeed") else ""
