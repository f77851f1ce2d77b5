"""How people call an engine: the module in its place, an average that was there first, checkpoints inside a swap."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharded_avg import EMA, ShardedAverage, SwapError, load_averaged_state_dict
from sharded_avg.errors import LayoutChangedError, UnsupportedModelError
from sharded_avg.weights.layouts.zero import ZeroLayout
from tests.helpers.pool import on_ranks
from tests.helpers.zero_engines import (
    ONE_PER_STAGE,
    assert_same,
    engine_of,
    evaluate,
    every_stage,
    gathered,
    groups_kept,
    plain_model,
    settings,
    train,
)

PASS_THE_ENGINE = r"pass the engine that deepspeed\.initialize returned"


@on_ranks(2, kind="deepspeed")
def test_the_module_in_place_of_the_engine() -> None:
    """R30: at stage 0 its parameters look like anybody's, and bf16 weights were averaged in place of masters."""
    for name in ("0-fp32", "0-bf16"):
        with engine_of(settings(name)) as engine:
            for model in (engine.module, torch.compile(engine.module, backend="eager"), nn.Sequential(engine.module)):
                with pytest.raises(UnsupportedModelError, match=PASS_THE_ENGINE):
                    ShardedAverage(model, EMA(decay=0.5))


@on_ranks(2, kind="deepspeed")
def test_an_average_that_was_there_before_the_engine() -> None:
    """R30: noticed at its first update, in every stage; in stage 0 nothing but a hook on the module has changed."""
    for name in ("0-fp32", *ONE_PER_STAGE):
        model = plain_model()
        average = ShardedAverage(model, EMA(decay=0.5))
        compiled = ShardedAverage(torch.compile(model, backend="eager"), EMA(decay=0.5))
        with engine_of(settings(name), model) as engine:
            train(engine, range(1))
            for older in (average, compiled):
                with pytest.raises(LayoutChangedError, match=PASS_THE_ENGINE):
                    older.update()
                assert older.num_steps == 0


@every_stage
@on_ranks(2, kind="deepspeed")
def test_a_checkpoint_inside_a_swap(name: str, tmp_path: Path) -> None:
    """R30: it had raw masters beside averaged weights: a run that resumed from it began on the average."""
    config = settings(name)
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    with engine_of(config) as engine:
        average = ShardedAverage(engine, EMA(decay=0.5))
        for step in range(3):
            train(engine, range(step, step + 1))
            average.update()
        masters = gathered(ZeroLayout(engine), lambda shard: shard.tensor)
        save = engine.save_checkpoint
        with average.swapped():
            with pytest.raises(SwapError, match=r"save_checkpoint.*save_16bit_model"):
                engine.save_checkpoint(str(tmp_path / "inside"), tag="step")
            exported = exported_by(engine, tmp_path)
            averaged = gathered(ZeroLayout(engine), lambda shard: shard.target)
        assert not (tmp_path / "inside").exists()
        assert_same({key: exported[key] for key in averaged}, averaged)
        assert engine.save_checkpoint == save
        engine.save_checkpoint(str(tmp_path / "outside"), tag="step")
        raw = evaluate(engine)
        train(engine, range(3, 4))
        engine.load_checkpoint(str(tmp_path / "outside"), tag="step")
        assert_same(gathered(ZeroLayout(engine), lambda shard: shard.tensor), masters)
        assert torch.equal(evaluate(engine), raw)


def exported_by(engine: Any, folder: Path) -> dict[str, Tensor]:
    """Collective. What `save_16bit_model` writes, as every rank reads it."""
    engine.save_16bit_model(str(folder), "weights.bin")
    dist.barrier()
    state: dict[str, Tensor] = torch.load(folder / "weights.bin", weights_only=True)
    return state


@on_ranks(2, kind="deepspeed")
def test_a_checkpoint_that_somebody_has_hooked() -> None:
    """What stood in its place is there again, also after an exception."""
    with engine_of(settings("2-bf16")) as engine:
        average = ShardedAverage(engine, EMA(decay=0.5))
        train(engine, range(1))
        average.update()
        called: list[str] = []
        engine.save_checkpoint = called.append
        with pytest.raises(SwapError, match="save_checkpoint"), average.swapped():
            engine.save_checkpoint("inside")
        engine.save_checkpoint("outside")
        assert called == ["outside"]
        del engine.save_checkpoint


@contextmanager
def on_a_mesh(stage: int, data: int, sequence: int, **more: Any) -> Iterator[Any]:
    """An engine made with `mesh_param`."""
    with groups_kept(), engine_of(settings(f"{stage}-bf16", **more), mesh_param=(data, sequence)) as engine:
        yield engine


def train_or_skip(engine: Any, step: int) -> None:
    """DeepSpeed 0.16.9 divides by one group and reduces over another: its own backward raises, on all ranks."""
    try:
        train(engine, range(step, step + 1))
    except RuntimeError as error:
        if "exceeds dimension size" not in str(error):
            raise
        pytest.skip(f"this DeepSpeed cannot train stage 3 on a mesh: {error}")


@on_ranks(2, kind="deepspeed")
def test_a_mesh_with_stage_3(tmp_path: Path) -> None:
    """R30: DeepSpeed divides parameters among all ranks there, whatever its data-parallel group is."""
    for sizes in ((1, 2), (2, 1)):
        with on_a_mesh(3, *sizes) as engine:
            average, slow = ShardedAverage(engine, EMA(decay=0.5)), dict[str, Tensor]()
            for step in range(3):
                train_or_skip(engine, step)
                assert average.update()
                live = full_masters(engine)
                slow = {key: torch.lerp(slow.get(key, value), value, 0.5) for key, value in live.items()}
            raw = evaluate(engine)
            with average.swapped():
                for key, param in engine.module.named_parameters():
                    if param.requires_grad:
                        assert torch.equal(full_of(param), slow[key].to(torch.bfloat16)), key
                assert not torch.equal(evaluate(engine), raw)
            assert torch.equal(evaluate(engine), raw)
            with average.summon_full_params(rank0_only=False) as full:
                assert_same({key: full[key] for key in slow}, slow)
            average.save(tmp_path / f"{sizes[0]}")
            saved = load_averaged_state_dict(tmp_path / f"{sizes[0]}")
            assert_same({key: saved[key] for key in slow}, slow)


@on_ranks(2, kind="deepspeed")
def test_a_mesh_whose_masters_differ() -> None:
    """R30: in stages 0 to 2 DeepSpeed does not reduce gradients over sequence-parallel ranks of a mesh."""
    for stage in (0, 1, 2):
        with on_a_mesh(stage, 1, 2) as engine, pytest.raises(UnsupportedModelError, match="mesh_param"):
            ShardedAverage(engine, EMA(decay=0.5))
        with on_a_mesh(stage, 2, 1) as engine:
            average = ShardedAverage(engine, EMA(decay=0.5))
            train(engine, range(1))
            assert average.update()


def full_masters(engine: Any) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    params = engine.module.named_parameters()
    return {key: safe_get_full_fp32_param(param).clone() for key, param in params if param.requires_grad}


def full_of(param: Any) -> Tensor:
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([param]):
        return param.detach().clone()
