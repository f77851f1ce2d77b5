"""The command line: what it prints, its exit codes, and what is left when it is interrupted."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from sharded_avg import EMA, SWA, Schedule, ShardedAverage
from sharded_avg.commands.arguments import num_bytes
from sharded_avg.commands.cli import main
from sharded_avg.commands.sums.shares import told_by
from sharded_avg.files import sinks
from sharded_avg.files.stored import Stored, StoredFile
from sharded_avg.formats.open import open_source
from sharded_avg.saved.folder import from_source
from sharded_avg.shard import Box

from .test_consolidate import sparse_folder

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")
COMMAND = [sys.executable, "-m", "sharded_avg"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    net = nn.Linear(3, 5)
    average = ShardedAverage(net, {"ema": EMA(decay=0.5), "swa": SWA()})
    average.update()
    average.save(tmp_path / "average")
    return tmp_path / "average"


def test_inspect_for_programs(saved, capsys):
    assert main(["inspect", str(saved), "--json", "--tensors"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == "sharded_avg"
    assert found["step"] == 1
    assert {name: record["n_averaged"] for name, record in found["averages"].items()} == {"ema": 1, "swa": 1}
    assert found["averages"]["ema"]["rule"]["decay"] == 0.5
    assert {name: (record["decay"], record["horizon"]) for name, record in found["averages"].items()} == {
        "ema": (0, 1),
        "swa": (0, 1),
    }  # of the first update, which copies
    assert (found["num_tensors"], found["num_parameters"], found["num_bytes"]) == (2, 20, 80)
    assert found["dtypes"] == ["float32"]
    assert found["tensors"]["weight"] == {"shape": [5, 3], "dtype": "float32"}


def test_inspect_for_people(saved, tmp_path, capsys):
    assert main(["inspect", str(saved)]) == 0
    text = capsys.readouterr().out
    assert "ema      1        EMA(decay=0.5, warmup=False)" in text
    assert "2 (20 numbers, 80 bytes, float32)" in text
    assert "weight" not in text
    torch.save(nn.Linear(3, 5).state_dict(), tmp_path / "plain.pt")
    assert main(["inspect", str(tmp_path / "plain.pt"), "--tensors"]) == 0
    text = capsys.readouterr().out
    assert "plain weights" in text
    assert "weight  [5, 3]  float32" in text


def test_inspect_tells_decay_and_horizon(tmp_path, capsys):
    """As the average that was saved tells them."""
    net = nn.Linear(3, 5)
    rules = {"ema": EMA(decay=0.9, warmup=True), "swa": SWA(), "step": EMA.from_half_life(3)}
    average = ShardedAverage(net, rules, schedule=Schedule(every_steps=2))
    for _ in range(14):
        average.update()
    average.save(tmp_path / "average")
    assert main(["inspect", str(tmp_path / "average"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["averages"]
    for name in ("ema", "swa", "step"):
        assert found[name]["decay"] == pytest.approx(average.decay(name))
        assert found[name]["horizon"] == pytest.approx(average.horizon(name))
    assert found["swa"]["horizon"] == pytest.approx(7)
    assert main(["inspect", str(tmp_path / "average"), "--json", "--profile"]) == 0
    profiled = json.loads(capsys.readouterr().out)["averages"]
    assert "profile" not in found["ema"]
    for name in rules:
        assert profiled[name]["profile"] == [pytest.approx(list(stretch)) for stretch in average.profile(name)]
    assert main(["inspect", str(tmp_path / "average"), "--profile"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"steps +share of swa\n +2..3 +14.3 %\n", told)
    assert re.search(r"average +updates +rule +decay +horizon", told)
    assert re.search(r"swa +7 +SWA\(\) +0.857143 +7\n", told)
    assert main(["inspect", str(tmp_path / "average"), "--plot", str(tmp_path / "shares.svg")]) == 0
    assert len(re.findall("<path", (tmp_path / "shares.svg").read_text())) > len(rules)
    assert main(["inspect", str(tmp_path / "average"), "--plot", str(tmp_path / "shares.doc")]) == 2
    assert "no picture has the ending" in capsys.readouterr().err
    torch.save(net.state_dict(), tmp_path / "plain.pt")
    assert main(["inspect", str(tmp_path / "plain.pt"), "--plot", str(tmp_path / "shares.svg")]) == 2
    assert "is it known what it is made of" in capsys.readouterr().err
    for rule in ({"kind": "of a later version"}, {"kind": "EMA", "decay": 7}, {"kind": "CustomRule", "function": "f"}):
        assert told_by({"rule": rule, "n_averaged": 7, "updates": [[2, 14, 2]]}) == {}


def test_a_horizon_that_would_take_for_ever(tmp_path):
    """Files say what they like."""
    assert told_by({"rule": {"kind": "SWA"}, "n_averaged": 10**15, "updates": []}).keys() == {"decay"}
    assert told_by({"rule": {"kind": "SWA"}, "n_averaged": 3, "updates": "nonsense"}) == {}


def test_inspect_before_the_first_update(tmp_path, capsys):
    ShardedAverage(nn.Linear(3, 5), SWA()).save(tmp_path / "early")
    assert main(["inspect", str(tmp_path / "early")]) == 0
    assert "none yet" in capsys.readouterr().out


def test_exit_codes(saved, tmp_path, capsys):
    out = str(tmp_path / "x.safetensors")
    assert main(["consolidate", str(saved), out, "--name", "ema"]) == 0
    assert main(["consolidate", str(saved), out]) == 3  # two averages, and none was named
    assert "['ema', 'swa']" in capsys.readouterr().err
    assert main(["consolidate", str(tmp_path / "not there"), out]) == 3
    assert main(["consolidate", str(saved), str(saved / "x.pt"), "--name", "ema"]) == 2  # into the source
    assert main(["consolidate", str(saved), out, "--name", "ema", "--max-shard-size", "1GB"]) == 2
    assert main(["merge", str(saved), str(tmp_path / "m"), "--name", "ema", "--lawa", "2"]) == 2  # one source
    ShardedAverage(nn.Linear(3, 5), SWA()).save(tmp_path / "early")
    assert main(["consolidate", str(tmp_path / "early"), out]) == 3
    assert "no update" in capsys.readouterr().err
    for usage in ([], ["nonsense"], ["consolidate", "a"], ["merge", "a", "b"], ["merge", "a", "b", "--wsm", "cosine"]):
        with pytest.raises(SystemExit) as stopped:
            main(usage)
        assert stopped.value.code == 2
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0


@pytest.mark.skipif(os.geteuid() == 0 or not Path("/dev/full").exists(), reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(saved, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    assert main(["consolidate", str(saved), str(closed / "x.pt"), "--name", "ema"]) == 1


def test_a_disk_that_fails(saved, tmp_path, monkeypatch, capsys):
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sinks, "_write_tensor", fail)
    assert main(["consolidate", str(saved), str(tmp_path / "x.pt"), "--name", "ema"]) == 1
    assert "No space left" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "count"), [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("2GiB", 2**31), ("1.5kB", 1500), ("7", 7)]
)
def test_sizes(text, count):
    assert num_bytes(text) == count


@pytest.mark.parametrize("text", ["", "0GB", "5XB", "-1", "GB"])
def test_sizes_that_are_none(text):
    with pytest.raises(Exception, match="no size"):
        num_bytes(text)


def test_quiet_in_a_pipe(saved, tmp_path, capfd):
    assert main(["consolidate", str(saved), str(tmp_path / "x.pt"), "--name", "ema"]) == 0
    assert tuple(capfd.readouterr()) == ("", "")


def test_a_bar_on_a_terminal(saved, tmp_path, monkeypatch):
    """Also on one that does not say how large it is, as in many containers."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert main(["consolidate", str(saved), str(tmp_path / "x.pt"), "--name", "ema"]) == 0
        terminal.flush()
        shown = ""
        while "100%" not in shown:  # a terminal hands out what has arrived so far
            shown += os.read(ours, 10_000).decode()
    os.close(ours)
    assert "80.0/80.0" in shown
    assert "B/s" in shown


