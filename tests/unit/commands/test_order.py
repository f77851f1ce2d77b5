"""R15: which source is the older, and which are one and the same, however a shell has listed or spelt them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from sharded_avg import SWA, ShardedAverage
from sharded_avg.commands.cli import main
from sharded_avg.formats.open import load_averaged_state_dict, open_source

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")
STEPS = (10, 20, 100)
MEANS = {10: 5.5, 20: 10.5, 100: 50.5}  # of the weights 1, 2, ..., step
GLOB = (10, 100, 20)  # the order of a shell


@pytest.fixture
def run(tmp_path: Path) -> Path:
    model = nn.Linear(1, 1, bias=False)
    average = ShardedAverage(model, SWA())
    for step in range(1, STEPS[-1] + 1):
        model.weight.data.fill_(float(step))
        average.update()
        if step in STEPS:
            average.save(tmp_path / f"step-{step}")
    return tmp_path


def merged(run: Path, sources: list[str], *how: str, out: str = "x.safetensors") -> int:
    return main(["merge", *sources, str(run / out), *how])


def value_of(path: Path) -> float:
    return float(load_averaged_state_dict(path)["weight"])


@pytest.mark.parametrize("kind", ["folder", "x.safetensors", "x.pt"])
def test_a_window_ends_at_the_newest(kind, run, capsys):
    """R15: sorted by the steps that the sources record, in whatever kind of file; what differs is told."""
    paths = [run / f"step-{step}" for step in GLOB]
    if kind != "folder":
        files = [run / f"{step}{Path(kind).suffix}" for step in GLOB]
        for path, file in zip(paths, files, strict=True):
            assert main(["consolidate", str(path), str(file)]) == 0
        paths = files
    for how, expected in (
        (["--lawa", "1"], MEANS[100]),
        (["--lawa", "2"], (MEANS[20] + MEANS[100]) / 2),
        (["--wsm", "1-sqrt"], sum(w * MEANS[s] for w, s in zip(_wsm(3), STEPS, strict=True))),
    ):
        assert merged(run, [*map(str, paths)], *how) == 0
        names = f"{paths[0].name} (10), {paths[2].name} (20), {paths[1].name} (100)"
        assert f"in the order of their steps: {names}" in capsys.readouterr().err
        assert value_of(run / "x.safetensors") == pytest.approx(expected)
        facts = open_source(run / "x.safetensors").facts["provenance"]["sources"]
        assert [part["step"] for part in facts] == list(STEPS)


def _wsm(count: int) -> list[float]:
    kept = [1 - (i / count) ** 0.5 for i in range(count + 1)]
    shares = [kept[i] - kept[i + 1] for i in range(count)]
    return [1 - sum(shares[1:]), *shares[1:]]


def test_in_the_order_of_the_steps_nothing_is_told(run, capsys):
    assert merged(run, [str(run / f"step-{step}") for step in STEPS], "--lawa", "2") == 0
    assert capsys.readouterr().err == ""


def test_as_given(run, capsys):
    """R15: who wants another order can say so."""
    assert merged(run, [str(run / f"step-{step}") for step in GLOB], "--lawa", "1", "--as-given") == 0
    assert value_of(run / "x.safetensors") == MEANS[20]
    assert capsys.readouterr().err == ""


def test_weights_belong_to_the_sources_in_their_places(run):
    """R15: nothing is sorted where each number was given for one source."""
    assert merged(run, [str(run / f"step-{step}") for step in GLOB], "--weights", "1,0,0") == 0
    assert value_of(run / "x.safetensors") == MEANS[10]
    assert merged(run, [str(run / f"step-{step}") for step in GLOB], "--weights", "0,0,1") == 0
    assert value_of(run / "x.safetensors") == MEANS[20]


def plain(folder: Path, *names: str) -> list[str]:
    for number, name in enumerate(names):
        torch.save({"weight": torch.full((1,), float(number))}, folder / name)
    return [str(folder / name) for name in names]


def test_without_steps(tmp_path, capsys):
    """R15: as given, which is told; numbers in the names that say otherwise are not passed over."""
    assert merged(tmp_path, plain(tmp_path, "b.pt", "a.pt"), "--lawa", "1", out="x.pt") == 0
    assert "record no steps, and are taken as they are given, oldest first: b.pt, a.pt" in capsys.readouterr().err
    assert float(open_source(tmp_path / "x.pt").read("weight")) == 1
    assert merged(tmp_path, plain(tmp_path, "c-20.pt", "c-100.pt"), "--lawa", "1", out="x.pt") == 0
    assert merged(tmp_path, plain(tmp_path, "c-100.pt", "c-20.pt"), "--lawa", "1", out="y.pt") == 3
    assert "the numbers in their names are in another order" in capsys.readouterr().err
    assert not (tmp_path / "y.pt").exists()
    assert merged(tmp_path, plain(tmp_path, "c-100.pt", "c-20.pt"), "--wsm", "1-sqrt", out="y.pt") == 3
    assert merged(tmp_path, plain(tmp_path, "c-100.pt", "c-20.pt"), "--lawa", "1", "--as-given", out="y.pt") == 0
    assert merged(tmp_path, plain(tmp_path, "c-100.pt", "c-20.pt"), "--uniform", out="y.pt") == 0, "no order matters"
    assert merged(tmp_path, plain(tmp_path, "c-100.pt", "c-20.pt"), "--lawa", "2", out="y.pt") == 0
    assert merged(tmp_path, plain(tmp_path, "c-100.pt", "c-20.pt"), "--wsm", "linear", out="y.pt") == 0


def test_files_that_count_updates(tmp_path, capsys):
    """R15: torch's AveragedModel records no step, and how many updates it has had."""
    for name, count in (("c", 3), ("a", 100), ("b", 20)):
        state = {"n_averaged": torch.tensor(count), "module.weight": torch.full((1, 1), float(count))}
        torch.save(state, tmp_path / f"{name}.pt")
    assert merged(tmp_path, [str(tmp_path / f"{name}.pt") for name in "abc"], "--lawa", "1") == 0
    assert "in the order of their steps: c.pt (3), b.pt (20), a.pt (100)" in capsys.readouterr().err
    assert value_of(tmp_path / "x.safetensors") == 100


