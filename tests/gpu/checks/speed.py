"""Update, swap and gather over what a copy takes, measured in the same rounds."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sharded_avg import EMA, ShardedAverage

from ..check import check
from ..devices import is_gpu, wait_for
from ..reference import DECAY
from .rules import Tensors

ROOM = "speed"
NUM_WARMUPS = 3
NUM_ROUNDS = 15
Calls = dict[str, Callable[[], object]]


def _model(device: torch.device, count: int, numel: int, dtype: torch.dtype = torch.float32) -> Tensors:
    """`count` parameters of `numel` elements; of a few on a CPU, where only whether it runs is of interest."""
    size = numel if is_gpu(device) else min(numel, 1000)
    return Tensors({f"p{i}": torch.ones(size, device=device, dtype=dtype) for i in range(count)})


def _medians(calls: Calls, device: torch.device) -> dict[str, float]:
    """Seconds of each call, in turns; the GPU's own clock, the host's waiting included where the call waits."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    rounds = NUM_ROUNDS if is_gpu(device) else 3
    for number in range(NUM_WARMUPS + rounds):
        for name, call in calls.items():
            seconds = _timed(call, device)
            if number >= NUM_WARMUPS:
                times[name].append(seconds)
    return {name: median(values) for name, values in times.items()}


def _timed(call: Callable[[], object], device: torch.device) -> float:
    wait_for(device)
    if not is_gpu(device):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _host_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Until the call returns, which may be before the GPU is done."""
    found = []
    for _ in range(NUM_ROUNDS):
        wait_for(device)
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    wait_for(device)
    return median(found)


def _copy(nbytes: int, device: torch.device, to: str | None = None) -> Callable[[], object]:
    """Reads `nbytes` on the device and writes as many there, or into pinned host memory."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    pinned = to == "cpu" and is_gpu(device)
    target = torch.ones(nbytes, dtype=torch.uint8, device=to or device, pin_memory=pinned)
    return lambda: target.copy_(source)


def _started(model: nn.Module, **options: Any) -> ShardedAverage:
    average = ShardedAverage(model, EMA(decay=DECAY), **options)
    average.update()
    return average


def _there_and_back(average: ShardedAverage) -> Callable[[], object]:
    def swap() -> None:
        with average.swapped():
            pass

    return swap


def _gather(average: ShardedAverage, *, offload: bool) -> Callable[[], object]:
    def gather() -> None:
        with average.summon_full_params(offload_to_cpu=offload):
            pass

    return gather


def _told(seconds: float, floor: float, moved: int, copied: int) -> str:
    """Time, and how many times what a copy of as many bytes would take."""
    return f"{seconds * 1e3:.2f} ms = {seconds / (floor * moved / copied):.2f} x copy"


@check("update(), fp32 and bf16 weights: bytes moved over the bandwidth of a copy on the device", room=ROOM)
def update(device: torch.device) -> str:
    told = []
    for name, dtype, per_element in (("fp32", torch.float32, 12), ("bf16", torch.bfloat16, 10)):
        model = _model(device, 64, 4 << 20, dtype)
        numel = sum(param.numel() for param in model.parameters())
        copied = 8 * numel
        average = _started(model)
        medians = _medians({"copy": _copy(4 * numel, device), "update": average.update}, device)
        ratio = _told(medians["update"], medians["copy"], per_element * numel, copied)
        bandwidth = copied / medians["copy"] / 1e9
        told.append(f"{name}: {numel / 1e6:.0f} M elements, {ratio} ({bandwidth:.0f} GB/s)")
    return "; ".join(told)


@check(
    "update() of 10,000 small parameters: time on the GPU, time of the host, beside torch's AveragedModel", room=ROOM
)
def update_of_many(device: torch.device) -> str:
    model = _model(device, 10_000 if is_gpu(device) else 20, 1000)
    average = _started(model)
    rival = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    rival.update_parameters(model)

    def theirs() -> None:
        rival.update_parameters(model)

    medians = _medians({"ours": average.update, "theirs": theirs}, device)
    host = _host_seconds(average.update, device)
    ratio = medians["theirs"] / medians["ours"]
    return (
        f"{medians['ours'] * 1e3:.2f} ms, the host {host * 1e3:.2f} ms; "
        f"AveragedModel {medians['theirs'] * 1e3:.2f} ms, {ratio:.1f} x ours"
    )


@check("swap, there and back: bytes moved over the bandwidth of a copy on the device", room=ROOM)
def swap(device: torch.device) -> str:
    told = []
    for name, count, numel in (("large", 64, 4 << 20), ("small", 1000, 10_000)):
        model = _model(device, count if is_gpu(device) else 20, numel)
        total = sum(param.numel() for param in model.parameters())
        calls = {"copy": _copy(4 * total, device), "swap": _there_and_back(_started(model))}
        medians = _medians(calls, device)
        ratio = _told(medians["swap"], medians["copy"], 2 * 24 * total, 8 * total)  # two exchanges of three copies
        told.append(f"{name}, {total / 1e6:.0f} M elements: {ratio}")
    return "; ".join(told)


@check("gather on the device and into host memory, over a copy the same way", room=ROOM)
def gather(device: torch.device) -> str:
    model = _model(device, 64, 4 << 20)
    total = sum(param.numel() for param in model.parameters())
    average = _started(model)
    on_device = {"copy": _copy(4 * total, device), "gather": _gather(average, offload=False)}
    to_host = {"copy": _copy(4 * total, device, "cpu"), "gather": _gather(average, offload=True)}
    told = []
    for name, calls in (("on the device", on_device), ("into host memory (a pinned copy beside it)", to_host)):
        medians = _medians(calls, device)
        told.append(f"{name}: {_told(medians['gather'], medians['copy'], 1, 1)}")
    return f"{total / 1e6:.0f} M elements; " + "; ".join(told)


@check("update() of an average in pinned host memory, over a copy of the weights to the host", room=ROOM)
def update_on_host(device: torch.device) -> str:
    model = _model(device, 16, 4 << 20)
    total = sum(param.numel() for param in model.parameters())
    average = _started(model, device="cpu")
    medians = _medians({"copy": _copy(4 * total, device, "cpu"), "update": average.update}, device)
    return f"{total / 1e6:.0f} M elements: {_told(medians['update'], medians['copy'], 1, 1)}"
