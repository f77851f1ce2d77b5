"""Every test starts from the same seed, on one thread, and no process that it started outlives the session.

Two suites. Some tests are tables: one assertion over engines, strategies, rules, dtypes. Their further rows find
nothing that other rows do not look for, too: they run with `--all` only, which is what `make test-all` passes, or where
tests are asked for by name (`pytest tests/unit/test_x.py::test_y`). `make test`, without them, still runs every file,
every kind of check, and of each table a set of rows that covers it: every engine, rule and strategy, and every pair of
neighbours, not every pair of everything. In one process its closing line calls them deselected. How a row
becomes a further one is told in tests/helpers/further.py.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from sharded_avg.ranks import leave
from tests.helpers import excepted_warnings, pool, sharing
from tests.helpers.further import is_further

_exit_status = 0


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--all`: see above."""
    parser.addoption("--all", action="store_true", help="run the further rows of long tables, too, as `make test-all`")


def pytest_configure(config: pytest.Config) -> None:
    """Settings of this process, and of all that it starts."""
    sharing.start(config)
    excepted_warnings.add_to(config)
    torch.set_num_threads(1)  # test tensors are tiny, and the ranks of the pool need the other cores
    # DeepSpeed compiles its ops at first use, with paths of this environment. In the user's common cache, two
    # environments would rebuild them in turns, and wait for each other's locks.
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    # ... and two releases of ninja take what the other has compiled for stale: everyone here has this environment's.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if pool.under_torchrun():
        # pytest clears old temporary folders at its end, and two that clear one place take it from each other's hands.
        root = Path(tempfile.gettempdir()) / f"sharded_avg-tests-of-{os.getuid()}-rank{os.environ['RANK']}"
        root.mkdir(exist_ok=True)
        os.environ["PYTEST_DEBUG_TEMPROOT"] = str(root)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave further rows to `--all`; under torchrun, skip what starts processes of its own."""
    sharing.tell(config, items)
    for item in items:
        if pool.under_torchrun() and item.get_closest_marker("own_processes"):
            item.add_marker(
                pytest.mark.skip(reason="runs in, or starts, processes of its own: run it without torchrun")
            )
    if config.getoption("all") or any("::" in argument for argument in config.args):
        return
    left_out = is_further(items)
    config.hook.pytest_deselected(items=[item for item, out in zip(items, left_out, strict=True) if out])
    items[:] = [item for item, out in zip(items, left_out, strict=True) if not out]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each pool on one worker; `--dist` as usual where it is given."""
    return sharing.by_pool(config, log) if config.getoption("dist") == "load" else None


def pytest_collection_finish() -> None:
    """What is imported by now is no garbage, and is not looked through for any."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """No rank of a pool outlives the session."""
    global _exit_status
    _exit_status = int(exitstatus)
    pool.close_all()
    sharing.end(session.config)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """Collective. After the closing line, the ranks that torchrun made end together."""
    if pool.under_torchrun():
        leave(_exit_status)


def pytest_make_parametrize_id(val: object) -> str | None:
    """Dtypes by name; what pytest has no name for gets its argument's and a number, the same in every process."""
    return str(val).removeprefix("torch.") if isinstance(val, torch.dtype) else None


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    torch.manual_seed(0)


if pool.under_torchrun():
    from tests.helpers import outer

    outer.start()

    @pytest.fixture
    def tmp_path(tmp_path: Path) -> Path:
        """Collective. Rank 0's folder, on every rank."""
        return outer.from_rank_0(tmp_path)