def test_equal_steps(tmp_path, capsys):
    """R15: averages of two runs at one step have no order, and so no last one."""
    for run, weight in enumerate((3.0, 5.0)):
        model = nn.Linear(1, 1, bias=False)
        model.weight.data.fill_(weight)
        average = ShardedAverage(model, SWA())
        average.update()
        average.save(tmp_path / f"run-{run}")
    sources = [str(tmp_path / "run-0"), str(tmp_path / "run-1")]
    assert merged(tmp_path, sources, "--lawa", "1") == 3
    assert "equal steps, run-0 (1), run-1 (1)" in capsys.readouterr().err
    assert merged(tmp_path, sources, "--uniform") == 0
    assert value_of(tmp_path / "x.safetensors") == 4


def test_some_steps_are_lacking(run, capsys):
    path = run / "plain.pt"
    torch.save({"weight": torch.zeros(1, 1)}, path)
    assert merged(run, [str(run / "step-10"), str(path)], "--lawa", "1", "--raw") == 3
    assert "some of these sources record no step, step-10 (10), plain.pt (None)" in capsys.readouterr().err


SPELLINGS = {
    "the same": lambda path: str(path),
    "a slash at the end": lambda path: f"{path}/",
    "dots": lambda path: f"{path.parent}/./{path.parent.name}/../{path.name}",
    "relative": lambda path: os.path.relpath(path),
}


@pytest.mark.each_value
@pytest.mark.parametrize(
    "how", [["--uniform"], ["--lawa", "2"], ["--wsm", "linear"], ["--wsm", "1-sqrt", "--as-given"]]
)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_one_source_twice(spelling, how, run, capsys, monkeypatch):
    """R15: it would count double, in silence."""
    monkeypatch.chdir(run.parent)
    spelt = SPELLINGS[spelling](run / "step-10")
    if spelling == "dots":
        spelt = f"{run}/step-20/../step-10"
    assert merged(run, [str(run / "step-10"), str(run / "step-20"), spelt], *how) == 2
    assert "are the same: give each source once" in capsys.readouterr().err
    assert not (run / "x.safetensors").exists()


@pytest.mark.parametrize("kind", ["symlink", "symlink above", "copy", "consolidated"])
def test_one_source_twice_by_another_name(kind, run, capsys):
    """R15: links, and copies of one save, also as another kind of file."""
    other = run / "other"
    if kind == "symlink":
        other.symlink_to(run / "step-10")
    elif kind == "symlink above":
        (run / "above").symlink_to(run)
        other = run / "above" / "step-10"
    elif kind == "copy":
        shutil.copytree(run / "step-10", other)
    else:
        other = run / "other.safetensors"
        assert main(["consolidate", str(run / "step-10"), str(other)]) == 0
    assert merged(run, [str(run / "step-10"), str(other)], "--uniform", out="x.pt") == 2
    assert "give each source once" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["hard link", "folder and file", "symlink"])
def test_plain_weights_twice(kind, tmp_path, capsys):
    """R15: a folder of Hugging Face's and the file in it are one."""
    (tmp_path / "hf").mkdir()
    file, other = tmp_path / "hf" / "model.safetensors", tmp_path / "other.safetensors"
    safetensors.torch.save_file({"weight": torch.ones(3)}, file)
    if kind == "hard link":
        os.link(file, other)
    elif kind == "symlink":
        other.symlink_to(file)
    else:
        other = tmp_path / "hf"
    assert merged(tmp_path, [str(file), str(other)], "--uniform", out="x.pt") == 2
    assert "are the same" in capsys.readouterr().err


def test_twice_on_purpose(run, capsys):
    """R15: with --weights somebody has said what each counts; a word, all the same."""
    sources = [str(run / f"step-{step}") for step in (10, 10, 20)]
    assert merged(run, sources, "--weights", "1,1,2") == 0
    assert "are the same: both count" in capsys.readouterr().err
    assert value_of(run / "x.safetensors") == 8
