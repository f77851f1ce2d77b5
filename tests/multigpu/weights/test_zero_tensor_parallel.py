"""AutoTP: parameters cut over tensor-parallel ranks, and what is left over data-parallel ones.

The reference knows nothing of this package: each rank's masters as DeepSpeed hands them out, joined by hand along dims
that are written down here, and averaged as full tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharded_avg import EMA, ShardedAverage, load_averaged_state_dict
from sharded_avg.errors import ReplicaError, UnsupportedModelError
from tests.helpers.further import further
from tests.helpers.pool import on_ranks
from tests.helpers.zero_engines import assert_same, evaluate, groups_kept, loss_of, trained
from tests.helpers.zero_engines import engine_of as an_engine_of

WIDTH, TOKENS = 6, 7
CUT = {"qkv": 0, "out": 1, "up": 0, "down": 1, "frozen": 0}  # module -> dim; of the bias 0, or not cut where this is 1
NUM_FUSED = {"qkv": 3}  # matrices that lie side by side


class Model(nn.Module):
    """A fused layer, rows and columns, a frozen layer that is cut, and what is whole everywhere."""

    def __init__(self, up: int) -> None:
        super().__init__()
        self.table = nn.Embedding(TOKENS, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, up)
        self.down = nn.Linear(up, WIDTH)
        self.frozen = nn.Linear(WIDTH, up).requires_grad_(False)
        self.back = nn.Linear(WIDTH, TOKENS, bias=False)
        self.register_buffer("shift", torch.full((WIDTH,), 0.125))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        q, k, v = self.qkv(x).chunk(3, -1)
        x = self.norm(x + self.out(torch.tanh(q) * k + v))
        x = x + self.down(torch.tanh(self.up(x)) * self.frozen(x))
        return self.back(x + self.shift.to(x.dtype))


def plain(up: int) -> Model:
    torch.manual_seed(5)
    return Model(up)


@contextmanager
def engine_of(stage: int, up: int, **more: Any) -> Iterator[Any]:
    """Tensor-parallel over pairs of ranks; DeepSpeed keeps the mesh for the life of a process."""
    version = pytest.importorskip("deepspeed").__version__
    training = pytest.importorskip("deepspeed.runtime.tensor_parallel.config").TPTrainingConfig
    if "partition_config" not in training.model_fields:
        pytest.skip(f"DeepSpeed {version} has no tensor_parallel.partition_config")
    model = plain(up)
    specs = [
        {"patterns": [r"qkv\.(weight|bias)$"], "partition_type": "column", "shape": [3, -1], "partition_dim": 0},
        {"patterns": [r"(up|frozen)\.(weight|bias)$"], "partition_type": "column"},
        {"patterns": [r"(out|down)\.weight$"], "partition_type": "row"},
    ]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 8, **more},
        "tensor_parallel": {
            "autotp_size": 2,
            "partition_config": {"use_default_specs": False, "layer_specs": specs},
        },
    }
    with groups_kept(), an_engine_of(config, model, torch.optim.AdamW(trained(model), lr=0.01)) as engine:
        yield engine


def train(engine: Any, steps: range) -> None:
    """Ranks of one pair see the same tokens."""
    for step in steps:
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank() // 2)
        engine.train()
        engine.backward(loss_of(engine(torch.randint(0, TOKENS, (2, 3), generator=generator))))
        engine.step()


def joined(engine: Any, value: Any) -> dict[str, Tensor]:
    """Collective. Full tensors of what `value` gives for each of this pair's trained parameters."""
    full = {}
    for name, param in engine.module.named_parameters():
        if not param.requires_grad:
            continue
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, value(param))
        full[name] = glued(name, ranks[:2])
    return full


def glued(name: str, pair: list[Tensor]) -> Tensor:
    module, _, kind = name.partition(".")
    dim = CUT.get(module)
    if dim is None or (dim == 1 and kind == "bias"):
        assert torch.equal(*pair), name
        return pair[0]
    fused = zip(*(part.chunk(NUM_FUSED.get(module, 1), dim) for part in pair), strict=True)
    return torch.cat([piece for pieces in fused for piece in pieces], dim)


def masters(engine: Any) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    return joined(engine, lambda param: safe_get_full_fp32_param(param).clone())


def weights(engine: Any) -> dict[str, Tensor]:
    from deepspeed.runtime.zero import GatheredParameters

    def whole(param: Any) -> Tensor:
        with GatheredParameters([param], enabled=hasattr(param, "ds_id")):
            return param.detach().clone()

    return joined(engine, whole)


def trained_of(average: ShardedAverage, slow: dict[str, Tensor]) -> dict[str, Tensor]:
    with average.summon_full_params(rank0_only=False) as full:
        assert list(full) == list(plain(12).state_dict())
        return {name: full[name].clone() for name in slow}


def trained_with(engine: Any, steps: int) -> tuple[ShardedAverage, dict[str, Tensor]]:
    average, slow = ShardedAverage(engine, EMA(decay=0.5)), dict[str, Tensor]()
    for step in range(steps):
        train(engine, range(step, step + 1))
        evaluate(engine)
        assert average.update()
        slow = {name: torch.lerp(slow.get(name, live), live, 0.5) for name, live in masters(engine).items()}
    return average, slow


