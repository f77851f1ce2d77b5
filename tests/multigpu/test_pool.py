"""The pool itself: what comes back, what a failure shows, and that nothing outlives the session."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.helpers.pool import ROOT, RanksFailedError, on_ranks, rank_device, run_on_ranks

THIS = Path(__file__).relative_to(ROOT)


@on_ranks(2, 3, 4)
def test_body_runs_on_every_rank(world_size: int, tmp_path: Path) -> None:
    assert dist.get_world_size() == world_size
    total = torch.tensor(dist.get_rank() + 1.0, device=rank_device())
    dist.all_reduce(total)
    assert total.item() == world_size * (world_size + 1) / 2
    (tmp_path / str(dist.get_rank())).touch()
    dist.barrier()
    assert len(list(tmp_path.iterdir())) == world_size
    assert torch.get_num_threads() == 1
    assert os.environ["WORLD_SIZE"] == str(world_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [3, 5])
@on_ranks(2)
def test_arguments_reach_the_ranks(size: int, dtype: torch.dtype) -> None:
    value = torch.ones(size, dtype=dtype)
    dist.all_reduce(value)
    assert torch.equal(value, torch.full((size,), 2.0, dtype=dtype))


@on_ranks(2)
def test_seed_is_the_same_on_every_rank() -> None:
    drawn = [torch.empty(5) for _ in range(2)]
    dist.all_gather(drawn, torch.rand(5))
    assert torch.equal(drawn[0], drawn[1])


@on_ranks(2)
def test_skip_on_the_ranks_is_a_skip() -> None:
    pytest.skip("asked for by the body: this skip is the test")


@on_ranks(2)
@pytest.mark.filterwarnings("ignore:heard")
def test_marks_that_filter_warnings_reach_the_ranks() -> None:
    warnings.warn("heard", stacklevel=1)


@on_ranks(2, kind="deepspeed")
def test_deepspeed_has_ranks_of_its_own() -> None:
    deepspeed = pytest.importorskip("deepspeed")
    assert deepspeed.comm.is_initialized()
    assert deepspeed.get_accelerator().device_name() == "cpu"
    assert deepspeed.comm.get_world_size() == 2


def triple(value: torch.Tensor) -> tuple[int, torch.Tensor]:
    return dist.get_rank(), 3 * value


def test_results_come_back_in_rank_order() -> None:
    results = run_on_ranks(2, triple, value=torch.ones(3))
    assert [rank for rank, _ in results] == [0, 1]
    assert all(torch.equal(tripled, torch.full((3,), 3.0)) for _, tripled in results)


def fail_on_rank_1(how: str) -> None:
    left, right = dist.get_rank() + 2, 4
    if dist.get_rank() == 1:
        if how == "assert":
            assert left == right
        if how == "warn":
            warnings.warn("this must not pass", stacklevel=1)
        if how == "die":
            os._exit(7)
    dist.barrier()


FAILURES = {
    "assert": "assert 3 == 4",
    "warn": "UserWarning: this must not pass",
    "die": "the process died with exit code 7",
}


@pytest.mark.own_processes
@pytest.mark.parametrize("how", FAILURES)
def test_one_failed_rank_fails_the_test_and_the_pool_recovers(how: str) -> None:
    with pytest.raises(RanksFailedError) as failure:
        run_on_ranks(2, fail_on_rank_1, how=how)
    text = str(failure.value)
    assert "fail_on_rank_1 failed on 2 ranks" in text
    assert "--- rank 1 failed" in text
    assert FAILURES[how] in text
    assert "rank 0" in text
    assert run_on_ranks(2, dist.get_rank) == [0, 1]


@pytest.mark.own_processes
def test_peers_of_a_failed_rank_show_where_they_wait() -> None:
    with pytest.raises(RanksFailedError, match="rank 0 was still running") as failure:
        run_on_ranks(2, sleep_or_fail, seconds=600)
    text = str(failure.value)
    assert text.index("rank 1 failed") < text.index("rank 0 was still running"), "the cause comes first"
    assert "in sleep_or_fail" in text


def sleep_or_fail(seconds: float) -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank 1 does not sleep")
    time.sleep(seconds)


def wait_for_nobody() -> None:
    if dist.get_rank() == 0:
        dist.barrier()
    else:
        dist.recv(torch.ones(1), src=0)


@pytest.mark.own_processes
def test_a_hang_shows_the_stacks_of_every_rank_and_the_pool_recovers() -> None:
    run_on_ranks(2, dist.get_rank)  # start-up is not what is timed here
    with pytest.raises(RanksFailedError, match="hung: not done after 1 s") as failure:
        run_on_ranks(2, wait_for_nobody, timeout_s=1)
    text = str(failure.value)
    assert text.count("in wait_for_nobody") == 2
    assert "in barrier" in text
    assert "in recv" in text
    assert run_on_ranks(2, dist.get_rank) == [0, 1]


def unpicklable() -> Any:
    return lambda: None


@pytest.mark.own_processes
def test_what_cannot_be_sent_back_fails() -> None:
    with pytest.raises(RanksFailedError, match=r"[Pp]ickle"):
        run_on_ranks(2, unpicklable)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


@pytest.mark.own_processes
def test_ranks_die_with_pytest_even_while_they_hang() -> None:
    code = (
        "from tests.helpers import pool\n"
        "from tests.multigpu import test_pool\n"
        "made = pool.Pool('torch', 2)\n"
        "print(*[process.pid for process in made.processes], flush=True)\n"
        "made.run(pool.Job(test_pool.__name__, 'wait_for_nobody', pool.pickle.dumps({})), 600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()] if parent.stdout else []
        assert len(pids) == 2
        time.sleep(1)
        assert all(map(is_alive, pids))
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_alive, pids))


def run_pytest(*launcher: str, select: str, arguments: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, "-m", "pytest", str(THIS), "-k", select, "-p", "no:cacheprovider", *arguments]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = outside | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.own_processes
def test_xdist_workers_have_pools_of_their_own() -> None:
    """Each is started by one of them, which runs all of its tests."""
    done = run_pytest(select="arguments_reach or runs_on_every_rank", arguments=("-n", "2", "-v"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 passed" in done.stdout
    where = set(re.findall(r"\[(gw\d)\].* PASSED .*\b(\d)ranks", done.stdout))
    assert sorted(size for _, size in where) == ["2", "3", "4"], where
    assert {worker for worker, _ in where} == {"gw0", "gw1"}


@pytest.mark.own_processes
def test_ranks_made_by_torchrun_are_used() -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    done = run_pytest(*launcher, select="every_rank or arguments_reach or come_back or recovers or deepspeed")
    assert done.returncode == 0, done.stdout + done.stderr
    # On each rank, every_rank: 1 of 3 world sizes, and the seed; arguments_reach: 4; come_back: 1; deepspeed: 1.
    assert done.stdout.count("8 passed") == 2, done.stdout
    assert "torchrun made 2 ranks, this test wants 3" in done.stdout
    assert "processes of its own: run it without torchrun" in done.stdout


FAILING_UNDER_TORCHRUN = """
from datetime import timedelta
import pytest
import torch.distributed as dist
from sharded_avg.ranks import leave
from tests.helpers import outer
from tests.multigpu import test_pool

outer.STUCK = timedelta(seconds=3)
outer.start()
for how, text in [("assert", "AssertionError"), ("warn", "UserWarning: this must not pass")]:
    with pytest.raises(outer.RanksFailedError, match=text):
        outer.run_in_process(2, test_pool.fail_on_rank_1, {"how": how})
    results = outer.run_in_process(2, dist.get_rank, {})
    assert results == [0, 1], results
with pytest.raises(pytest.skip.Exception):
    outer.run_in_process(2, test_pool.skip_on_rank_1, {})
leave()
"""


def skip_on_rank_1() -> None:
    if dist.get_rank() == 1:
        pytest.skip("rank 1 cannot")


@pytest.mark.own_processes
def test_a_failed_rank_fails_all_under_torchrun_and_they_go_on(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(FAILING_UNDER_TORCHRUN)
    command = [sys.executable, "-W", "error::UserWarning", "-m", "torch.distributed.run", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error::UserWarning"}
    done = subprocess.run(
        [*command, "--nproc_per_node=2", str(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
