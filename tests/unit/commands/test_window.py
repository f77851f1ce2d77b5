"""The mean of a stretch of training, out of two saved means."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sharded_avg import EMA, SWA, PolynomialAverage, PowerAverage, Schedule, ShardedAverage, load_averaged_state_dict
from sharded_avg.commands.cli import main
from tests.unit.commands.runs import Net, train

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")
STEPS = (2, 5, 12)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    train(tmp_path / "run", {"swa": SWA(), "ema": EMA(decay=0.5)}, 12, STEPS)
    return tmp_path / "run"


def window(run: Path, out: str, first: int, last: int, *more: str) -> int:
    return main(["window", str(run), str(run.parent / out), "--from", str(first), "--to", str(last), *more])


def test_worked_example(tmp_path):
    """x = 1, 3, 2, 6, 4: S_5 = 3.2, S_2 = 2, and the mean of the last three is 4."""
    net = Net()
    average = ShardedAverage(net, SWA())
    for step, value in enumerate((1.0, 3.0, 2.0, 6.0, 4.0), start=1):
        torch.nn.init.constant_(net.embed.weight, value)
        average.update()
        if step in (2, 5):
            average.save(tmp_path / "run" / str(step))
    assert load_averaged_state_dict(tmp_path / "run" / "5")["embed.weight"].unique().item() == pytest.approx(3.2)
    assert window(tmp_path / "run", "x.safetensors", 2, 5) == 0
    found = load_averaged_state_dict(tmp_path / "x.safetensors")["embed.weight"]
    torch.testing.assert_close(found, torch.full((7, 3), 4.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("first", "last"), [(2, 5), (2, 12), (5, 12)])
@pytest.mark.parametrize("out", ["x.safetensors", "x.pt", "folder"])
def test_a_window_is_the_mean_of_its_weights(first, last, out, tmp_path, capsys):
    live = train(tmp_path / "run", {"swa": SWA(), "ema": EMA(decay=0.5)}, 12, STEPS)
    assert window(tmp_path / "run", out, first, last) == 0
    assert capsys.readouterr().err == ""
    found = load_averaged_state_dict(tmp_path / out)
    expected = torch.stack([live[step] for step in range(first + 1, last + 1)]).mean(0)
    torch.testing.assert_close(found["embed.weight"].double(), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(found["out.weight"], found["embed.weight"])
    assert found["norm.running_mean"].tolist() == [float(last)] * 5, "what is not averaged is the later save's"
    assert found["frozen"].item() == 1


def test_it_goes_on_as_an_average(run, tmp_path):
    """A window is the SWA of its updates: loaded, it goes on with their count."""
    assert window(run, "w", 5, 12) == 0
    manifest = json.loads((tmp_path / "w" / "manifest.json").read_text())
    record = manifest["averages"]["swa"]
    assert (record["rule"], record["n_averaged"], record["updates"]) == ({"kind": "SWA"}, 7, [[6, 12, 1]])
    assert manifest["step"] == 12
    provenance = manifest["provenance"]
    assert (provenance["kind"], provenance["from"], provenance["to"]) == ("window", 5, 12)
    assert [source["weight"] for source in provenance["sources"]] == [-5 / 7, 12 / 7]
    average = ShardedAverage(Net(), {"swa": SWA()}, dtype=torch.float64)
    average.load(tmp_path / "w")
    assert average.n_averaged == 7


def test_under_a_schedule(tmp_path):
    """Steps are the optimizer's; updates are counted."""
    when = Schedule(every_steps=3, start_step=4)  # 4, 7, 10, 13, 16
    live = train(tmp_path / "run", SWA(), 17, (8, 17), schedule=when)
    assert window(tmp_path / "run", "w", 8, 17) == 0
    found = load_averaged_state_dict(tmp_path / "w")["embed.weight"]
    expected = torch.stack([live[step] for step in (10, 13, 16)]).mean(0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-12, atol=1e-12)
    record = json.loads((tmp_path / "w" / "manifest.json").read_text())["averages"]["average"]
    assert (record["n_averaged"], record["updates"]) == (3, [[10, 16, 3]])


