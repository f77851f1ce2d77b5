"""The ranks that torchrun made: every one of them runs pytest, and every body runs in-process.

After each body the ranks tell each other how it went, through the store that torchrun serves, so that a test fails on
all ranks or on none; after a failure they make a new process group, since the old one may be out of step.
"""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from .pool import RanksFailedError

STUCK = timedelta(seconds=60)  # a collective that a failed rank never joins ends after this
_group_number = 0
_test_number = 0
_store: dist.Store | None = None


def start() -> None:
    """Collective. Join the ranks that torchrun made, once for the session."""
    global _store
    torch.set_num_threads(1)
    if _store is None:
        _store, _, _ = next(dist.rendezvous("env://", timeout=STUCK))
    _join()


def _join() -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    if on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
        store=dist.PrefixStore(f"group{_group_number}", _store),
        rank=rank,
        world_size=world_size,
        timeout=STUCK,
    )


def _start_deepspeed() -> None:
    """Collective. What a rank of a DeepSpeed pool does at its start."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # ninja
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its imports, which the pool makes before any test
        import deepspeed

        deepspeed.init_distributed(dist_backend=dist.get_backend())


def from_rank_0(value: Any) -> Any:
    """Collective. Rank 0's value, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def run_in_process(
    world_size: int, body: Callable[..., Any], arguments: dict[str, Any], kind: str = "torch"
) -> list[Any]:
    """Collective. Run `body` here and on all peers; what each returned, in rank order. Fails where any rank failed."""
    actual = dist.get_world_size()
    if actual != world_size:
        pytest.skip(f"torchrun made {actual} ranks, this test wants {world_size}")
    if kind == "deepspeed":
        _start_deepspeed()
    torch.manual_seed(0)
    outcome: tuple[str, Any]
    try:
        outcome = ("passed", body(**arguments))
    except pytest.skip.Exception as skip:
        outcome = ("skipped", str(skip))
    except Exception:
        outcome = ("failed", traceback.format_exc())
    gc.collect()
    gc.freeze()  # as a rank of a pool
    return _compare(_exchange(outcome))


def _exchange(outcome: tuple[str, Any]) -> list[tuple[str, Any]]:
    global _test_number
    _test_number += 1
    store = dist.PrefixStore(f"test{_test_number}", _store)
    store.set_timeout(2 * STUCK)
    store.set(str(dist.get_rank()), pickle.dumps(outcome))
    return [pickle.loads(store.get(str(rank))) for rank in range(dist.get_world_size())]


def _compare(outcomes: list[tuple[str, Any]]) -> list[Any]:
    failures = [f"--- rank {rank}\n{text}" for rank, (status, text) in enumerate(outcomes) if status == "failed"]
    if failures:
        _replace_group()
        raise RanksFailedError("\n".join(failures))
    skips = [text for status, text in outcomes if status == "skipped"]
    if skips:
        pytest.skip(skips[0])
    return [value for _, value in outcomes]


def _replace_group() -> None:
    global _group_number
    dist.destroy_process_group()
    if "deepspeed" in sys.modules:  # which keeps groups of the old one
        importlib.reload(sys.modules["deepspeed.utils.groups"])
        sys.modules["deepspeed.comm.comm"].cdb = None  # type: ignore[attr-defined]
    _group_number += 1
    _join()
