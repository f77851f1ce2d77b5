"""What is asked of a device. On a CPU most of it is nothing to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

BUSY_CYCLES = 100_000_000  # some 50 ms of a GPU


def chosen(name: str) -> torch.device:
    """A device by its name, as this process's current one; on a CPU with one thread."""
    device = torch.device(name)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    return device


def is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def wait_for(device: torch.device) -> None:
    """Until all that was asked of the device is done."""
    if is_gpu(device):
        torch.cuda.synchronize(device)


def keep_busy(device: torch.device) -> None:
    """Let the current stream lag behind the host: who reads too early from here on reads what was there before."""
    if is_gpu(device):
        torch.cuda._sleep(BUSY_CYCLES)  # private, and the only kernel that takes time and nothing else


@contextmanager
def no_syncs(device: torch.device) -> Iterator[None]:
    """Inside, torch raises where the host would wait for the GPU."""
    if not is_gpu(device):
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def another_stream(device: torch.device) -> Iterator[None]:
    """Inside, work goes to a stream of its own, after what was asked so far; afterwards both streams are done."""
    if not is_gpu(device):
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.synchronize(device)


def streams(device: torch.device) -> dict[str, Any]:
    """The streams that a user works on, as contexts."""
    contexts: dict[str, Any] = {"the default stream": nullcontext()}
    if is_gpu(device):
        contexts["another stream"] = another_stream(device)
    return contexts
