"""Saved under any engine on any number of ranks, loaded under any other: the same bits, and the run goes on.

Every SAVER trains, updates averages of several rules and saves; every loader then reads all of those folders (or,
without --all, its own, the one before and the one after: each engine and the next), compares the gathered averages with
what the saver gathered, and takes one more update, which must equal the formula applied to full tensors.

P63, P64, P74, P75, P78, P81, P92, P93.
"""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sharded_avg import CheckpointError, ShardedAverage
from tests.helpers.engines import ENGINES, ONE_PROCESS, Engine
from tests.helpers.further import further
from tests.helpers.models import FORMULAS, WEIGHTED, Variant, awkward
from tests.helpers.pool import on_ranks, run_on_ranks, under_torchrun

pytestmark = [
    pytest.mark.skipif(under_torchrun(), reason="takes engines on 1 to 4 ranks in one test"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]

VARIANT = Variant(("ema_warmup", "swa", "lawa", *WEIGHTED))
EVERY_RULE = Variant(tuple(FORMULAS))
NUM_STEPS = 3
ALL_ROWS = {"plain": ONE_PROCESS, **ENGINES}
SAVERS = [
    ("plain", 1),
    ("ddp", 2),
    ("ddp", 3),
    ("ddp", 4),
    ("fsdp1-full-views", 2),
    ("fsdp1-full-flat", 3),
    ("fsdp1-full-flat", 4),
    ("fsdp1-hybrid-views", 4),
    ("fsdp1-no_shard-views", 2),
    ("fsdp2", 2),
    ("fsdp2", 3),
    ("fsdp2", 4),
    ("fsdp2-hsdp", 4),
    ("tp", 2),
    ("tp-fsdp2", 4),
    ("zero1-groups", 3),
    ("zero1-bf16", 2),
    ("zero2", 2),
    ("zero3", 2),
    ("zero3-persistent", 3),
    ("zero3-bf16-groups", 2),
]
SAVERS = [saver for saver in SAVERS if saver[0] in ALL_ROWS]
Full = dict[str, dict[str, Tensor]]  # by average, by name


def start(row: str, variant: Variant = VARIANT) -> tuple[Engine, ShardedAverage]:
    """Collective. One model for all engines: without what some of them refuse."""
    engine = ALL_ROWS[row].build(awkward(low=False, scalar=False))
    return engine, variant.build(engine.model)


def averaged(average: ShardedAverage, engine: Engine) -> Full:
    """Collective. Every average of every trained parameter, on all ranks."""
    trained = engine.full()
    found = {}
    for name in average.names:
        with average.summon_full_params(name, rank0_only=False) as full:
            found[name] = {key: full[key] for key in trained}
    return found


def save(row: str, folder: Path, variant: Variant = VARIANT) -> None:
    engine, average = start(row, variant)
    seen = []
    for step in range(NUM_STEPS):
        engine.learn_steps(step, step + 1)
        average.update()
        seen.append({key: live.float().clone() for key, live in engine.full().items()})
    average.save(folder / "average")
    full = averaged(average, engine)
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save((full, seen), folder / "full.pt")


def load_all(row: str, folders: list[Path], variant: Variant = VARIANT) -> None:
    engine, average = start(row, variant)
    for folder in folders:
        average.load(folder / "average")
        expected, seen = torch.load(folder / "full.pt")
        assert_same(averaged(average, engine), expected, folder.name)
        assert average.n_averaged == NUM_STEPS
        engine.learn_steps(NUM_STEPS, NUM_STEPS + 1)  # DeepSpeed reports a step that never was as skipped
        assert average.update()
        seen.append({key: live.float() for key, live in engine.full().items()})
        for name, formula in zip(variant.names, variant.formulas, strict=True):
            for key, value in expected[name].items():
                expected[name][key] = FORMULAS[formula](value, [full[key] for full in seen], NUM_STEPS)
        assert_same(averaged(average, engine), expected, f"{folder.name}, one update later")


def assert_same(actual: Full, expected: Full, what: str) -> None:
    different = [
        (name, key)
        for name in expected
        for key, tensor in expected[name].items()
        if not torch.equal(actual[name][key], tensor)
    ]
    assert not different, f"{what}: {different}"
    assert actual.keys() == expected.keys()


def on_its_ranks(row: str, world_size: int, body, **arguments: object) -> None:
    if ALL_ROWS[row].kind == "deepspeed":
        pytest.importorskip("deepspeed")
    if row == "plain":
        body(row, **arguments)
    else:
        run_on_ranks(world_size, body, kind=ALL_ROWS[row].kind, row=row, **arguments)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """What every saver saved."""
    root, made = tmp_path_factory.mktemp("saved"), []
    for row, world_size in SAVERS:
        folder = root / f"{row}-{world_size}"
        folder.mkdir()
        on_its_ranks(row, world_size, save, folder=folder)
        made.append(folder)
    return made


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("row", "world_size"), SAVERS)
@pytest.mark.parametrize("whose", ["its own and its neighbours'", further("everyone's")])
def test_every_saved_average_loads(row, world_size, whose, folders):
    here = SAVERS.index((row, world_size))
    near = [folders[index % len(folders)] for index in (here - 1, here, here + 1)]
    on_its_ranks(row, world_size, load_all, folders=folders if whose == "everyone's" else near)


