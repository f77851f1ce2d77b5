"""The benchmark measures what it says, in turns, and prints it; how fast anything is, no test asks."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import count

import pytest
import torch

from sharded_avg import EMA, ShardedAverage
from sharded_avg.benchmark import local, ranks, rivals
from sharded_avg.benchmark.__main__ import main
from sharded_avg.benchmark.growth import Growth
from sharded_avg.benchmark.report import Report
from sharded_avg.benchmark.timing import OURS, Case, Contender, Memory, Timing, clock_for, measure
from sharded_avg.benchmark.weights import Sizes, numel_of, tensors, transformer
from tests.helpers.further import further

TINY = Sizes(large=(3, 70), small=(5, 7), transformer=(1, 4), many=(3, 7))


class FakeTime:
    """A clock that only calls move, each by a time of its own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def takes(self, name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.calls.append(name)
            self.now += seconds

        return call


def two_contenders(time: FakeTime) -> Case:
    base = Contender("base", time.takes("base", 2.0), moved_bytes=12)
    slow = Contender("slow", time.takes("slow", 5.0), moved_bytes=24, target=2.0)
    return Case("case", [base, slow])


def test_ratios_are_to_the_first_contender() -> None:
    time = FakeTime()
    base, slow = measure(two_contenders(time), num_rounds=7, clock=lambda: time.now)
    assert (base.median_s, base.ratio, base.met) == (2.0, 1.0, None)
    assert (slow.median_s, slow.ratio, slow.ratio_low, slow.ratio_high, slow.met) == (5.0, 2.5, 2.5, 2.5, False)
    assert slow.num_rounds == 7


def test_every_round_has_every_contender_once() -> None:
    """Ratios within a round stay when the machine becomes ten times slower half-way."""
    time, slowdown = FakeTime(), count()
    case = two_contenders(time)

    def clock() -> float:
        return time.now * (10.0 if next(slowdown) > 40 else 1.0)

    measure(case, num_rounds=9, clock=clock)
    measured = time.calls[-18:]
    assert all(sorted(measured[i : i + 2]) == ["base", "slow"] for i in range(0, 18, 2))
    assert measured[::2] != ["base"] * 9  # the order changes


def test_what_comes_between_is_not_timed() -> None:
    time = FakeTime()
    base, _ = measure(two_contenders(time), num_rounds=3, clock=lambda: time.now, between=time.takes("wait", 100.0))
    assert base.median_s == 2.0
    assert "wait" in time.calls


def test_one_thread_is_timed_by_its_own_clock() -> None:
    assert "CPU" in clock_for(1)[0]
    assert "wall" in clock_for(2)[0]


def test_every_local_case_does_one_update_a_call() -> None:
    """All contenders of a case can be called again and again, and have work to do."""
    for _, build in local.cases(TINY):
        case = build()
        names = [contender.name for contender in case.contenders]
        assert len(set(names)) == len(names) >= 2
        for contender in case.contenders * 2:
            contender.call()
            assert contender.moved_bytes > 0
        if case.memory is not None:
            assert case.memory.ratio == 1.0


def test_an_update_that_takes_nothing_in_is_not_timed() -> None:
    """As an engine's second one after a step: it would look a hundred times as fast as it is."""
    model = torch.nn.Linear(3, 5)
    average = local.started(model)
    average.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="took nothing in"):
        local.ours(average, 12).call()
    local.ours(average, 12, unscheduled=True).call()
    assert average.n_averaged == 2


def test_rivals_average_as_we_do() -> None:
    """P43: the same decay on the same weights: what is compared is the same work (ema-pytorch warms its decay up)."""
    model = tensors(3, 5)
    theirs = {"each": rivals.lerp_each(model), **dict(rivals.installed(model))}
    theirs.pop("ema-pytorch", None)
    average = ShardedAverage(model, EMA(decay=rivals.DECAY))
    for number in range(4):
        for update in (average.update, *theirs.values()):
            if number or update is not theirs["each"]:  # it began with a copy; the others copy at their first update
                update()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
    with average.summon_full_params() as full:
        for name, update in theirs.items():
            held = [tensors for tensors in _closed_over(update) if len(tensors) == 3]
            assert any(all(map(torch.allclose, tensors, full.values())) for tensors in held), name


def _closed_over(update: Callable[[], object]) -> list[list[torch.Tensor]]:
    """Lists of parameters that an update can reach: its closure's lists, modules and callbacks."""
    cells = [cell.cell_contents for cell in getattr(update, "__closure__", None) or ()]
    owners = [getattr(owner, "_average_model", owner) for owner in cells]
    lists = [owner for owner in owners if isinstance(owner, list)]
    return lists + [list(owner.parameters()) for owner in owners if isinstance(owner, torch.nn.Module)]


def test_a_transformer_has_the_parameters_of_one() -> None:
    model = transformer(2, 8, num_tokens=11)
    matrices = 8 * (3 * 8 + 8 + 4 * 8 + 4 * 8)
    biases_and_norms = 3 * 8 + 8 + 4 * 8 + 8 + 2 * 2 * 8
    assert numel_of(model) == (11 + 256) * 8 + 2 * (matrices + biases_and_norms) + 2 * 8


