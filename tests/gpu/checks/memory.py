"""Nothing is waited for and nothing is allocated; and where averages in host memory lie."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import nn

from sharded_avg import EMA, ShardedAverage

from ..check import check
from ..devices import is_gpu, no_syncs, wait_for
from ..reference import DECAY, ByHand, assert_same, ema, trained
from .rules import Tensors, averaged

MIB = 1 << 20
SLACK = 4 * MIB  # torch's allocator gives a block that is up to 1 MiB too large
SCRATCH_BYTES = 64 * MIB  # what a swap may take for a while, by docs/guide.md
KINDS: dict[str, tuple[torch.dtype, dict[str, EMA]]] = {
    "fp32": (torch.float32, {"one": EMA(decay=DECAY)}),
    "bf16": (torch.bfloat16, {"one": EMA(decay=DECAY, warmup=True)}),
    "two averages": (torch.float32, {"one": EMA(decay=DECAY), "two": EMA(decay=0.5)}),
}


def _tensors(device: torch.device, dtype: torch.dtype, numel: int = 4 * MIB, count: int = 5) -> Tensors:
    """Some large parameters, and some of a few elements."""
    sizes = {f"large{i}": numel for i in range(count)} | {f"small{i}": 7 for i in range(100)}
    return Tensors({name: torch.ones(size, device=device, dtype=dtype) for name, size in sizes.items()})


@torch.no_grad()
def _move(model: nn.Module) -> None:
    """A step, as fast as can be."""
    torch._foreach_mul_(list(model.parameters()), 1.0625)


@check("update() under set_sync_debug_mode('error'): the host never waits", needs_gpu=True)
def no_sync(device: torch.device) -> str:
    one = torch.ones(1, device=device)
    try:
        with no_syncs(device):
            one.item()
    except RuntimeError:
        pass
    else:
        raise AssertionError("this torch lets a sync pass, so nothing is shown")
    for kind, (dtype, rules) in KINDS.items():
        model = _tensors(device, dtype, numel=MIB)
        average = ShardedAverage(model, rules)
        average.update()
        for _ in range(3):
            _move(model)
            with no_syncs(device):
                assert average.update(), kind
    return f"{', '.join(KINDS)}; the first update: {_first_update(device)}"


def _first_update(device: torch.device) -> str:
    """It allocates and copies; no promise is made of it."""
    average = ShardedAverage(_tensors(device, torch.float32, numel=MIB), EMA(decay=DECAY))
    try:
        with no_syncs(device):
            average.update()
    except RuntimeError as error:
        return f"waits ({error})"
    return "neither"


def _counts(device: torch.device) -> dict[str, int]:
    wait_for(device)
    stats = torch.cuda.memory_stats(device)
    return {
        "blocks": stats["allocation.all.allocated"],  # ever handed out by torch's allocator
        "segments": stats["segment.all.allocated"],  # ever asked of the driver
        "bytes": stats["allocated_bytes.all.current"],
    }


def _since(before: dict[str, int], device: torch.device) -> dict[str, int]:
    return {name: value - before[name] for name, value in _counts(device).items()}


@check("an update takes no memory, by torch.cuda.memory_stats: not a block", needs_gpu=True)
def update_allocates_nothing(device: torch.device) -> str:
    for kind, (dtype, rules) in KINDS.items():
        model = _tensors(device, dtype)
        average = ShardedAverage(model, rules)
        before = _counts(device)
        average.update()
        held = _since(before, device)["bytes"]
        expected = average.nbytes + average.scratch_nbytes
        assert expected <= held <= expected + SLACK, f"{kind}: the average takes {held} bytes, not {expected}"
        before = _counts(device)
        for _ in range(5):
            assert average.update()
        grown = _since(before, device)
        assert not any(grown.values()), f"{kind}: 5 updates took {grown}"
    return ", ".join(KINDS)


@check("a swap takes scratch for a while, and by the second swap nothing is asked of the driver", needs_gpu=True)
def second_swap_allocates_nothing(device: torch.device) -> str:
    model = _tensors(device, torch.float32)
    average = ShardedAverage(model, EMA(decay=DECAY))
    average.update()
    first = ShardedAverage(nn.Linear(1, 1, device=device), EMA(decay=DECAY))
    first.update()
    with first.swapped():  # the first swap of a process makes the factors of its check sums, which it keeps
        pass
    told = []
    for number in range(3):
        before = _counts(device)
        torch.cuda.reset_peak_memory_stats(device)
        with average.swapped():
            pass
        grown = _since(before, device)
        peak = torch.cuda.memory_stats(device)["allocated_bytes.all.peak"] - before["bytes"]
        assert peak <= SCRATCH_BYTES + SLACK, f"swap {number + 1} took {peak / MIB:.0f} MiB"
        assert not grown["bytes"], f"swap {number + 1} keeps {grown['bytes']} bytes"
        assert not (number and grown["segments"]), f"swap {number + 1} asked the driver {grown['segments']} times"
        told.append(f"{peak / MIB:.0f} MiB")
    weights = sum(param.nbytes for param in model.parameters()) / MIB
    return f"{' / '.join(told)} beside weights of {weights:.0f} MiB"


@check("averages in host memory: the bits of the formula; pinned, and nothing on the GPU")
def host(device: torch.device) -> str:
    told = []
    for dtype in (torch.float32, torch.bfloat16):
        model = _tensors(device, dtype, numel=MIB if is_gpu(device) else 1000)
        before, pinned = _held(device), _pinned_bytes(device)
        average, hand = ShardedAverage(model, EMA(decay=DECAY), device="cpu"), ByHand(ema)
        for _ in range(3):
            _move(model)
            assert average.update()
            hand.take({name: value.detach().cpu() for name, value in trained(model).items()})
        assert_same(averaged(average), hand.average, "averages")
        grown = _held(device) - before
        assert grown <= MIB // 4, f"{grown} bytes stay on the GPU"
        raw = {name: value.detach().clone() for name, value in trained(model).items()}
        with average.swapped():
            inside = {name: value.to(device, dtype) for name, value in hand.average.items()}
            assert_same(trained(model), inside, "inside")
        assert_same(trained(model), raw, "outside")
        if pinned is not None:
            more = (_pinned_bytes(device) or 0) - pinned
            assert more >= average.nbytes, f"{more} bytes were pinned for an average of {average.nbytes}"
        told.append(f"{average.nbytes / MIB:.0f} MiB")
        del average, model
    return f"{' / '.join(told)}{'' if pinned is None else ', pinned'}"


def _held(device: torch.device) -> int:
    wait_for(device)
    return torch.cuda.memory_allocated(device) if is_gpu(device) else 0


def _pinned_bytes(device: torch.device) -> int | None:
    """In use now. `None` where this torch does not tell."""
    if not is_gpu(device) or not hasattr(torch.cuda, "host_memory_stats"):
        return None
    stats: dict[str, Any] = torch.cuda.host_memory_stats()
    for name in ("active_bytes.current", "allocated_bytes.current"):
        if name in stats:
            return int(stats[name])
    return None


@check("memory is free again when the average is gone", needs_gpu=True)
def nothing_left(device: torch.device) -> None:
    model = _tensors(device, torch.bfloat16)
    before = _held(device)
    average = ShardedAverage(model, EMA(decay=DECAY))
    average.update()
    with average.swapped():
        pass
    assert _held(device) > before, "torch.cuda.memory_allocated does not tell"
    del average
    gc.collect()
    assert _held(device) == before, f"{_held(device) - before} bytes stay"
