"""DeepSpeed engines over one awkward model: what the tests of ZeroLayout train, evaluate and gather.

CONFIGS   name -> stage, dtype, dtype of accumulated gradients, further keys of zero_optimization
write     puts other weights into what forward reads, and gives back how to restore the raw ones
gathered  full tensors from all ranks' pieces, without this package's own gathering
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharded_avg.shard import Interval, Shard, put
from sharded_avg.weights.layouts.zero import ZeroLayout

from .further import covered_by

KEPT_ELEMENTS = 8  # parameters up to this size stay gathered under stage 3
Config = dict[str, Any]


class Awkward(nn.Module):
    """Sizes 3, 5, 7, one element, tied, frozen, buffers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 5)
        self.wide = nn.Linear(5, 7)
        self.scale = nn.Parameter(torch.tensor([0.75]))
        self.narrow = nn.Linear(7, 5, bias=False)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("count", torch.arange(3))
        self.register_buffer("shift", torch.full((5,), 0.125))
        self.register_buffer("cache", torch.zeros(3), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = self.frozen(x + self.narrow(torch.tanh(self.wide(x)) * self.scale))
        return self.head(x + self.shift.to(x.dtype))  # DeepSpeed leaves buffers in fp32


# name -> stage, dtype, dtype of accumulated gradients, and further keys of zero_optimization
CONFIGS: dict[str, tuple[int, str, str | None, Config]] = {
    "0-fp32": (0, "fp32", None, {}),
    "0-bf16": (0, "bf16", None, {}),
    "1-fp32": (1, "fp32", None, {}),
    "1-bf16": (1, "bf16", "bf16", {}),
    "1-bf16-fp32grads": (1, "bf16", "fp32", {}),  # BF16_Optimizer
    "1-bf16-roundrobin": (1, "bf16", "bf16", {"round_robin_gradients": True}),
    "2-fp32": (2, "fp32", None, {}),
    "2-bf16": (2, "bf16", None, {}),
    "2-bf16-roundrobin": (2, "bf16", None, {"round_robin_gradients": True}),
    "2-bf16-aligned": (2, "bf16", None, {"parameter_alignment": True}),
    "2-bf16-offload": (2, "bf16", None, {"offload_optimizer": {"device": "cpu"}}),
    "3-fp32": (3, "fp32", None, {}),
    "3-bf16": (3, "bf16", None, {}),
    "3-bf16-nothing-kept": (3, "bf16", None, {"stage3_param_persistence_threshold": 0}),
    "3-bf16-all-kept": (3, "bf16", None, {"stage3_param_persistence_threshold": 10**6}),
    "3-bf16-subgroups": (3, "bf16", None, {"sub_group_size": 20}),
    "3-bf16-hpz": (3, "bf16", None, {"zero_hpz_partition_size": 2}),
    "3-bf16-offload": (3, "bf16", None, {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}),
}
ONE_PER_STAGE = ["0-bf16", "1-bf16-fp32grads", "2-bf16-roundrobin", "3-bf16"]
every_stage = pytest.mark.parametrize("name", ONE_PER_STAGE)
two_stages = pytest.mark.parametrize("name", covered_by(("2-bf16-roundrobin", "3-bf16"), ONE_PER_STAGE))
# One for each optimizer that DeepSpeed makes, and for each place where it keeps masters and weights.
COVER = [
    *ONE_PER_STAGE,
    "2-fp32",
    "2-bf16-offload",
    "3-bf16-all-kept",
    "3-bf16-subgroups",
    "3-bf16-hpz",
    "3-bf16-offload",
]
every_config = pytest.mark.parametrize("name", covered_by(COVER, CONFIGS))


def settings(name: str, **more: Any) -> Config:
    stage, dtype, grad_dtype, extra = CONFIGS[name]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,  # 1.0 by default
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": KEPT_ELEMENTS, **extra},
    }
    if dtype != "fp32":
        config[dtype] = {"enabled": True}
    if grad_dtype is not None:
        config["data_types"] = {"grad_accum_dtype": grad_dtype}
    return config | more


