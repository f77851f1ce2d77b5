"""The horizon of a power average, chosen after training out of what was saved of others."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from sharded_avg import EMA, SWA, PowerAverage, Schedule, ShardedAverage, load_averaged_state_dict
from sharded_avg.commands.cli import main
from sharded_avg.errors import CheckpointError
from sharded_avg.formats.open import open_source
from sharded_avg.rules.power_profiles import gamma_of
from sharded_avg.saved.series import Series
from sharded_avg.version import how_to_install
from tests.unit.commands.runs import Net, power_average, train

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")


def posthoc(run: Path, out: str, *more: str) -> int:
    return main(["posthoc", str(run), str(run.parent / out), *more])


def weights_of(path: Path) -> list[float]:
    return [source["weight"] for source in open_source(path).facts["provenance"]["sources"]]


def test_worked_example(tmp_path, capsys):
    """Snapshots (t, gamma) = (2, 1), (4, 1), (2, 3), (4, 3), target gamma 2 at t = 4: by value, and normalised."""
    train(tmp_path / "run", {"one": PowerAverage(2), "three": PowerAverage(4)}, 4, (2, 4))
    sigma_rel = PowerAverage(3).sigma_rel
    assert posthoc(tmp_path / "run", "x.safetensors", "--sigma-rel", repr(sigma_rel)) == 0
    told = capsys.readouterr()
    found = weights_of(tmp_path / "x.safetensors")  # by step, then name: (2, 1), (2, 3), (4, 1), (4, 3)
    assert found == pytest.approx([-0.0825741, 0.0381610, 0.5640654, 0.4803477], abs=5e-8)
    assert "at step 4 (4 updates): the profile is off by 1.6 %, from 4 of 4 saves of 2 averages" in told.out
    state = [load_averaged_state_dict(tmp_path / "run" / f"step-{t}", n) for t in (2, 4) for n in ("one", "three")]
    expected = sum(w * s["embed.weight"] for w, s in zip(found, state, strict=True))
    written = load_averaged_state_dict(tmp_path / "x.safetensors")["embed.weight"]
    torch.testing.assert_close(written, expected, rtol=1e-14, atol=1e-14)


def test_what_was_saved_is_taken_as_it_is(tmp_path, capsys):
    """Target equal to a snapshot: X = (0, 0, 0, 1), and the others are not read."""
    train(tmp_path / "run", {"one": PowerAverage(2), "three": PowerAverage(4)}, 4, (2, 4))
    assert posthoc(tmp_path / "run", "x.pt", "--sigma-rel", repr(PowerAverage(4).sigma_rel)) == 0
    assert "the profile is off by 0 %, from 1 of 4 saves" in capsys.readouterr().out
    saved = load_averaged_state_dict(tmp_path / "run" / "step-4", "three")
    found = load_averaged_state_dict(tmp_path / "x.pt")
    assert all(torch.equal(found[name], saved[name]) for name in saved)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("posthoc") / "run"
    rules = {name: PowerAverage.from_sigma_rel(width) for name, width in (("short", 0.05), ("long", 0.10))}
    return folder, train(folder, rules, 200, range(10, 201, 10))


@pytest.mark.each_value
@pytest.mark.parametrize("sigma_rel", [0.06, 0.08, 0.12, 0.15])
@pytest.mark.parametrize("out", ["x.safetensors", "folder"])
def test_near_to_the_average_that_was_not_kept(long, sigma_rel, out, tmp_path, capsys):
    """The whole point: against the average of that width as it would have been, by a formula that is not ours."""
    run, live = long
    out_path = tmp_path / out
    assert main(["posthoc", str(run), str(out_path), "--sigma-rel", str(sigma_rel)]) == 0
    assert capsys.readouterr().err == ""
    expected = power_average(list(live.values()), gamma_of(sigma_rel) + 1)
    found = load_averaged_state_dict(out_path)
    error = (found["embed.weight"] - expected).norm() / expected.norm()
    nearest = min(
        (power_average(list(live.values()), gamma_of(width) + 1) - expected).norm() / expected.norm()
        for width in (0.05, 0.10)
    )
    assert error < 0.003 < nearest
    assert found["norm.running_mean"].tolist() == [200.0] * 5, "what is not averaged is the last save's"
    assert found["frozen"].item() == 1
    assert torch.equal(found["out.weight"], found["embed.weight"])


def test_it_loads_as_an_average(long, tmp_path):
    run, _ = long
    assert main(["posthoc", str(run), str(tmp_path / "out"), "--sigma-rel", "0.08"]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    (record,) = manifest["averages"].values()
    assert record["n_averaged"] == 200
    assert record["updates"] == [[1, 200, 1]]
    assert (record["rule"]["kind"], record["rule"]["sigma_rel"]) == ("posthoc", 0.08)
    assert record["rule"]["gamma"] == pytest.approx(gamma_of(0.08))
    assert manifest["provenance"]["kind"] == "posthoc"
    assert sum(source["weight"] for source in manifest["provenance"]["sources"]) == pytest.approx(1)
    average = ShardedAverage(Net(), PowerAverage.from_sigma_rel(0.08), dtype=torch.float64)
    average.load(tmp_path / "out")
    assert average.n_averaged == 200


def test_up_to_a_step(long, tmp_path, capsys):
    """Later saves have no part in it, which would be of the future."""
    run, live = long
    for step, told in ((100, ""), (109, "step 109 was not saved: the last one before it is 100")):
        out = tmp_path / f"{step}.safetensors"
        assert main(["posthoc", str(run), str(out), "--sigma-rel", "0.08", "--step", str(step)]) == 0
        said = capsys.readouterr()
        assert told in said.err
        assert "at step 100 (100 updates)" in said.out
        found = load_averaged_state_dict(out)["embed.weight"]
        expected = power_average([live[t] for t in range(1, 101)], gamma_of(0.08) + 1)
        assert (found - expected).norm() < 0.003 * expected.norm()
        assert [s["step"] for s in open_source(out).facts["provenance"]["sources"]][-1] == 100
    assert main(["posthoc", str(run), str(tmp_path / "x.pt"), "--sigma-rel", "0.08", "--step", "9"]) == 3
    assert "no saved power average up to step 9: the first is of 10" in capsys.readouterr().err


def test_list(long, capsys):
    run, _ = long
    assert main(["posthoc", str(run), "--list"]) == 0
    told = capsys.readouterr().out
    assert "short    0.0500     10, 20, 30, ..., 180, 190, 200 (20)" in told
    assert "long     0.1000" in told
    assert "at step 200" in told
    rows = {line.split()[0]: line.split()[1] for line in told.splitlines() if line.strip().startswith("0.")}
    assert float(rows["0.05"]) == 0
    assert float(rows["0.10"]) == 0
    assert 0 < float(rows["0.12"]) < 1 < float(rows["0.28"])


def test_plot(long, tmp_path, capsys, monkeypatch):
    run, _ = long
    picture = tmp_path / "profile.png"
    assert main(["posthoc", str(run), "--sigma-rel", "0.12", "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "the profile is off by" in capsys.readouterr().out
    assert main(["posthoc", str(run), "--sigma-rel", "0.12", "--plot", str(tmp_path / "x.docx")]) == 2
    assert "no picture has the ending '.docx'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["profile.png"]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["posthoc", str(run), str(tmp_path / "o.pt"), "--sigma-rel", "0.12", "--plot", str(picture)]) == 2
    assert how_to_install("matplotlib") in capsys.readouterr().err
    assert not (tmp_path / "o.pt").exists()
    assert main(["posthoc", str(run), str(tmp_path / "o.pt"), "--sigma-rel", "0.12"]) == 0, "only a picture needs it"


def test_far_from_what_was_saved(long, tmp_path, capsys):
    run, _ = long
    assert main(["posthoc", str(run), str(tmp_path / "x.pt"), "--sigma-rel", "0.28"]) == 0
    assert "the profile is missed by" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{run}", "x.pt"], "--sigma-rel is needed"),
        (["{run}", "--sigma-rel", "0.1"], "OUT is needed"),
        (["{run}", "x.pt", "--sigma-rel", "0.3"], "sigma_rel=0.3): must be a number"),
        (["{run}", "x.pt", "--sigma-rel", "-0.1"], "sigma_rel=-0.1): must be a number"),
        (["{run}", "x.pt", "--sigma-rel", "nan"], "sigma_rel=nan): must be a number"),
        (["{run}", "{run}/step-10", "--sigma-rel", "0.1"], "choose another place"),
        (["{run}", "{run}/mixed", "--sigma-rel", "0.1"], "choose another place"),
    ],
)
def test_what_cannot_be_asked(arguments, says, long, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["posthoc", *(argument.format(run=long[0]) for argument in arguments)]) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# -- what lies in a folder ---------------------------------------------------------------------------------------------


def small(folder: Path) -> Path:
    train(folder, {"one": PowerAverage(2), "three": PowerAverage(4), "ema": EMA(decay=0.5)}, 4, (2, 3, 4))
    return folder


def tear(kind: str, save: Path) -> None:
    if kind == "cut short":
        piece = next(save.glob("*.distcp"))
        piece.write_bytes(piece.read_bytes()[:-200])
    elif kind == "still being written":
        (save / "manifest.json").unlink()
        save.rename(save.with_name(save.name + ".incoming"))
    elif kind == "without an index":
        (save / ".metadata").unlink()
        (save / "manifest.json").unlink()
    elif kind == "another manifest":
        manifest = json.loads((save / "manifest.json").read_text())
        (save / "manifest.json").write_text(json.dumps({**manifest, "step": 7}))
    else:
        (save / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    "kind", ["cut short", "still being written", "without an index", "another manifest", "a manifest that is none"]
)
def test_a_torn_save_is_passed_over_with_a_word(kind, tmp_path, capsys):
    run = small(tmp_path / "run")
    tear(kind, run / "step-3")
    assert posthoc(run, "x.pt", "--sigma-rel", repr(PowerAverage(3).sigma_rel)) == 0
    assert "step-3' is passed over: " in capsys.readouterr().err
    assert weights_of(tmp_path / "x.pt") == pytest.approx([-0.0825741, 0.0381610, 0.5640654, 0.4803477], abs=5e-8)


def test_all_are_torn(tmp_path, capsys):
    run = small(tmp_path / "run")
    for step in (2, 3, 4):
        tear("cut short", run / f"step-{step}")
    assert posthoc(run, "x.pt", "--sigma-rel", "0.1") == 3
    assert "no saved power averages" in capsys.readouterr().err


def test_a_save_that_was_interrupted_while_it_took_its_name(tmp_path, capsys):
    """It is whole under its other name."""
    run = small(tmp_path / "run")
    (run / "step-4").rename(run / "step-4.incoming")
    (run / "step-2").rename(run / "step-2.outgoing")
    assert posthoc(run, "x.pt", "--sigma-rel", repr(PowerAverage(3).sigma_rel)) == 0
    assert len(weights_of(tmp_path / "x.pt")) == 6
    assert capsys.readouterr().err == ""


def test_a_damaged_value_is_refused_when_it_is_read(tmp_path, capsys):
    run = small(tmp_path / "run")
    piece = next((run / "step-4").glob("*.distcp"))
    data = bytearray(piece.read_bytes())
    at = data.index(load_averaged_state_dict(run / "step-4", "one")["embed.weight"].numpy().tobytes()[:16])
    data[at] ^= 1
    piece.write_bytes(data)
    assert posthoc(run, "x.pt", "--sigma-rel", "0.1") == 3
    assert "damaged" in capsys.readouterr().err
    assert not (tmp_path / "x.pt").exists()


def test_saves_deeper_down_links_and_other_things(tmp_path, capsys):
    """One save under two names counts once; checkpoints without averages, and saves before an update, not at all."""
    run = small(tmp_path / "run" / "a" / "snapshots")
    (run / "latest").symlink_to(run / "step-4")
    shutil.copytree(run / "step-2", tmp_path / "run" / "copy")
    ShardedAverage(Net(), {"one": PowerAverage(2)}).save(tmp_path / "run" / "early")
    torch.distributed.checkpoint.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "run" / "training")
    (tmp_path / "run" / "notes.txt").write_text("lr 0.1")
    series = Series.found_in(tmp_path / "run")
    assert series.torn == {}
    assert [(s.step, s.name) for s in series.power_averages()] == [(t, n) for t in (2, 3, 4) for n in ("one", "three")]


def test_equal_weights_are_a_power_too(tmp_path):
    train(tmp_path / "run", {"swa": SWA(), "three": PowerAverage(4)}, 4, (2, 4))
    assert posthoc(tmp_path / "run", "x.pt", "--sigma-rel", "0.2886") == 0
    swa = load_averaged_state_dict(tmp_path / "run" / "step-4", "swa")["embed.weight"]
    torch.testing.assert_close(load_averaged_state_dict(tmp_path / "x.pt")["embed.weight"], swa, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("rules", "says"),
    [({"ema": EMA(decay=0.5)}, "no saved power averages"), ({"half": PowerAverage(0.5)}, "above 1/2")],
)
def test_nothing_to_mix(rules, says, tmp_path, capsys):
    train(tmp_path / "run", rules, 2, (2,))
    assert posthoc(tmp_path / "run", "x.pt", "--sigma-rel", "0.1") == 3
    assert says in capsys.readouterr().err
    assert posthoc(tmp_path / "nothing", "x.pt", "--sigma-rel", "0.1") == 3
    assert "is no folder" in capsys.readouterr().err


def test_two_runs_are_told_apart(tmp_path, capsys):
    late = Schedule(start_step=2)
    for folder, rules, steps, when in (
        ("began later", {"one": PowerAverage(2)}, (4,), late),
        ("one run", {"three": PowerAverage(4)}, (2, 4), None),
    ):
        train(tmp_path / "run" / folder, rules, 4, steps, schedule=when)
    assert posthoc(tmp_path / "run", "x.pt", "--sigma-rel", "0.1") == 3
    assert "they began at different times" in capsys.readouterr().err
    train(tmp_path / "run" / "again", {"one": PowerAverage(2)}, 4, (4,))
    with pytest.raises(CheckpointError, match="these are two runs"):
        Series.found_in(tmp_path / "run")
    train(tmp_path / "anew" / "a", {"one": PowerAverage(2)}, 3, (3,))
    train(tmp_path / "anew" / "b", {"one": PowerAverage(2)}, 4, (4,), schedule=Schedule(start_step=3))
    with pytest.raises(CheckpointError, match="began anew"):
        Series.found_in(tmp_path / "anew").power_averages()


def test_what_ranks_read(long):
    """What a load on ranks is made of: saves, coefficients, and pieces of tensors."""
    run, live = long
    snapshots, mixture = Series.found_in(run).mixed(0.08, step=150)
    assert snapshots[-1].step == 150
    total = sum(
        coefficient * snapshot.source().read("embed.weight")
        for coefficient, snapshot in zip(mixture.coefficients, snapshots, strict=True)
    )
    expected = power_average([live[t] for t in range(1, 151)], gamma_of(0.08) + 1)
    assert (total - expected).norm() < 0.003 * expected.norm()