def timing(name: str, ratio: float, *, target: float | None = None, is_rival: bool = False) -> Timing:
    return Timing("case", name, 0.0015 * ratio, ratio, ratio, ratio, 0.0005, target, is_rival, 3)


def report(*timings: Timing, is_quick: bool = False) -> Report:
    filled = Report("a clock", 1, 3, is_quick)
    filled.add(list(timings), Memory(local_numel=100, nbytes=400, scratch_nbytes=64))
    return filled


def test_what_misses_its_target_is_said() -> None:
    missed = report(timing("base", 1.0), timing(OURS, 1.5, target=1.25), timing("slow", 3.0, is_rival=True))
    assert "Above target: case, ShardedAverage.update: 1.50 > 1.25." in missed.to_text()
    assert "Rivals that are not slower: none." in missed.to_text()
    beaten = report(timing("base", 1.0), timing(OURS, 1.2, target=1.25), timing("quick", 1.1, is_rival=True))
    assert "Above target: none." in beaten.to_markdown()
    assert "Rivals that are not slower: case, quick." in beaten.to_markdown()
    assert "Above target" not in report(timing("base", 1.0), timing(OURS, 9.0, target=1.0), is_quick=True).to_text()


def test_markdown_is_a_table() -> None:
    lines = report(timing("base", 1.0), timing(OURS, 1.5)).to_markdown().splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert {row.count("|") for row in rows[:4]} == {8}
    assert "| case | base | 1.50 ms | 1.00 |" in rows[2]
    assert rows[3].startswith("|  | ShardedAverage.update | 2.25 ms | 1.50 |")


def test_json_has_numbers() -> None:
    parsed = json.loads(report(timing("base", 1.0)).to_json())
    assert parsed["timings"][0]["median_s"] == 0.0015
    assert parsed["memory"]["case"] == {"local_numel": 100, "nbytes": 400, "scratch_nbytes": 64}
    assert parsed["versions"]["torch"] == torch.__version__


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`--json` alone is on stdout; the number of threads is given back."""
    monkeypatch.setattr("sharded_avg.benchmark.__main__.QUICK", TINY)
    assert main(["--quick", "--rounds", "2", "--json", "--only", "small", "bf16", "swap"]) == 0
    printed = capsys.readouterr()
    parsed = json.loads(printed.out)
    assert [parsed["num_rounds"], parsed["num_threads"]] == [2, 1]
    assert {row["case"].split(":")[0] for row in parsed["timings"]} == {"fp32", "bf16 weights, fp32 average", "swap"}
    assert "small ..." in printed.err


def test_growth_by_the_number_of_parameters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """R21: a row for each operation, a column for each number of parameters, and what misses its target is said."""
    monkeypatch.setattr("sharded_avg.benchmark.__main__.QUICK", TINY)
    assert main(["--quick", "--json", "--only", "many"]) == 0
    rows = {row["what"]: row for row in json.loads(capsys.readouterr().out)["growth"]}
    assert list(rows) == ["build", "first update", "update", "swap, in and out", "save", "load"]
    assert all(set(row["us"]) == {"3", "7"} and min(row["us"].values()) >= 0 for row in rows.values())

    filled = report(timing("base", 1.0))
    filled.growth += [Growth("build", {1000: 3.0, 20000: 70.0}, 15.0), Growth("update", {1000: 1.25, 20000: 1.0}, None)]
    table = filled.to_markdown().partition("| many small")[2].splitlines()
    assert table[0] == " parameters | us a parameter | 1,000 | 20,000 | target |"
    assert table[2] == "| many small parameters | build | 3.0 | 70.0 | <= 15 |"
    assert table[3] == "|  | update | 1.2 | 1.0 |  |"
    assert "Above target: build: 70.0 > 15 us." in filled.to_text()


@pytest.mark.own_processes
@pytest.mark.parametrize(
    "job",
    [
        further(job, id=job.key) if job.key == "fsdp1" else pytest.param(job, id=job.key)
        for job in ranks.JOBS
        if job.key in ("fsdp1", "fsdp2")
    ],
)
def test_jobs_on_ranks_of_their_own(job: ranks.Job) -> None:
    """P66: memory is what the rank owns times four, on every engine, beside averaging after a gather."""
    outcome = ranks.run(job, ranks.Settings(TINY, num_rounds=2, num_threads=1))
    names = [timing.name for timing in outcome.timings]
    assert OURS in names
    assert job.key != "fsdp2" or "gather, then average" in names
    assert outcome.memory is not None
    assert outcome.memory.ratio == 1.0


def test_a_package_that_is_not_installed_is_reported(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    job = ranks.Job("zero2", ranks.gathering, needs="no_such_engine")
    monkeypatch.setattr("sharded_avg.benchmark.__main__.JOBS", (job,))
    assert main(["--quick", "--rounds", "1", "--only", "zero2"]) == 0
    assert "Not measured: zero2: no_such_engine is not installed." in capsys.readouterr().out


def test_a_rival_that_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ema_pytorch", None)
    assert "ema-pytorch" not in dict(rivals.installed(tensors(2, 3)))


def test_started_averages_have_names_of_their_own() -> None:
    average = local.started(tensors(2, 3), num_averages=3)
    assert isinstance(average, ShardedAverage)
    assert len(average.names) == 3
