"""LAWA: the mean of the latest snapshots, which are kept, saved, loaded and carried over with the average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from sharded_avg import LAWA, SWA, ConfigError, Schedule, ShardedAverage, load_averaged_state_dict
from sharded_avg.averages.ring import turn

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Run:
    """A model that takes steps, its average, and all weights there have been."""

    def __init__(
        self, rule: Any, *, dtype: torch.dtype = torch.float32, frozen: int | None = None, **arguments: Any
    ) -> None:
        shapes = [(3, 5), (1,), (), (7, 3)]
        self.model = nn.ParameterList([nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes])
        if frozen is not None:
            self.model[frozen].requires_grad_(False)
        self.average = ShardedAverage(self.model, rule, **arguments)
        self.generator = torch.Generator().manual_seed(0)
        self.seen: list[list[Tensor]] = []

    def step(self, count: int = 1) -> Run:
        for _ in range(count):
            with torch.no_grad():
                for parameter in self.model:
                    parameter.copy_(torch.randn(parameter.shape, generator=self.generator))
            self.seen.append([parameter.detach().float().clone() for parameter in self.model])
            self.average.update()
        return self

    def like(self, rule: Any = None, **arguments: Any) -> Run:
        """Another one that goes on from here with the same weights; its average has nothing yet."""
        other = Run(rule or self.average._state.rules, **arguments)
        other.generator.set_state(self.generator.get_state())
        other.seen = list(self.seen)
        return other

    def values(self, name: str | None = None) -> list[Tensor]:
        with self.average.summon_full_params(name) as full:
            return [full[str(index)] for index in range(len(self.model))]


BF16 = torch.bfloat16


def mean_of(snapshots: list[list[Tensor]], kept: torch.dtype = torch.float32) -> list[Tensor]:
    """By plain calls: each as it was kept, oldest first."""
    means = []
    for values in zip(*snapshots, strict=True):
        total = values[0].to(kept).float()
        for value in values[1:]:
            total = total + value.to(kept).float()
        means.append(total / len(values))
    return means


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_worked_example():
    """x = 1, 3, 2, 6, 4 and k = 3."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(1))])
    average, found = ShardedAverage(model, LAWA(last=3)), []
    for x in (1.0, 3.0, 2.0, 6.0, 4.0):
        model[0].data.fill_(x)
        average.update()
        with average.summon_full_params() as full:
            found.append(full["0"].item())
    assert found == pytest.approx([1, 2, 2, 11 / 3, 4])
    assert average.horizon() == pytest.approx(3)
    assert average.decay() == pytest.approx(2 / 3)
    assert [tuple(stretch) for stretch in average.profile(stretches=5)][2:] == [
        (step, step, pytest.approx(1 / 3)) for step in (3, 4, 5)
    ]


