"""What is proved of every engine: the average is that of full tensors, a swap is seen by forward and leaves nothing.

Files hold the same, and a training with swaps has the weights of one without.
"""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_avg import EMA, ShardedAverage, load_averaged_state_dict

from .devices import no_syncs
from .engines import STEPS, Engine, Make
from .reference import DECAY, ByHand, Net, State, assert_same, batch, cast, outputs


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
