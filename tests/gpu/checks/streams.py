"""The host runs ahead of the GPU: what is swapped, gathered or saved right after a step has that step in it."""

from __future__ import annotations

import tempfile

import torch

from sharded_avg import EMA, ShardedAverage, load_averaged_state_dict

from ..check import check
from ..devices import keep_busy, streams, wait_for
from ..reference import DECAY, ByHand, assert_same, batch, learn, net, outputs, trained, weights

STEPS = 4


@check("swap and forward right after optimizer.step() on a busy GPU, on the default and on another stream")
def swap_after_step(device: torch.device) -> str:
    for name, stream in streams(device).items():
        model = net(device)
        optimizer = torch.optim.AdamW(trained(model).values(), lr=0.01)
        average, hand = ShardedAverage(model, EMA(decay=DECAY, warmup=True)), ByHand()
        seen = []
        with stream:
            for step in range(STEPS):
                keep_busy(device)
                learn(model, optimizer, batch(step, device))
                average.update()
                hand.take(trained(model))
                raw = weights(model)
                with average.swapped():
                    seen.append((weights(model), hand.clone(), "inside"))
                    outputs(model, batch(step, device))
                seen.append((weights(model), raw, "outside"))
        wait_for(device)
        for found, expected, where in seen:
            assert_same(found, expected, f"{name}, {where}")
    return " and ".join(streams(device))


@check("full tensors gathered right after a step are read by the host at once, and are those of that step")
def gather_after_step(device: torch.device) -> str:
    for name in streams(device):
        for where in (None, "cpu"):
            model = net(device)
            optimizer = torch.optim.AdamW(trained(model).values(), lr=0.01)
            average, hand = ShardedAverage(model, EMA(decay=DECAY, warmup=True), device=where), ByHand()
            with streams(device)[name]:
                for step in range(STEPS):
                    keep_busy(device)
                    learn(model, optimizer, batch(step, device))
                    average.update()
                    with average.summon_full_params(offload_to_cpu=True) as full:
                        at_once = {key: full[key].clone() for key in trained(model)}
                    hand.take({key: value.to(where or device) for key, value in weights(model).items()})
                    assert_same(at_once, hand.average, f"{name}, device={where}, step {step}")
    return f"{' and '.join(streams(device))}, averages on the device and in host memory"


@check("async_save right after a step, then more updates at once: the file has the average of that step")
def save_after_step(device: torch.device) -> None:
    for where in (None, "cpu"):
        model = net(device)
        optimizer = torch.optim.AdamW(trained(model).values(), lr=0.01)
        average, hand = ShardedAverage(model, EMA(decay=DECAY, warmup=True), device=where), ByHand()
        with tempfile.TemporaryDirectory() as folder:
            for step in range(STEPS):
                keep_busy(device)
                learn(model, optimizer, batch(step, device))
                average.update()
                pending = average.async_save(f"{folder}/step{step}")
                live = weights(model)
                for _ in range(3):
                    with torch.no_grad():
                        torch._foreach_mul_(list(trained(model).values()), 1.25)
                    average.update()
                hand.take({key: value.to(where or device) for key, value in live.items()})
                pending.result()
                assert_same(load_averaged_state_dict(f"{folder}/step{step}"), hand.average, f"device={where}")
                for _ in range(3):
                    for key in live:
                        live[key] = live[key] * 1.25
                    hand.take({key: value.to(where or device) for key, value in live.items()})


@check("raw_weights, copy_to_model, restore_raw right after a step: the average for good, and the raw bits back")
def for_good_after_step(device: torch.device) -> None:
    model = net(device)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.01)
    average, hand = ShardedAverage(model, EMA(decay=DECAY, warmup=True)), ByHand()
    for step in range(STEPS):
        keep_busy(device)
        learn(model, optimizer, batch(step, device))
        average.update()
        raw = average.raw_weights()
        expected = weights(model)
        hand.take(expected)
        average.copy_to_model(undo=raw)
        assert_same(trained(model), hand.average, "the average")
        assert average.restore_raw(raw), "restore_raw did not know the weights"
        assert_same(trained(model), expected, "the raw weights")