def test_without_tqdm_there_is_no_bar(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(["consolidate", str(saved), str(tmp_path / "x.pt"), "--name", "ema"]) == 0
    assert tuple(capsys.readouterr()) == ("", "")


def test_a_reader_that_leaves_early(saved):
    command = f"{sys.executable} -m sharded_avg inspect {saved} --json | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "{\n", "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("command", ["consolidate x.safetensors", "consolidate x.pt", "consolidate hf", "merge ours"])
@pytest.mark.parametrize("at_read", [1, 3])
def test_interrupted(saved, tmp_path, monkeypatch, capsys, command, at_read, number, code):
    """The signal comes while tensors are being written: nothing is left under the name, nor beside it."""
    reads = 0
    read = StoredFile.read_into

    def read_and_stop(self: StoredFile, target: torch.Tensor, stored: Stored, box: Box) -> None:
        nonlocal reads
        reads += 1
        if reads == at_read:
            signal.raise_signal(number)
        read(self, target, stored, box)

    monkeypatch.setattr(StoredFile, "read_into", read_and_stop)
    whole = sinks.slabs
    for module in (sinks, from_source):
        monkeypatch.setattr(module, "slabs", lambda info: whole(info, max_bytes=16))
    out = tmp_path / "out"
    out.mkdir()
    kind, name = command.split()
    extra = ["--uniform"] if kind == "merge" else []
    assert main([kind, str(saved), str(out / name), "--name", "ema", *extra]) == code
    assert "nothing was written" in capsys.readouterr().err
    assert not [path for path in out.rglob("*") if path.is_file()]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_interrupted_in_a_process_of_its_own(tmp_path):
    sparse_folder(tmp_path / "big", (2**20, 511), torch.float32)
    out = tmp_path / "out"
    out.mkdir()
    arguments = ["consolidate", str(tmp_path / "big"), str(out / "x.safetensors"), "--name", "model"]
    process = subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 100
        while not any(path.stat().st_size > 2**20 for path in out.iterdir()):
            assert process.poll() is None, "it was done before it could be interrupted"
            assert time.monotonic() < deadline, "it did not begin"
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert told == "sharded-avg: interrupted; nothing was written\n"
    assert not list(out.iterdir())


@pytest.mark.each_value
@pytest.mark.parametrize("weights", ["-2,3", "-2.5,3.5", "-.5,1.5", "3,-2", "-1e0,2", "-2, 3"])
@pytest.mark.parametrize("joined", [False, True])
def test_negative_numbers(weights, joined, tmp_path):
    """R18: a list of numbers may begin with a dash, with a space before it or an equals sign."""
    for number in (1, 2):
        torch.save({"w": torch.full((2,), float(number))}, tmp_path / f"{number}.pt")
    option = [f"--weights={weights}"] if joined else ["--weights", weights]
    assert main(["merge", str(tmp_path / "1.pt"), str(tmp_path / "2.pt"), str(tmp_path / "x.pt"), *option]) == 0
    first, second = map(float, weights.split(","))
    expected = torch.full((2,), (first * 1 + second * 2) / (first + second))
    torch.testing.assert_close(open_source(tmp_path / "x.pt").read("w"), expected)


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--lawa", "-2", "between 1 and 1"),
        ("--lawa", "-2.5", "invalid int value"),
        ("--weights", "-inf,1", "finite numbers"),
        ("--weights", "-nan", "finite numbers"),
        ("--weights", "1,x", "no list of numbers: write 1,1,2 or -2,3"),
        ("--weights", "-2,,3", "no list of numbers"),
        ("--max-shard-size", "-5GB", "no size"),
        ("--n-averaged", "-3", "at least one update"),
        ("--n-averaged", "-3e0", "invalid int value"),
    ],
)
def test_numbers_that_cannot_be(option, value, says, saved, tmp_path, capsys):
    """R18: every option that takes numbers says what is wrong with the number, not that it is missing."""
    command = {"--max-shard-size": "consolidate", "--n-averaged": "convert"}.get(option, "merge")
    try:
        code = main([command, str(saved), str(tmp_path / "out"), "--name", "ema", option, value])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert says in capsys.readouterr().err