@pytest.mark.parametrize("rule", [PowerAverage(1), PolynomialAverage(0)])
def test_equal_weights_by_another_name(rule, tmp_path):
    live = train(tmp_path / "run", rule, 5, (2, 5))
    assert window(tmp_path / "run", "x.pt", 2, 5) == 0
    expected = torch.stack([live[step] for step in (3, 4, 5)]).mean(0)
    torch.testing.assert_close(
        load_averaged_state_dict(tmp_path / "x.pt")["embed.weight"].double(), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    ("first", "last", "more", "code", "says"),
    [
        (2, 6, (), 3, "has no save of step 6; it has steps ['2', '5', '12']"),
        (0, 5, (), 3, "has no save of step 0"),
        (5, 5, (), 2, "--from 5 --to 5: a window goes from an earlier step to a later one"),
        (12, 5, (), 2, "from an earlier step"),
        (-2, 5, (), 2, "--from -2"),
        (2, 5, ("--name", "ema"), 3, "no average of equal weights ('ema' is {'kind': 'EMA'"),
        (2, 5, ("--name", "none"), 3, "has no average 'none'; it has ['ema', 'swa']"),
    ],
)
def test_windows_that_there_are_not(first, last, more, code, says, run, capsys):
    assert window(run, "x.pt", first, last, *more) == code
    assert says in capsys.readouterr().err
    assert not (run.parent / "x.pt").exists()


def test_several_equal_means_are_told_apart(tmp_path, capsys):
    train(tmp_path / "run", {"one": SWA(), "other": PowerAverage(1)}, 5, (2, 5))
    assert window(tmp_path / "run", "x.pt", 2, 5) == 3
    assert "name one of ['one', 'other']" in capsys.readouterr().err
    assert window(tmp_path / "run", "x.pt", 2, 5, "--name", "other") == 0


def test_two_runs_have_no_window(tmp_path, capsys):
    train(tmp_path / "a", SWA(), 5, (5,), schedule=Schedule(every_steps=2))
    train(tmp_path / "b", SWA(), 12, (12,))
    (tmp_path / "run").mkdir()
    shutil.copytree(tmp_path / "a" / "step-5", tmp_path / "run" / "step-5")
    shutil.copytree(tmp_path / "b" / "step-12", tmp_path / "run" / "step-12")
    assert window(tmp_path / "run", "x.pt", 5, 12) == 3
    assert "does not go on from" in capsys.readouterr().err


def test_no_update_between(tmp_path, capsys):
    train(tmp_path / "run", SWA(), 9, (7, 9), schedule=Schedule(every_steps=5))
    assert window(tmp_path / "run", "x.pt", 7, 9) == 3
    assert "there is no update between" in capsys.readouterr().err


@pytest.mark.parametrize(("dtype", "told"), [(torch.float32, False), (torch.bfloat16, True), (torch.float64, False)])
def test_a_word_about_cancellation(dtype, told, tmp_path, capsys):
    train(tmp_path / "run", SWA(), 12, (11, 12), dtype=None if dtype == torch.float32 else torch.float32)
    if dtype != torch.float32:
        for step in (11, 12):
            path = tmp_path / "run" / f"step-{step}"
            narrow = tmp_path / "narrow" / f"step-{step}"
            narrow.parent.mkdir(exist_ok=True)
            name = {torch.bfloat16: "bf16", torch.float64: "fp64"}[dtype]
            assert main(["convert", str(path), str(narrow), "--dtype", name]) == 0
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "narrow").rename(tmp_path / "run")
    capsys.readouterr()
    assert window(tmp_path / "run", "x.pt", 11, 12) == 0
    said = capsys.readouterr().err
    assert ("rounding of what was saved, in bfloat16, grows 23-fold, to about 0.09" in said) == told
    assert bool(said) == told


def test_a_narrow_window_of_a_long_run_is_told(tmp_path, capsys):
    train(tmp_path / "run", SWA(), 2000, (1999, 2000), dtype=torch.float32)
    assert window(tmp_path / "run", "x.pt", 1999, 2000) == 0
    assert "in float32, grows 4e+03-fold" in capsys.readouterr().err


def test_where_it_is_written(run, capsys):
    """Not over or into a save; a folder of ours not beside them either, where it would be taken for one."""
    for out in ("run/step-2", "run/step-2/x.pt", "run/w", "run"):
        assert window(run, out, 2, 5) == 2
        assert "choose another place" in capsys.readouterr().err
    assert window(run, "run/w.safetensors", 2, 5) == 0
    assert window(run, "w2", 2, 12) == 0, "the file is none of the run's saves"


def test_infinities(tmp_path, capsys):
    train(tmp_path / "run", SWA(), 5, (2, 5))
    assert window(tmp_path / "run", "x.pt", 2, 5, "--dtype", "fp16") == 0
    net = Net()
    average = ShardedAverage(net, SWA())
    for step in (1, 2):
        torch.nn.init.constant_(net.embed.weight, 65000.0 * step)
        average.update()
        average.save(tmp_path / "large" / str(step))
    assert window(tmp_path / "large", "y.pt", 1, 2, "--dtype", "fp16") == 3
    assert "'embed.weight' (21 of 21 values, the largest is 130000" in capsys.readouterr().err
