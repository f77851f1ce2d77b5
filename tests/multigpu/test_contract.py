"""One contract for every engine, every rule and every dtype: the average is what a slow reference says it is.

The table is the full product of engines, rules and dtypes. Engines x world sizes (ENGINES) are tests of their own; each
keeps every VARIANT of rules and dtypes at once beside one training run: updates are local and cheap, runs are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import Shard as Cut
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from sharded_avg import EMA, SWA, ShardedAverage
from tests.helpers.engines import ONE_PROCESS, Engine, Row, every_row, mesh, run_row
from tests.helpers.models import FORMULAS, SEVERAL, VARIANTS, Reference, batch
from tests.helpers.pool import on_ranks

NUM_STEPS = 3
SWAPPED = ("ema", SEVERAL, "own_dtype")  # the rule makes no difference to a swap; these take all ways through it


class CountCollectives(TorchDispatchMode):
    """Names of the collectives that were issued inside, whoever called them: they all pass torch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.issued: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            self.issued.append(str(func))
        return func(*args, **(kwargs or {}))


def learn_and_update(engine: Engine, averages: dict[str, ShardedAverage], step: int) -> None:
    engine.learn(batch(step, engine.part))
    with CountCollectives() as count:
        updated = [average.update() for average in averages.values()]
    assert all(updated)
    assert count.issued == [], "update() communicates"


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    different = [
        name
        for name, tensor in expected.items()
        if actual[name].dtype != tensor.dtype or not torch.equal(actual[name], tensor)
    ]
    assert not different, f"{what}: {different}"


def gathered(average: ShardedAverage, name: str) -> dict[str, Tensor]:
    with average.summon_full_params(name, rank0_only=False) as full:
        return full


def assert_bytes(engine: Engine, averages: dict[str, ShardedAverage]) -> None:
    """DESIGN.md, section 1: each rank stores the average of the piece it owns, and nothing else."""
    for name, average in averages.items():
        if "dtype" not in VARIANTS[name].arguments:
            kept = sum(FORMULAS[formula].window for formula in VARIANTS[name].formulas)
            assert average.nbytes == 4 * (len(VARIANTS[name].names) + kept) * engine.local_numel(), name


def train(row: Row, names: Iterable[str], validating: bool) -> dict[str, Tensor]:
    """Train, average and compare; the final weights."""
    engine = row.start()
    averages = {name: VARIANTS[name].build(engine.model) for name in names}
    references = {name: Reference(VARIANTS[name], engine.own) for name in names}
    assert all(average.nbytes == 0 for average in averages.values()), "memory before the first update"
    for step in range(NUM_STEPS):
        learn_and_update(engine, averages, step)
        full = engine.full()
        for reference in references.values():
            reference.update(full)
        for name, average in averages.items() if validating else ():
            validate(engine, average, VARIANTS[name].names[-1])
    assert_bytes(engine, averages)
    for variant, reference in references.items():
        assert averages[variant].n_averaged == NUM_STEPS
        for name, expected in reference.averages.items():
            assert_equal(gathered(averages[variant], name), expected, f"{variant}, {name}")
    return full


def validate(engine: Engine, average: ShardedAverage, name: str) -> None:
    """As people validate: eval mode, no gradients, and no backward after it."""
    engine.model.eval()
    with average.swapped(name) as is_swapped, torch.no_grad():
        assert is_swapped
        engine.model(batch(99, engine.part).to(engine.own or torch.float32))
    engine.model.train()


def check_contract(row: Row) -> None:
    without = train(row, VARIANTS, validating=False)
    assert_equal(train(row, SWAPPED, validating=True), without, "weights after training with validations")


@every_row
def test_average_is_the_slow_references(row: str, world_size: int) -> None:
    """P58, P59, P74, P76, P80, P83, P87, P105: cut anywhere, the average has the bits of one that was never cut.

    P73, P90, P91: training does not depend on how often one validates.
    """
    run_row(row, world_size, check_contract)


@pytest.mark.own_processes
def test_one_process() -> None:
    check_contract(ONE_PROCESS)


def mean_of_all(averaged: Any, current: Any, num_averaged: Tensor) -> None:
    """Torch's SWA; as it is, it takes 1 / n from a tensor, in fp32, and lerps by other kernels, an ulp away."""
    get_swa_multi_avg_fn()(averaged, current, int(num_averaged))


@pytest.mark.own_processes
@pytest.mark.parametrize(("rule", "theirs"), [(EMA(decay=0.9), get_ema_multi_avg_fn(0.9)), (SWA(), mean_of_all)])
def test_one_process_does_what_torch_does(rule: Any, theirs: Any) -> None:
    """A second reference: torch.optim.swa_utils.AveragedModel."""
    engine = ONE_PROCESS.start()
    average, averaged_model = ShardedAverage(engine.model, rule, dtype=None), None
    for step in range(NUM_STEPS):
        engine.learn(batch(step))
        average.update()
        averaged_model = averaged_model or AveragedModel(engine.model, multi_avg_fn=theirs)
        averaged_model.update_parameters(engine.model)
    expected = {k: v for k, v in averaged_model.module.state_dict().items() if k in engine.full()}
    assert_equal(gathered(average, "average"), expected, "AveragedModel")


COLLECTIVES: dict[str, Callable[[], object]] = {
    "all_reduce": lambda: dist.all_reduce(torch.ones(3)),
    "asynchronous": lambda: dist.all_reduce(torch.ones(3), async_op=True).wait(),
    "broadcast": lambda: dist.broadcast(torch.ones(3), src=0),
    "barrier": lambda: dist.barrier(),
    "objects": lambda: dist.all_gather_object([None] * dist.get_world_size(), "x"),
    "send": lambda: dist.send(torch.ones(3), 1) if dist.get_rank() == 0 else dist.recv(torch.ones(3), 0),
    "of a group": lambda: dist.group.WORLD.allreduce([torch.ones(3)]).wait(),
    "of a DTensor": lambda: sum_of_cut().full_tensor(),
}


def sum_of_cut() -> DTensor:
    return distribute_tensor(torch.ones(5), mesh((dist.get_world_size(),)), [Cut(0)])


@pytest.mark.parametrize("name", COLLECTIVES)
@on_ranks(2)
def test_collectives_are_counted(name: str) -> None:
    """Or the contract could not fail."""
    mesh((2,))
    with CountCollectives() as count:
        COLLECTIVES[name]()
    assert count.issued
