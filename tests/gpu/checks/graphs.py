"""CUDA graphs and torch.compile read the memory that they know: pointers stay, and nothing is compiled again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sharded_avg import EMA, ShardedAverage

from ..check import check, optional
from ..devices import is_gpu, wait_for
from ..reference import DECAY, ByHand, assert_same, batch, ema, having, learn, loss_of, net, trained, weights

STEPS = 4
WARM_UPS = 5  # a CUDA graph of torch.compile's own is warmed up, then recorded, then replayed
ROOM = "graphs"


@check("a captured forward, replayed: the average inside, the raw weights outside", room=ROOM, needs_gpu=True)
def cuda_graph(device: torch.device) -> None:
    model = net(device).eval()
    average, hand = ShardedAverage(model, EMA(decay=DECAY)), ByHand(ema)
    average.update()
    hand.take(trained(model))
    x = batch(0, device)
    replay = _captured(model, x)
    for step in range(STEPS):
        _change(model, step)
        average.update()
        hand.take(trained(model))
        x.copy_(batch(step, device))
        before = replay()
        with having(model, hand.average):
            expected = replay()
        with average.swapped():
            assert torch.equal(replay(), expected), f"inside, step {step}"
        assert torch.equal(replay(), before), f"outside, step {step}"
        assert not torch.equal(expected, before), "the average computes what the weights do, so nothing is shown"


def _captured(model: torch.nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """The model's forward of whatever is in `x`, as a graph; its replay gives a clone of the output."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            model(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        output = model(x)

    def replay() -> Tensor:
        graph.replay()
        result: Tensor = output.clone()
        return result

    return replay


@torch.no_grad()
def _change(model: torch.nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in trained(model).values():
        param.add_(0.1 * torch.randn(param.shape, generator=generator).to(param.device))


@check("a whole training step as one graph, with updates and swaps between replays", room=ROOM, needs_gpu=True)
def graphed_step(device: torch.device) -> None:
    model, optimizer, x, step_graph = _graphed_training(device)
    twin, twins_optimizer, twins_x, twins_graph = _graphed_training(device)
    average, hand = ShardedAverage(model, EMA(decay=DECAY, warmup=True)), ByHand()
    for step in range(STEPS):
        for input_, graph in ((x, step_graph), (twins_x, twins_graph)):
            input_.copy_(batch(step, device))
            graph.replay()
        average.update()
        hand.take(trained(model))
        raw = weights(model)
        with average.swapped():
            assert_same(trained(model), hand.average, f"inside, step {step}")
        assert_same(trained(model), raw, f"outside, step {step}")
        assert_same(trained(model), weights(twin), f"beside a training without an average, step {step}")
    assert not torch.equal(weights(model)["last.bias"], weights(net(device))["last.bias"]), "the graph trains nothing"
    assert optimizer.state, "kept to here: the graph writes to it"
    assert twins_optimizer.state


def _graphed_training(
    device: torch.device,
) -> tuple[torch.nn.Module, torch.optim.Optimizer, Tensor, torch.cuda.CUDAGraph]:
    model, x = net(device), batch(0, device)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.01, capturable=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.zero_grad(set_to_none=True)
            loss_of(model(x)).backward()
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss_of(model(x)).backward()
        optimizer.step()
    return model, optimizer, x, graph


@check("torch.compile: the average inside, raw bits outside, and not one more graph", room=ROOM, limit_s=120.0)
def compiled(device: torch.device) -> str:
    if is_gpu(device):
        optional("triton")
    backend = "inductor" if is_gpu(device) else "aot_eager"
    return _prove_compiled(device, partial(torch.compile, backend=backend)) + f", {backend}"


@check(
    "torch.compile(mode='reduce-overhead'): CUDA graphs of its own replay the average, and are not recorded again",
    room=ROOM,
    needs_gpu=True,
    limit_s=120.0,
)
def reduce_overhead(device: torch.device) -> str:
    optional("triton")
    return _prove_compiled(device, partial(torch.compile, mode="reduce-overhead"))


def _prove_compiled(device: torch.device, compile_: Callable[..., Any]) -> str:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = net(device)
    fast: Any = compile_(model)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.01)
    average, hand = ShardedAverage(model, EMA(decay=DECAY, warmup=True)), ByHand()
    pointers = {name: param.data_ptr() for name, param in trained(model).items()}
    for step in range(WARM_UPS):  # compiles: training, evaluation
        _train_and_evaluate(fast, optimizer, batch(step, device))
        average.update()
        hand.take(trained(model))
    graphs, recorded = counters["stats"]["unique_graphs"], _recordings(counters)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(WARM_UPS, WARM_UPS + STEPS):
            x, raw = batch(step, device), weights(model)
            before = _evaluated(fast, x)
            with having(model, hand.average):
                expected = _evaluated(fast, x)
            with average.swapped():
                assert_same(trained(model), hand.average, f"inside, step {step}")
                assert torch.equal(_evaluated(fast, x), expected), f"forward inside, step {step}"
            assert_same(trained(model), raw, f"outside, step {step}")
            assert torch.equal(_evaluated(fast, x), before), f"forward outside, step {step}"
            assert not torch.equal(expected, before), "the average computes what the weights do, so nothing is shown"
            _train_and_evaluate(fast, optimizer, x)
            average.update()
            hand.take(trained(model))
    wait_for(device)
    assert counters["stats"]["unique_graphs"] == graphs, f"{counters['stats']['unique_graphs']} graphs, not {graphs}"
    assert _recordings(counters) == recorded, f"recorded again: {_recordings(counters)}, not {recorded}"
    assert pointers == {name: param.data_ptr() for name, param in trained(model).items()}, "moved"
    noted = "".join(f", {name} {count}" for name, count in recorded.items())
    return f"{graphs} graphs before and after{noted}"


def _recordings(counters: Any) -> dict[str, int]:
    """What inductor counts of its CUDA graphs: left out, or recorded anew because an input moved."""
    return {name: count for name, count in counters["inductor"].items() if "cudagraph" in name}


def _train_and_evaluate(fast: Any, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    torch.compiler.cudagraph_mark_step_begin()
    learn(fast, optimizer, x)
    _evaluated(fast, x)


def _evaluated(fast: Any, x: Tensor) -> Tensor:
    torch.compiler.cudagraph_mark_step_begin()
    with torch.no_grad():
        result: Tensor = fast(x).clone()
    return result
