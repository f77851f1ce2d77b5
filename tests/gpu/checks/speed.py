"""Update, swap and gather beside their floors.

A floor is the bytes that any implementation has to read and write, over the bandwidth of a copy that is measured in
the same rounds and goes the same way: on the device, or from it into pinned host memory.
"""

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
MIN_ROUNDS = 5  # of what takes longer than MAX_S
MAX_S = 3.0
Calls = dict[str, Callable[[], object]]


def _model(device: torch.device, count: int, numel: int, dtype: torch.dtype = torch.float32) -> Tensors:
    """`count` parameters of `numel` elements; of a few on a CPU, where only whether it runs is of interest."""
    size = numel if is_gpu(device) else min(numel, 1000)
    return Tensors({f"p{i}": torch.ones(size, device=device, dtype=dtype) for i in range(count)})


def _medians(calls: Calls, device: torch.device) -> dict[str, float]:
    """Seconds of each call, in turns; the GPU's own clock, the host's waiting included where the call waits."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    rounds = NUM_ROUNDS if is_gpu(device) else 3
    start = time.perf_counter()
    for number in range(NUM_WARMUPS + rounds):
        if number >= NUM_WARMUPS + MIN_ROUNDS and time.perf_counter() - start > MAX_S:
            break
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


def _beside_floor(seconds: float, copy_s: float, moved: float) -> str:
    """`moved`: bytes that have to be moved, in bytes that the copy moved."""
    floor = moved * copy_s
    return f"{_ms(seconds)} = {seconds / floor:.2f} x floor {_ms(floor)}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


@check("update(), fp32 and bf16 weights with an fp32 average, beside the floor", room=ROOM)
def update(device: torch.device) -> str:
    told = []
    for name, dtype, per_element in (("fp32", torch.float32, 12), ("bf16", torch.bfloat16, 10)):
        model = _model(device, 64, 4 << 20, dtype)
        numel = sum(param.numel() for param in model.parameters())
        average = _started(model)
        medians = _medians({"copy": _copy(4 * numel, device), "update": average.update}, device)
        # Weights read, average read and written: 4 or 2, 4 and 4 bytes. A copy moves 8.
        ratio = _beside_floor(medians["update"], medians["copy"], per_element / 8)
        bandwidth = 8 * numel / medians["copy"] / 1e9
        host = _host_seconds(average.update, device)
        told.append(
            f"{name}, {numel / 1e6:.0f} M elements: {ratio} ({per_element} bytes an element; "
            f"copy {bandwidth:.0f} GB/s; scratch of {average.scratch_nbytes >> 20} MiB; the host {_ms(host)})"
        )
    return "; ".join(told)


@check("update() of 10,000 small parameters: beside the floor, the host's time, and torch's AveragedModel", room=ROOM)
def update_of_many(device: torch.device) -> str:
    model = _model(device, 10_000 if is_gpu(device) else 20, 1000)
    total = sum(param.numel() for param in model.parameters())
    average = _started(model)
    rival = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    rival.update_parameters(model)

    def theirs() -> None:
        rival.update_parameters(model)

    calls: Calls = {"copy": _copy(4 * total, device), "ours": average.update, "theirs": theirs}
    medians = _medians(calls, device)
    ours = _beside_floor(medians["ours"], medians["copy"], 12 / 8)
    ratio = medians["theirs"] / medians["ours"]
    host = _ms(_host_seconds(average.update, device))
    return f"{ours}, the host {host}; AveragedModel {_ms(medians['theirs'])}, {ratio:.1f} x ours"


@check("swap, there and back, beside the floor: weights and average are read and written, twice", room=ROOM)
def swap(device: torch.device) -> str:
    told = []
    for name, count, numel in (("large", 64, 4 << 20), ("small", 1000, 10_000)):
        model = _model(device, count if is_gpu(device) else 20, numel)
        total = sum(param.numel() for param in model.parameters())
        calls = {"copy": _copy(4 * total, device), "swap": _there_and_back(_started(model))}
        medians = _medians(calls, device)
        ratio = _beside_floor(medians["swap"], medians["copy"], 32 / 8)
        told.append(f"{name}, {len(list(model.parameters()))} parameters, {total / 1e6:.0f} M elements: {ratio}")
    return "; ".join(told)


@check("gather on the device and into host memory, beside a copy the same way, which is the floor", room=ROOM)
def gather(device: torch.device) -> str:
    model = _model(device, 64, 4 << 20)
    total = sum(param.numel() for param in model.parameters())
    average = _started(model)
    on_device = {"copy": _copy(4 * total, device), "gather": _gather(average, offload=False)}
    to_host = {"copy": _copy(4 * total, device, "cpu"), "gather": _gather(average, offload=True)}
    told = []
    for name, calls in (("on the device", on_device), ("into host memory", to_host)):
        medians = _medians(calls, device)
        told.append(f"{name}: {_beside_floor(medians['gather'], medians['copy'], 1)}")
    return f"{total / 1e6:.0f} M elements; " + "; ".join(told)


@check(
    "update() of an average in pinned host memory, beside a copy of the weights there, the floor of a fast host",
    room=ROOM,
)
def update_on_host(device: torch.device) -> str:
    model = _model(device, 16, 4 << 20)
    total = sum(param.numel() for param in model.parameters())
    average = _started(model, device="cpu")
    medians = _medians({"copy": _copy(4 * total, device, "cpu"), "update": average.update}, device)
    return f"{total / 1e6:.0f} M elements: {_beside_floor(medians['update'], medians['copy'], 1)}"
