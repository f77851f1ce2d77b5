"""What ZeroLayout notices while it lives, and what it refuses from the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sharded_avg.errors import EngineVersionError, LayoutChangedError, ShardedAvgError, UnsupportedModelError
from sharded_avg.weights.layouts.detect import detect
from sharded_avg.weights.layouts.zero import ZeroLayout, looks_like_zero
from tests.helpers.pool import on_ranks
from tests.helpers.zero_engines import assert_same, engine_of, every_stage, gathered, settings, train

# --- what moves, and what is refused -------------------------------------------------------------------------------


@every_stage
@on_ranks(2, kind="deepspeed")
def test_destroyed_engine(name: str) -> None:
    with engine_of(settings(name)) as engine:
        layout = ZeroLayout(engine)
        train(engine, range(1))
        assert layout.is_current()
        engine.destroy()
        if name.startswith("0"):
            return  # DeepSpeed keeps no trace of it there, and the weights are whole and in place
        assert not layout.is_current()
        with pytest.raises(LayoutChangedError, match=r"engine\.destroy\(\)"):
            layout.shards()
        with pytest.raises(UnsupportedModelError, match=r"engine\.destroy\(\)"):
            ZeroLayout(engine)


@pytest.mark.parametrize("name", ["1-bf16", "2-bf16"])
@on_ranks(2, kind="deepspeed")
def test_states_that_were_offloaded(name: str) -> None:
    with engine_of(settings(name)) as engine:
        layout = ZeroLayout(engine)
        if not hasattr(engine.optimizer, "offload_states"):
            pytest.skip("stages 1 and 2 of DeepSpeed 0.16 cannot")
        engine.optimizer.offload_states(pin_memory=False)
        with pytest.raises(LayoutChangedError, match=r"engine\.reload_states\(\)"):
            layout.shards()
        engine.optimizer.reload_states()
        masters = gathered(layout, lambda shard: shard.tensor)
        assert layout.is_current()
        train(engine, range(1))
        assert layout.is_current()
        assert not torch.equal(gathered(layout, lambda shard: shard.tensor)["wide.weight"], masters["wide.weight"])


@every_stage
@on_ranks(2, kind="deepspeed")
def test_checkpoints_leave_shards_in_place(name: str, tmp_path: Path) -> None:
    with engine_of(settings(name)) as engine:
        layout = ZeroLayout(engine)
        train(engine, range(1))
        engine.save_checkpoint(str(tmp_path))
        masters = gathered(layout, lambda shard: shard.tensor)
        train(engine, range(1, 2))
        engine.load_checkpoint(str(tmp_path))
        assert layout.is_current()
        assert_same(gathered(layout, lambda shard: shard.tensor), masters)


@on_ranks(2, kind="deepspeed")
def test_replaced_weights_are_noticed() -> None:
    with engine_of(settings("2-bf16")) as engine:
        layout = ZeroLayout(engine)
        engine.module.wide.weight.data = engine.module.wide.weight.data.clone()
        assert not layout.is_current()
        with pytest.raises(LayoutChangedError, match="flat"):
            layout.shards()


@pytest.mark.parametrize("name", ["2-bf16", "3-bf16"])
@on_ranks(2, kind="deepspeed")
def test_module_instead_of_engine(name: str) -> None:
    """P83: the module inside the engine has empty or replicated parameters, and no masters."""
    with engine_of(settings(name)) as engine:
        assert looks_like_zero(engine.module)
        assert not looks_like_zero(engine)
        for build in (ZeroLayout, detect):
            with pytest.raises(UnsupportedModelError, match=r"pass the engine that deepspeed\.initialize returned"):
                build(engine.module)


@on_ranks(2, kind="deepspeed")
def test_missing_attribute_names_the_version() -> None:
    deepspeed = pytest.importorskip("deepspeed")
    with engine_of(settings("2-bf16")) as engine:
        del engine.optimizer.single_partition_of_fp32_groups
        with pytest.raises(EngineVersionError, match=rf"{deepspeed.__version__} has no .*single_partition"):
            ZeroLayout(engine)


class Stage3(nn.Module):
    """What the refusals ask an engine, without DeepSpeed."""

    mp_world_size, zenflow, has_moe_layers = 1, False, False

    def __init__(self, optimizer: str = "DeepSpeedZeroOptimizer_Stage3", **more: Any) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)
        self.optimizer = of_deepspeed(optimizer)() if optimizer else None
        for name, value in more.items():
            setattr(self.optimizer if hasattr(type(self.optimizer), name) else self, name, value)

    def zero_optimization_stage(self) -> int:
        return 3


def of_deepspeed(name: str, *bases: type) -> Any:
    body = {"__module__": "deepspeed.runtime", "swap_optimizer": False, "params_in_nvme_and_cpu": False}
    return type(name, bases or (object,), body)


Engine = of_deepspeed("DeepSpeedEngine", Stage3)


def in_files() -> Any:
    engine = Engine(params_in_nvme_and_cpu=True)
    engine.module.weight.ds_tensor = torch.empty(0)
    engine.module.weight.ds_tensor.final_location = "nvme"
    return engine


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        (of_deepspeed("PipelineEngine", Engine)(), "pipeline"),
        (of_deepspeed("DeepSpeedHybridEngine", Engine)(), "hybrid"),
        (Engine(has_moe_layers=True), "MoE"),
        (Engine(mp_world_size=2), "tensor parallel"),
        (Engine(zenflow=True), "zenflow"),
        (Engine(optimizer="SuperOffloadOptimizer_Stage3"), "super_offload"),
        (in_files(), r"weights are in files .*offload_param"),
        (Engine(optimizer="MiCS_Optimizer"), "MiCS"),
        (Engine(optimizer="NewOptimizer"), "not known"),
        (Engine(is_deepcompile_active=lambda: True), "DeepCompile"),
        (nn.Linear(2, 2), "Linear is not a DeepSpeedEngine"),
        (object(), "object is not a DeepSpeedEngine"),
    ],
)
def test_refusals(engine: Any, reason: str) -> None:
    """What would be averaged wrongly is refused at construction, with a reason."""
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        ZeroLayout(engine)
    assert isinstance(caught.value, ShardedAvgError)


def test_claims_engines_only() -> None:
    assert ZeroLayout.claims(Engine())
    assert ZeroLayout.claims(of_deepspeed("PipelineEngine", Engine)())
    assert not ZeroLayout.claims(nn.Linear(2, 2))
    assert not ZeroLayout.claims(Stage3())
    assert not looks_like_zero(nn.Linear(2, 2))