@pytest.mark.parametrize("kept", [None, torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits(kept, dtype):
    run = Run(LAWA(last=3, dtype=kept), dtype=dtype)
    for step in range(1, 9):
        run.step()
        assert same(run.values(), mean_of(run.seen[max(0, step - 3) :], kept or torch.float32)), step


def test_no_error_adds_up():
    """A running sum would have rounded 500 times by now."""
    run = Run(LAWA(last=7)).step(500)
    assert same(run.values(), mean_of(run.seen[-7:]))


def test_bytes():
    """Counted, bounded, and there from the first update on; half of it in bf16."""
    numel = 15 + 1 + 1 + 21
    for kept, size in ((None, 4), (torch.bfloat16, 2)):
        run = Run(LAWA(last=5, dtype=kept))
        assert run.average.nbytes == 0
        assert {run.step().average.nbytes for _ in range(20)} == {numel * 4 + 5 * numel * size}


@pytest.mark.parametrize(
    ("rule", "schedule", "expected"),
    [
        (LAWA(last=2, every=5), None, [5, 10, 15, 20]),
        (LAWA(last=2, every=5), Schedule(every_steps=4), [8, 12, 16, 20]),
        (LAWA(last=2, every=5), Schedule(start_step=7), [7, 10, 15, 20]),
        (LAWA(last=2), Schedule(every_steps=6), [6, 12, 18]),
    ],
)
def test_every(rule, schedule, expected):
    """Snapshots have their own stride, among the steps that the schedule chooses."""
    run = Run({"window": rule, "mean": SWA()}, schedule=schedule).step(20)
    assert run.average._state.histories["window"].n_averaged == len(expected)
    assert same(run.values("window"), mean_of([run.seen[step - 1] for step in expected[-2:]]))
    assert run.average._state.histories["mean"].n_averaged == sum(map(schedule or Schedule(), range(1, 21)))
    alone = Run(rule, schedule=schedule)
    assert [step for step in range(1, 21) if alone.step().average.n_averaged and alone.average.num_steps == step]
    assert alone.average.n_averaged == len(expected)


@pytest.mark.parametrize("kept", [None, torch.bfloat16])
@pytest.mark.parametrize("before", [1, 2, 5, 6, 7])
def test_saved_midway(tmp_path: Path, before, kept):
    """Saved and loaded at any place in the ring, by each way: then as one long run."""
    rule = LAWA(last=3, dtype=kept)
    long = Run(rule).step(before)
    folder, user = long.like(), long.like()
    long.average.save(tmp_path / "average")
    dcp.save({"average": long.average}, checkpoint_id=tmp_path / "user")
    folder.average.load(tmp_path / "average")
    dcp.load({"average": user.average}, checkpoint_id=tmp_path / "user")
    for _ in range(5):
        expected = long.step().values()
        assert same(folder.step().values(), expected)
        assert same(user.step().values(), expected)
    assert same(expected, mean_of(long.seen[-3:], kept or torch.float32))


def test_full_tensors_midway():
    """`gather_full` has the snapshots, and `load_full` takes them back; without them the average stands for each."""
    first = Run({"window": LAWA(last=3, dtype=torch.bfloat16), "late": LAWA(last=2, every=50)}).step(5)
    full = first.average.gather_full()
    assert list(full) == ["window", "window/0", "window/1", "window/2"]
    assert [kept["0"].dtype for kept in full.values()] == [torch.float32, *[torch.bfloat16] * 3]
    for age in range(3):
        assert same([full[f"window/{age}"][str(i)].float() for i in range(4)], mean_of([first.seen[4 - age]], BF16))
    assert list(first.average.gather_full(["late"])) == []
    second, third = first.like(), first.like()
    second.average.load_full(full, first.average.manifest())
    third.average.load_full({"window": full["window"]}, first.average.manifest())
    mean = third.values("window")
    assert same(second.step().values("window"), first.step().values("window"))
    assert same(third.step().values("window"), mean_of([mean, mean, third.seen[-1]], BF16))


def test_taken_over():
    first = Run({"average": LAWA(last=3)}).step(5)
    second = first.like()
    second.average.take_from(first.average)
    assert same(second.step(2).values(), first.step(2).values())


@pytest.mark.parametrize("last", [2, 5])
def test_another_size(tmp_path: Path, last):
    """What fits of what was saved: the latest."""
    first = Run(LAWA(last=3)).step(7)
    first.average.save(tmp_path / "average")
    second = first.like(LAWA(last=last))
    second.average.load(tmp_path / "average")
    second.step()
    assert same(second.values(), mean_of(second.seen[-min(last, 4) :]))


def test_saved_without_snapshots(tmp_path: Path):
    """By another rule, say: the average stands for those that it is made of."""
    first = Run(SWA()).step(4)
    first.average.save(tmp_path / "average")
    second = first.like(LAWA(last=2))
    second.average.load(tmp_path / "average")
    mean = second.values()
    second.step()
    assert same(second.values(), mean_of([mean, second.seen[-1]]))


def test_what_is_saved_is_read_as_any_average(tmp_path: Path):
    """Snapshots beside it are no second model."""
    for last in (1, 2):
        run = Run(LAWA(last=last)).step(3)
        run.average.save(tmp_path / f"average{last}")
        full = load_averaged_state_dict(tmp_path / f"average{last}")
        assert list(full) == ["0", "1", "2", "3"]
        assert same(list(full.values()), run.values())


def test_newcomers_and_swaps_leave_the_rest_alone():
    run = Run(LAWA(last=3), frozen=1).step(4)
    with run.average.swapped():
        pass
    run.model[1].requires_grad_(True)
    run.step(1)
    expected = mean_of(run.seen[-3:])
    expected[1] = run.seen[-1][1]
    found = run.values()
    assert torch.allclose(found[1], expected[1])
    assert same([found[i] for i in (0, 2, 3)], [expected[i] for i in (0, 2, 3)])


def test_rooms_are_walked_in_pieces():
    """An average that is larger than the room, and a last piece that is smaller."""
    places = [torch.randn(11).bfloat16() for _ in range(3)]
    average = torch.randn(11)
    expected = mean_of([[place] for place in (*reversed(places[1:]), average)], torch.bfloat16)[0]
    turn(average, places, torch.empty(4))
    assert torch.equal(average, expected)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"last": 0}, r"LAWA\(last=0\)"),
        ({"last": 2.5}, r"last=2\.5"),
        ({"last": 2, "every": 0}, r"every=0"),
        ({"last": 2, "dtype": torch.int32}, r"dtype=torch\.int32"),
        ({"last": 2, "dtype": "bf16"}, r"dtype='bf16'"),
    ],
)
def test_what_cannot_be(arguments, says):
    with pytest.raises(ConfigError, match=says):
        LAWA(**arguments)