@pytest.mark.parametrize(
    ("saver", "loader"),
    [(("fsdp2", 3), ("ddp", 2)), further(("ddp", 2), ("zero2", 2)), further(("zero2", 2), ("fsdp1-full-flat", 3))],
)
def test_every_rule_goes_on_elsewhere(saver, loader, tmp_path):
    """Each by its name: under another engine, on other ranks, with its next update, as its formula on full tensors."""
    on_its_ranks(*saver, save, folder=tmp_path, variant=EVERY_RULE)
    on_its_ranks(*loader, load_all, folders=[tmp_path], variant=EVERY_RULE)


@on_ranks(2, 3)
def test_another_model_is_refused_on_all_ranks(tmp_path):
    """What does not fit raises everywhere and changes nothing."""
    engine, average = start("fsdp2")
    engine.learn_steps(0, 1)
    average.update()
    average.save(tmp_path / "average")
    other = ALL_ROWS["fsdp2"].build(awkward(low=True, scalar=False))
    narrower = VARIANT.build(other.model)
    narrower.update()
    before = averaged(narrower, other)
    with pytest.raises(CheckpointError, match=r"missing from it: \['low\.mix\.weight'"):
        narrower.load(tmp_path / "average")
    assert_same(averaged(narrower, other), before, "after a refused load")
    with pytest.raises(CheckpointError, match="nothing of that name"):
        narrower.load(tmp_path / "elsewhere")


@on_ranks(2, 3)
def test_async_save_is_of_the_moment_of_the_call(tmp_path):
    """P23: training, updates and swaps go on while the bytes travel."""
    engine, average = start("fsdp2")
    for step in range(2):
        engine.learn_steps(step, step + 1)
        average.update()
    expected = averaged(average, engine)
    pending = average.async_save(tmp_path / "average")
    for step in range(2, 6):
        engine.learn_steps(step, step + 1)
        average.update()
        with average.swapped("swa"):
            pass
    pending.result()
    assert average.n_averaged == 6
    fresh_engine, fresh = start("ddp")
    fresh.load(tmp_path / "average")
    assert_same(averaged(fresh, fresh_engine), expected, "what landed")
    assert fresh.n_averaged == 2


@on_ranks(2)
def test_a_rank_that_cannot_write_fails_the_save_on_all(tmp_path):
    """P88, P96: all ranks raise, and the average of before is still there."""
    from sharded_avg.saved.folder import saving

    engine, average = start("fsdp2")
    engine.learn_steps(0, 1)
    average.update()
    average.save(tmp_path / "average")
    expected = averaged(average, engine)
    engine.learn_steps(1, 2)
    average.update()
    write = saving.write_pieces

    def full_disk(*arguments: object) -> object:
        if dist.get_rank() == 1:
            raise OSError("No space left on device")
        return write(*arguments)

    saving.write_pieces = full_disk
    try:
        started = datetime.datetime.now()
        with pytest.raises(CheckpointError, match=r"rank 1.*No space left"):
            average.save(tmp_path / "average")
        assert (datetime.datetime.now() - started).total_seconds() < 20
    finally:
        saving.write_pieces = write
    _, fresh = start("fsdp2")
    fresh.load(tmp_path / "average")
    assert_same(averaged(fresh, engine), expected, "after a failed save")
