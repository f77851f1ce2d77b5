"""What happens around averages in a training: steps that a scaler leaves out, BatchNorm."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from sharded_avg import EMA, ShardedAverage, refreshed_batch_norm

from ..check import check
from ..devices import is_gpu
from ..reference import DECAY, ByHand, assert_same, batch, loss_of, net, trained, weights

OVERFLOWS = (1, 4)  # steps whose gradients are infinite
STEPS = 7


@check("GradScaler: a step that it leaves out changes no weight, and updates of real steps have the formula's bits")
def scaler(device: torch.device) -> str:
    kinds = {"foreach": {"foreach": True}} | ({"fused": {"fused": True}} if is_gpu(device) else {})
    for name, options in kinds.items():
        model = net(device)
        optimizer = torch.optim.AdamW(trained(model).values(), lr=0.01, **options)
        grad_scaler = torch.amp.GradScaler(device.type, init_scale=16.0)
        average, hand = ShardedAverage(model, EMA(decay=DECAY, warmup=True)), ByHand()
        for step in range(STEPS):
            before = weights(model)
            with torch.autocast(device.type, dtype=torch.float16 if is_gpu(device) else torch.bfloat16):
                loss = loss_of(model(batch(step, device)))
            grad_scaler.scale(loss * (float("inf") if step in OVERFLOWS else 1.0)).backward()
            grad_scaler.step(optimizer)
            scale = grad_scaler.get_scale()
            grad_scaler.update()
            optimizer.zero_grad()
            stepped = grad_scaler.get_scale() >= scale
            assert stepped == (step not in OVERFLOWS), f"{name}: step {step}"
            if stepped:
                assert average.update()
                hand.take(trained(model))
            else:
                assert_same(trained(model), before, f"{name}: a skipped step")
            with average.swapped():
                assert_same(trained(model), hand.average, f"{name}: inside, step {step}")
        assert average.num_steps == STEPS - len(OVERFLOWS)
    return ", ".join(kinds)


def _normalised(device: torch.device) -> nn.Module:
    torch.manual_seed(5)
    layers = [nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.ReLU(), nn.Dropout(0.25), nn.Flatten(), nn.Linear(7 * 36, 5)]
    return nn.Sequential(*layers).to(device)


def _images(step: int, device: torch.device) -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step)).to(device)


@check("refreshed_batch_norm: the statistics of torch's update_bn; all is back, random numbers of the device too")
def batch_norm(device: torch.device) -> None:
    model = _normalised(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = ShardedAverage(model, EMA(decay=DECAY))
    for step in range(3):
        loss_of(model(_images(step, device))).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update()
    batches = [_images(10 + i, device) for i in range(3)]
    live = {name: value.clone() for name, value in model.state_dict().items()}
    with average.swapped():
        twin = deepcopy(model)
        random_state = _random_state(device)
        with refreshed_batch_norm(model, batches):
            found = {name: value.clone() for name, value in model.state_dict().items()}
            assert torch.equal(_random_state(device), random_state), "random numbers inside"
        assert torch.equal(_random_state(device), random_state), "random numbers"
        update_bn(batches, twin)
    assert_same(found, twin.state_dict(), "inside")
    assert not torch.equal(found["1.running_var"], live["1.running_var"]), "nothing was recomputed"
    assert_same(model.state_dict(), live, "outside")
    assert all(module.training for module in model.modules())


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if is_gpu(device) else torch.get_rng_state()
