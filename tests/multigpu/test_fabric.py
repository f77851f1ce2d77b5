"""Lightning Fabric: what `Fabric.setup` returns, under each of its strategies, beside a plain training loop."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.torch_version import TorchVersion

from sharded_avg import EMA, CheckpointError, ShardedAverage, load_averaged_state_dict
from tests.helpers.launch import EXAMPLES, run_agents, run_python
from tests.helpers.pool import run_on_ranks
from tests.lightning.strategies import zero_config

pytest.importorskip("lightning.fabric")

DECAY = 0.75


class Net(nn.Module):
    """Odd sizes, a tied weight, a frozen one and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
        self.again = nn.Linear(3, 5, bias=False)
        self.again.weight = self.inner[0].weight
        self.fixed = nn.Linear(5, 1)
        self.fixed.requires_grad_(False)
        self.register_buffer("shift", torch.full((5,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.fixed(self.again(self.inner(x)) + self.shift)


def plain() -> Net:
    torch.manual_seed(3)
    return Net()


def batch(step: int) -> Tensor:
    """The same on all ranks: the mean of two equal gradients is exact."""
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(step))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9, foreach=False)


def train(model: nn.Module, optimizer: Any, step: int, backward: Callable[[Tensor], None] = Tensor.backward) -> None:
    backward(model(batch(step)).square().mean())
    optimizer.step()
    optimizer.zero_grad()


def expected(num_steps: int) -> tuple[Net, dict[str, Tensor]]:
    """A plain model after `num_steps`, and the full state with the average of its trained weights, kept by hand."""
    model = plain()
    optimizer, average = sgd(model), {}
    for step in range(num_steps):
        train(model, optimizer, step)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                live = parameter.detach().clone()
                average[name] = torch.lerp(average[name], live, 1 - DECAY) if name in average else live
    average["again.weight"] = average["inner.0.weight"]
    return model, {name: average.get(name, value) for name, value in model.state_dict().items()}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert list(left) == list(right)
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


# --- strategies on CPUs ----------------------------------------------------------------------------------------------


def fsdp() -> Any:
    from lightning.fabric.strategies import FSDPStrategy

    class OnCPU(FSDPStrategy):
        """Tells FSDP1 that it runs on CPUs."""

        def setup_module(self, module: nn.Module) -> nn.Module:
            return FullyShardedDataParallel(module, device_id=torch.device("cpu"), **self._fsdp_kwargs)

    return OnCPU(process_group_backend="gloo", use_orig_params=True)


def model_parallel() -> Any:
    from lightning.fabric.strategies import ModelParallelStrategy

    def shard(model: nn.Module, mesh: Any) -> nn.Module:
        sharded = fully_shard(model, mesh=mesh["data_parallel"])
        if TorchVersion(torch.__version__) < (2, 13):  # its gloo sums where FSDP2 asks it to average
            sharded.set_force_sum_reduction_for_comms(True)
        return sharded  # type: ignore[no-any-return]

    return ModelParallelStrategy(shard, data_parallel_size=dist.get_world_size(), tensor_parallel_size=1)


def zero(stage: int) -> Any:
    from lightning.fabric.strategies import DeepSpeedStrategy

    class OnCPU(DeepSpeedStrategy):
        """Each rank is a CPU with a number, and nobody asks whether it is a GPU."""

        @property
        def root_device(self) -> torch.device:
            return torch.device("cpu", self.local_rank)

        def setup_environment(self) -> None:
            self.accelerator.setup_device(self.root_device)
            self._set_world_ranks()
            self._init_deepspeed_distributed()
            self._format_config()

        def module_to_device(self, module: nn.Module) -> None:
            pass

    return OnCPU(config=zero_config(stage), process_group_backend="gloo")


STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": lambda: "ddp",
    "fsdp": fsdp,
    "model_parallel": model_parallel,
    "deepspeed_2": lambda: zero(2),
    "deepspeed_3": lambda: zero(3),
}


