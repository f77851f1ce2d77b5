"""The average in the model, and out again: bits, pointers, errors; and full tensors and files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import torch

from sharded_avg import EMA, ShardedAverage, load_averaged_state_dict

from ..check import check
from ..devices import is_gpu
from ..reference import (
    DECAY,
    ByHand,
    Net,
    assert_same,
    batch,
    cast,
    having,
    learn,
    net,
    outputs,
    trained,
    weights,
)

STEPS = 4


def started(
    device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Net, torch.optim.Optimizer, ShardedAverage, ByHand]:
    """A model after some steps, its average, and the same by hand."""
    model = net(device, dtype)
    # Adam's epsilon is nothing in fp16.
    kind = torch.optim.AdamW if dtype == torch.float32 else torch.optim.SGD
    optimizer = kind(trained(model).values(), lr=0.01)
    average, hand = ShardedAverage(model, EMA(decay=DECAY, warmup=True)), ByHand()
    for step in range(STEPS):
        learn(model, optimizer, batch(step, device, dtype))
        assert average.update()
        hand.take(trained(model))
    return model, optimizer, average, hand


@check("pointers stay, forward computes with the average, and training goes on as if there had been no swap")
def there_and_back(device: torch.device) -> None:
    model, optimizer, average, hand = started(device)
    twin, twins_optimizer, _, _ = started(device)
    for step in range(STEPS, STEPS + 3):
        raw, x = weights(model), batch(100, device)
        pointers = {name: param.data_ptr() for name, param in trained(model).items()}
        with having(model, hand.average):
            expected = outputs(model, x)
        before = outputs(model, x)
        with average.swapped():
            assert_same(trained(model), hand.average, "inside")
            assert torch.equal(outputs(model, x), expected), "forward inside"
            assert pointers == {name: param.data_ptr() for name, param in trained(model).items()}, "moved inside"
        assert_same(trained(model), raw, "outside")
        assert pointers == {name: param.data_ptr() for name, param in trained(model).items()}, "moved"
        assert torch.equal(outputs(model, x), before), "forward outside"
        assert not torch.equal(expected, before), "the average computes what the weights do, so nothing is shown"
        for one, its_optimizer in ((model, optimizer), (twin, twins_optimizer)):
            learn(one, its_optimizer, batch(step, device))
        assert_same(trained(model), weights(twin), "training after a swap")
        average.update()
        hand.take(trained(model))


def _raise(error: BaseException) -> None:
    raise error


def _exhaust(device: torch.device) -> None:
    """Memory of the device, or what a CPU says in its stead."""
    torch.empty(1 << 50, dtype=torch.uint8, device=device)


@check("whatever is raised inside, out-of-memory and Ctrl-C too, the raw weights are back bit for bit")
def exceptions(device: torch.device) -> str:
    model, _, average, hand = started(device)
    bodies: dict[str, Callable[[], None]] = {
        "ValueError": lambda: _raise(ValueError("in the block")),
        "KeyboardInterrupt": lambda: _raise(KeyboardInterrupt()),
        "SystemExit": lambda: _raise(SystemExit(1)),
        "out of memory": lambda: _exhaust(device),
    }
    raw = weights(model)
    for name, body in bodies.items():
        try:
            with average.swapped():
                assert_same(trained(model), hand.average, "inside")
                body()
        except BaseException as error:
            if isinstance(error, AssertionError):
                raise
        else:
            raise AssertionError(f"{name} was swallowed")
        assert_same(trained(model), raw, f"after {name}")
    with average.swapped():
        assert_same(trained(model), hand.average, "the average after all of them")
    return ", ".join(bodies)


@check("bf16 and fp16 weights with an fp32 average: rounded once inside, never in the average, raw bits back")
def low_precision(device: torch.device) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model, optimizer, average, hand = started(device, dtype)
        for step in range(3):
            raw = weights(model)
            with average.swapped():
                assert_same(trained(model), cast(hand.average, raw), f"{dtype}, inside")
            assert_same(trained(model), raw, f"{dtype}, outside")
            with average.summon_full_params(offload_to_cpu=False) as full:
                assert_same(full, hand.average, f"{dtype}, average")
            learn(model, optimizer, batch(50 + step, device, dtype))
            average.update()
            hand.take(trained(model))


@check("summon_full_params(offload_to_cpu=True, False): devices, bits, strict-loadable; edits are written back")
def full_params(device: torch.device) -> None:
    model, _, average, hand = started(device)
    for offload in (True, False):
        with average.summon_full_params(offload_to_cpu=offload) as full:
            assert_same(full, hand.average, f"offload_to_cpu={offload}")
            assert_same(full, {"frozen.mix.weight": model.frozen.mix.weight.detach()}, "frozen")
            expected = torch.device("cpu") if offload else device
            places = {value.device.type for name, value in full.items() if name in hand.average}
            assert places == {expected.type}, f"offload_to_cpu={offload}: on {places}"
            Net().load_state_dict(full, strict=True)
    with average.summon_full_params(writeback=True) as full:
        full["last.bias"].add_(1.0)
    hand.average["last.bias"] += 1.0
    with average.swapped():
        assert_same(trained(model), hand.average, "after an edit")


@check("save, load into another model on this device, load_averaged_state_dict without one: the same bits")
def files(device: torch.device) -> None:
    _, _, average, hand = started(device)
    with tempfile.TemporaryDirectory() as folder:
        average.save(f"{folder}/average")
        assert_same(load_averaged_state_dict(f"{folder}/average"), hand.average, "load_averaged_state_dict")
        for where in (None, "cpu"):
            model = net(device)
            other = ShardedAverage(model, EMA(decay=DECAY, warmup=True), device=where)
            other.load(f"{folder}/average")
            assert other.n_averaged == average.n_averaged
            with other.swapped():
                assert_same(trained(model), hand.average, f"loaded, device={where}")
                assert all(param.device.type == device.type for param in model.parameters())
            again = ByHand()
            again.average, again.n = hand.clone(), hand.n
            with torch.no_grad():
                model.last.bias.add_(1.0)
            other.update()
            again.take(trained(model) if where is None or not is_gpu(device) else _on_cpu(model, again))
            with other.summon_full_params(offload_to_cpu=False) as full:
                assert_same(full, again.average, f"an update after loading, device={where}")


def _on_cpu(model: Net, hand: ByHand) -> dict[str, torch.Tensor]:
    """Averages in host memory are computed by the CPU, whose last bits may differ from the GPU's."""
    hand.average = {name: value.cpu() for name, value in hand.average.items()}
    return {name: param.detach().cpu() for name, param in trained(model).items()}
