"""A model in the hands of an engine, and what is proved of every engine.

Engine   what forward is called on, and how to step it and to look into it: by what the engine itself offers
prove    the average is that of full tensors, the swap is seen by forward and leaves nothing, files hold the same
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharded_avg import EMA, ShardedAverage, load_averaged_state_dict

from .devices import no_syncs, wait_for
from .reference import DECAY, ByHand, Net, State, assert_same, batch, cast, outputs

STEPS = 4
Make = Callable[[torch.device], "Engine"]


@dataclass
class Engine:
    """A model in the hands of an engine."""

    model: nn.Module
    learn: Callable[[int], None]  # Collective. One step, numbered
    full: Callable[[], State]  # Collective. Clones of what is averaged: whole weights, or their fp32 masters
    working: Callable[[], State]  # Collective. Clones of the whole weights that forward reads
    device: torch.device  # where forward computes
    dtype: torch.dtype = torch.float32  # of the inputs
    tolerance: float = 1e-5  # of forward, beside a plain model; larger where it computes in less than fp32
    home: torch.device | None = None  # where averages are, and computed; by default, there too
    close: Callable[[], None] = lambda: None

    def evaluate(self) -> Tensor:
        """Collective."""
        return outputs(self.model, batch(100, self.device, self.dtype))


def join_alone(device: torch.device) -> None:
    """Be a job of one rank, over nccl on a GPU and gloo on a CPU, for the rest of this process."""
    if dist.is_initialized():
        return
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    on_gpu = device.type == "cuda"
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # works where the host's own name does not resolve
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port))
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=0, world_size=1)


def prove(make: Make, device: torch.device, *, twin: bool = True) -> str:
    """Collective. Everything that is asked of an engine; `twin`: a training without an average gives the same bits."""
    bare = make(device)
    for step in range(2 * STEPS):
        bare.learn(step)
    expected = bare.full()
    bare.close()
    del bare
    engine = make(device)
    try:
        held = _prove_average(engine, device)
        for step in range(STEPS, 2 * STEPS):
            engine.learn(step)
        if twin:
            assert_same(engine.full(), expected, "a training with swaps, beside one without")
    finally:
        engine.close()
    return held


def _prove_average(engine: Engine, device: torch.device) -> str:
    average, hand = ShardedAverage(engine.model, EMA(decay=DECAY, warmup=True)), ByHand()
    with average.swapped() as is_in:
        assert not is_in, "there is an average before the first update"
    for step in range(STEPS):
        engine.learn(step)
        with no_syncs(device) if step else nullcontext():  # the first update allocates
            assert average.update()
        hand.take({name: value.to(engine.home or device) for name, value in engine.full().items()})
        _prove_swap(engine, average, hand, must_differ=bool(step))
    _prove_full_tensors(engine, average, hand)
    _prove_error(engine, average)
    _prove_files(average, hand)
    numel = sum(value.numel() for value in hand.average.values())
    return f"{average.nbytes:,} bytes for {numel:,} elements"


def _prove_swap(engine: Engine, average: ShardedAverage, hand: ByHand, *, must_differ: bool) -> None:
    masters, raw, before = engine.full(), engine.working(), engine.evaluate()
    with average.swapped() as is_in:
        assert is_in, "no average is in"
        inside = engine.evaluate()
        assert_same(engine.working(), cast(hand.average, raw), "inside")
        assert torch.equal(engine.evaluate(), inside), "forward inside, again"
    assert_same(engine.working(), raw, "outside")
    assert torch.equal(engine.evaluate(), before), "forward outside"
    assert_same(engine.full(), masters, "what is trained, outside")
    _prove_forward(inside, hand, raw, engine)
    assert torch.equal(inside, before) != must_differ, "forward inside, beside forward outside"


def _prove_forward(inside: Tensor, hand: ByHand, raw: State, engine: Engine) -> None:
    """A plain model with the averages computes the same, up to what kernels round."""
    dtype = engine.dtype
    torch.manual_seed(5)
    plain = Net().to(engine.device)
    plain.load_state_dict(plain.state_dict() | cast(hand.average, raw))
    expected = outputs(plain.to(dtype), batch(100, engine.device, dtype))
    difference = float((inside.float() - expected.float()).abs().max())
    assert difference <= engine.tolerance, f"forward inside is off by {difference}"


def _prove_full_tensors(engine: Engine, average: ShardedAverage, hand: ByHand) -> None:
    for offload in (True, False):
        with average.summon_full_params(offload_to_cpu=offload, rank0_only=False) as full:
            at_once = {name: value.clone() for name, value in full.items()}
            assert_same(at_once, hand.average, f"summon_full_params(offload_to_cpu={offload})")
            Net().load_state_dict(full, strict=True)
            assert not offload or {value.device.type for value in full.values()} == {"cpu"}


def _prove_error(engine: Engine, average: ShardedAverage) -> None:
    raw, error = engine.working(), None
    try:
        with average.swapped():
            engine.evaluate()
            raise KeyboardInterrupt
    except KeyboardInterrupt as interruption:
        error = interruption
    assert error is not None, "an interruption was swallowed"
    assert_same(engine.working(), raw, "after an interruption")


def _prove_files(average: ShardedAverage, hand: ByHand) -> None:
    with tempfile.TemporaryDirectory() as mine:
        folder: list[Any] = [mine]
        dist.broadcast_object_list(folder, src=0)
        average.save(f"{folder[0]}/average")
        average.async_save(f"{folder[0]}/later").result()
        for name in ("average", "later"):
            assert_same(load_averaged_state_dict(f"{folder[0]}/{name}"), hand.average, f"the file {name}")
        average.update(unscheduled=True)
        average.load(f"{folder[0]}/average")
        with average.summon_full_params(rank0_only=False) as full:
            assert_same(full, hand.average, "loaded")
        dist.barrier()  # the folder stays until all have read it


def done(device: torch.device) -> None:
    """Collective. Nobody leaves while another still works."""
    wait_for(device)
    dist.barrier()