@contextmanager
def set_up(strategy: str) -> Any:
    """Fabric, and what its `setup` makes of a plain model and its optimizer."""
    from lightning.fabric import Fabric

    made = STRATEGIES[strategy]() if strategy != "single" else "auto"
    num_ranks = dist.get_world_size() if strategy != "single" else 1
    fabric = Fabric(accelerator="cpu", devices=num_ranks, strategy=made)
    fabric.launch()
    module = plain()
    if strategy in ("fsdp", "model_parallel"):
        model = fabric.setup_module(module)
        optimizer = fabric.setup_optimizers(sgd(model))
    else:
        model, optimizer = fabric.setup(module, sgd(module), _reapply_compile=False)
    assert type(model).__name__ == "_FabricModule"
    try:
        yield fabric, model, optimizer
    finally:
        if strategy.startswith("deepspeed"):
            model._forward_module.destroy()


# --- the tests -------------------------------------------------------------------------------------------------------


def check(strategy: str, path: Path) -> None:
    """On each rank."""
    with set_up(strategy) as (fabric, model, optimizer):
        average = ShardedAverage(model, EMA(decay=DECAY))
        for step in range(3):
            assert step == 0 or not strategy.startswith("deepspeed") or not average.update()
            train(model, optimizer, step, fabric.backward)
            assert average.update()
        with pytest.raises(CheckpointError, match=r"call average\.save\(folder\) beside fabric\.save"):
            fabric.save(path / "state", {"model": model, "average": average})
        raw, full = expected(3)
        check_values(average, model, raw, full)
        numel = sum(p.numel() for p in plain().parameters() if p.requires_grad)
        share = average.nbytes / 4 / numel
        assert share == 1 if strategy == "single" else 0.3 <= share <= 0.7  # cut by rows: 3 of 5
        average.save(path / "average")
        on_disk = {name: value for name, value in full.items() if not name.startswith("fixed") and name != "shift"}
        assert_equal(load_averaged_state_dict(path / "average"), on_disk)
        again = ShardedAverage(model, EMA(decay=DECAY))
        again.load(path / "average")
        check_values(again, model, raw, full)
        train(model, optimizer, 3, fabric.backward)  # training goes on
        average.update()
        check_values(average, model, *expected(4))


def check_values(average: ShardedAverage, model: nn.Module, raw: Net, full: dict[str, Tensor]) -> None:
    """Keys are the plain model's; forward through Fabric's wrapper computes with the average, and then without."""
    with average.summon_full_params(rank0_only=False) as found:
        assert_equal(found, full)
        plain().load_state_dict(found)
    mean = plain()
    mean.load_state_dict(full)
    model.eval()
    with torch.no_grad():
        with average.swapped():
            assert torch.equal(model(batch(9)), mean(batch(9)))
        assert torch.equal(model(batch(9)), raw(batch(9)))
    model.train()


def test_one_device(tmp_path: Path) -> None:
    """R05: one device: the plain model's keys."""
    check("single", tmp_path)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies(strategy: str, tmp_path: Path) -> None:
    """R05: the plain model's keys, divided; each step counted; an error on all ranks where pickling loses pieces."""
    kind = "deepspeed" if strategy.startswith("deepspeed") else "torch"
    if kind == "deepspeed":
        pytest.importorskip("deepspeed")
    run_on_ranks(2, check, kind=kind, strategy=strategy, path=tmp_path)


@pytest.mark.own_processes
@pytest.mark.parametrize(("strategy", "devices"), [("auto", 1), ("ddp", 2)])
def test_example(strategy: str, devices: int, tmp_path: Path) -> None:
    """R05: the loop that docs/lightning.md points to, as a stranger runs it."""
    pytest.importorskip("sklearn")
    script = [
        str(EXAMPLES / "fabric_loop.py"),
        "--devices",
        str(devices),
        "--strategy",
        strategy,
        "--out",
        str(tmp_path),
    ]
    if devices == 1:
        job = run_python(script, tmp_path, timeout_s=200)
    else:
        [job] = run_agents([["--standalone", f"--nproc_per_node={devices}", *script]], tmp_path, timeout_s=200)
    assert job.code == 0, job.output
    [(raw, averaged)] = re.findall(r"^epoch 3: raw loss (\S+), averaged loss (\S+)$", job.output, re.MULTILINE)
    assert raw != averaged
    assert f"deployed, without Fabric: loss {averaged}" in job.output
    kept = re.findall(r"^rank \d: (\d+) bytes kept$", job.output, re.MULTILINE)
    assert list(map(int, kept)) == [4 * 7210 // devices] * devices
    assert f"resumed after {4 * -(-1437 // (32 * devices))} steps" in job.output