def check(stage: int, up: int, path: Path, **more: Any) -> None:
    with engine_of(stage, up, **more) as engine:
        average, slow = trained_with(engine, 3)
        assert_same(trained_of(average, slow), slow)
        held = torch.tensor(average.nbytes // 4)
        dist.all_reduce(held)
        whole = sum(v.numel() for name, v in slow.items() if "norm" in name or "table" in name or "back" in name)
        whole += slow["out.bias"].numel() + slow["down.bias"].numel()
        assert held == sum(value.numel() for value in slow.values()) + whole  # what is whole on both of a pair
        raw, live = evaluate(engine), masters(engine)
        apart = torch.cat([(live[name] - slow[name]).double().view(-1) for name in slow]).norm()
        size = torch.cat([value.double().view(-1) for value in live.values()]).norm()
        assert average.distance() == pytest.approx(float(apart / size), rel=1e-6)  # each element once
        assert average.live_is_finite()
        with average.swapped():
            assert_same(weights(engine), {name: value.to(torch.bfloat16) for name, value in slow.items()})
            averaged = evaluate(engine)
            assert not torch.equal(averaged, raw)
        assert torch.equal(evaluate(engine), raw)
        assert_same(masters(engine), live)
        with average.summon_full_params(rank0_only=False) as full:  # what is not averaged is the plain model's
            first = plain(up).state_dict()
            for name in ("frozen.weight", "frozen.bias", "shift"):
                assert torch.equal(full[name].float(), first[name].to(full[name].dtype).float()), name
            plain(up).load_state_dict(full)
        average.save(path)
        saved = load_averaged_state_dict(path)
        assert_same({name: saved[name] for name in slow}, slow)
        train(engine, range(3, 5))
        end = masters(engine)
    with engine_of(stage, up, **more) as engine:  # nothing of all this has touched the training
        train(engine, range(5))
        assert_same(masters(engine), end)
        other = ShardedAverage(engine, EMA(decay=0.5))
        other.load(path)
        assert_same(trained_of(other, slow), slow)


@pytest.mark.parametrize("stage", [1, 2, 3])
@on_ranks(2, further=(4,), kind="deepspeed")
def test_an_average_under_autotp(stage: int, tmp_path: Path) -> None:
    """P82, P84: bit-equal to full masters, in the model, saved, loaded, and training as if nothing had been."""
    check(stage, 12, tmp_path / "average")


@on_ranks(further=(4,), kind="deepspeed")
def test_parts_of_several_sizes(tmp_path: Path) -> None:
    """Stage 3 divides each parameter for itself; below it, tensor-parallel ranks would divide common ones apart."""
    check(3, 7, tmp_path / "average")
    with engine_of(2, 7) as engine, pytest.raises(UnsupportedModelError, match=r"'up\.weight' into parts of several"):
        ShardedAverage(engine, EMA(decay=0.5))


@on_ranks(2, kind="deepspeed")
def test_parts_of_several_sizes_on_one_pair(tmp_path: Path) -> None:
    check(2, 7, tmp_path / "average")


@pytest.mark.parametrize(("stage", "then"), [(2, 3), further(3, 1)])
@on_ranks(further=(4,), kind="deepspeed")
def test_another_cut_goes_on(stage: int, then: int, tmp_path: Path) -> None:
    """A saved average is of full tensors: another stage loads it, and so does a plain model."""
    with engine_of(stage, 12) as engine:
        average, slow = trained_with(engine, 2)
        average.save(tmp_path / "average")
        average.copy_to_model()
        assert_same(masters(engine), slow)
        with average.summon_full_params(rank0_only=False, writeback=True) as full:
            full["qkv.weight"].add_(1)
            full["out.weight"].mul_(2)
        edited = slow | {"qkv.weight": slow["qkv.weight"] + 1, "out.weight": slow["out.weight"] * 2}
        assert_same(trained_of(average, slow), edited)
    with engine_of(then, 12) as engine:
        other = ShardedAverage(engine, EMA(decay=0.5))
        other.load(tmp_path / "average")
        assert_same(trained_of(other, slow), slow)
        other.save(tmp_path / "again")
    alone = ShardedAverage(plain(12), EMA(decay=0.5))
    alone.load(tmp_path / "again")
    assert_same(trained_of(alone, slow), slow)


@on_ranks(further=(4,), kind="deepspeed")
def test_a_replica_that_has_drifted_apart() -> None:
    """In one of two pairs only: all ranks raise, none waits."""
    with engine_of(2, 12) as engine:
        average, slow = trained_with(engine, 2)
        if dist.get_rank() == 3:
            with torch.no_grad():
                engine.module.up.bias.view(-1)[0] += 1
        with pytest.raises(ReplicaError, match=r"up\.bias"), average.swapped():
            pass
        assert_same(trained_of(average, slow), slow)


@on_ranks(2, kind="deepspeed")
def test_what_deepspeed_does_not_describe() -> None:
    with engine_of(2, 12) as engine:
        meta = engine.module.qkv.weight.ds_autotp_universal_checkpoint_meta
        meta["sub_param_shard_widths"] = None
        with pytest.raises(UnsupportedModelError, match=r"'qkv\.weight'.*slices along one dim"):
            ShardedAverage(engine, EMA(decay=0.5))
        for param in engine.module.parameters():
            if hasattr(param, "ds_autotp_universal_checkpoint_meta"):
                del param.ds_autotp_universal_checkpoint_meta
        with pytest.raises(UnsupportedModelError, match="does not say how it is cut"):
            ShardedAverage(engine, EMA(decay=0.5))