def two_groups(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": params[:2]}, {"params": params[2:], "lr": 0.02}], lr=0.01)


def plain_model() -> nn.Module:
    torch.manual_seed(5)
    return Awkward()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


@contextmanager
def engine_of(config: Config, model: nn.Module | None = None, optimizer: Any = None, **more: Any) -> Iterator[Any]:
    """A DeepSpeedEngine over `plain_model()`, destroyed afterwards. Without an optimizer, `config` may have one."""
    deepspeed = pytest.importorskip("deepspeed")
    model = plain_model() if model is None else model
    if optimizer is None and "optimizer" in config:
        more["model_parameters"] = trained(model)
    else:
        more["optimizer"] = two_groups(trained(model)) if optimizer is None else optimizer
    engine = deepspeed.initialize(model=model, config=config, **more)[0]
    try:
        yield engine
    finally:
        engine.destroy()


@contextmanager
def groups_kept() -> Iterator[None]:
    """DeepSpeed's groups and mesh stay for the life of a process: AutoTP's and those of `mesh_param` go after this."""
    groups = pytest.importorskip("deepspeed").utils.groups
    known = {name: value for name, value in vars(groups).items() if name.startswith("_") and name.isupper()}
    try:
        yield
    finally:
        vars(groups).update(known)
        groups.mesh_device = groups.mpu = None


def tokens(step: int, rank: int) -> Tensor:
    return torch.randint(0, 7, (2, 3), generator=torch.Generator().manual_seed(10 * step + rank))


def loss_of(logits: Tensor) -> Tensor:
    return logits.float().square().mean()


def train(engine: Any, steps: range) -> None:
    for step in steps:
        engine.train()
        engine.backward(loss_of(engine(tokens(step, dist.get_rank()))))
        engine.step()


def evaluate(engine: Any) -> Tensor:
    """A forward without backward, as validation does: under stage 3 it leaves gathered copies."""
    engine.eval()
    with torch.no_grad():
        logits: Tensor = engine(torch.arange(6).view(2, 3))
        return logits.clone()


def gathered(layout: ZeroLayout, value: Callable[[Shard], Tensor]) -> dict[str, Tensor]:
    """Full tensors from all ranks' pieces, by plain calls; regions must cover each exactly once."""
    full = {}
    for shard in layout.shards():
        rows: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(rows, (shard.region, value(shard).clone()))
        tensor = torch.empty(shard.shape, dtype=rows[0][1].dtype)
        for region, values in dict(rows).items():  # replicas report equal regions
            assert values.shape == ((region.numel,) if isinstance(region, Interval) else tuple(region.lengths))
            put(tensor, region, values)
        assert sum(region.numel for region in dict(rows)) == tensor.numel(), shard.name
        full[shard.name] = tensor
    return full


def plain_forward(layout: ZeroLayout) -> Tensor:
    """What a plain model computes with the weights that are live now."""
    weights = gathered(layout, lambda shard: shard.target)
    model = Awkward().to(weights["table.weight"].dtype).eval()
    model.load_state_dict(weights | {alias: weights[name] for alias, name in layout.aliases.items()})
    with torch.no_grad():
        logits: Tensor = model(torch.arange(6).view(2, 3))
    return logits


@torch.no_grad()
def write(layout: ZeroLayout) -> Callable[[], None]:
    """Put other weights into what forward reads; what is returned restores the raw ones, from masters if any."""
    layout.release()
    shards = [shard for shard in layout.shards() if shard.trainable]
    raw = [shard.target.clone() for shard in shards]
    for shard in shards:
        shard.target.mul_(0.5).add_(0.125)
    layout.publish()

    @torch.no_grad()
    def restore() -> None:
        layout.release()
        for shard, values in zip(shards, raw, strict=True):
            shard.target.copy_(values if shard.working is None else shard.tensor)
        layout.publish()

    return restore


def masters_after(config: Config, steps: int) -> dict[str, Tensor]:
    """Trained without this package touching anything in between."""
    with engine_of(config) as engine:
        train(engine, range(steps))
        return gathered(ZeroLayout(engine), lambda shard: shard.tensor)


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name
