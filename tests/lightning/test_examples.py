"""The examples, as a stranger runs them: each strategy, and what happens when other weights are deployed."""

from __future__ import annotations

import difflib
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sharded_avg import load_averaged_state_dict
from tests.helpers.further import covered_by
from tests.helpers.launch import EXAMPLES, ROOT, run_agents, run_python

NAMES = ["single", "ddp", "fsdp", "fsdp2", "deepspeed"]
FOLDERS = ["fsdp", "fsdp2", "deepspeed"]  # whose checkpoints are folders
TIMEOUT_S = 240.0  # on an idle machine 10 s; DeepSpeed builds its op once
NUMBER = r"(\d\.\d+)"

pytestmark = [pytest.mark.own_processes, pytest.mark.timeout(2 * TIMEOUT_S)]


def measured(output: str, beginning: str) -> tuple[float, float]:
    """Loss and accuracy of the line that begins so."""
    (line,) = re.findall(rf"^{beginning}.*loss {NUMBER}, accuracy {NUMBER}$", output, re.MULTILINE)
    return float(line[0]), float(line[1])


def digits(name: str) -> Any:
    """A part of the examples, as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        return importlib.import_module(f"digits.{name}")


def check_run(name: str, out: Path, code: int, output: str) -> None:
    assert code == 0, output
    assert "FutureWarning" not in output
    (last,) = re.findall(rf"^ +7 +{NUMBER} +{NUMBER} +{NUMBER} +{NUMBER}$", output, re.MULTILINE)
    raw, _, averaged, accuracy = map(float, last)
    assert raw != averaged
    assert accuracy > 0.9
    verdict = "below" if averaged < raw else "NOT BELOW"
    assert f"the last averaged loss is {verdict} the raw one" in output
    in_training, deployed = measured(output, "measured in training"), measured(output, "deployed")
    assert deployed == pytest.approx(in_training, abs=1e-5)
    network, best = digits("network"), out / "best.ckpt"
    assert best.is_dir() == (name in FOLDERS)
    model = network.Digits()
    model.configure_model()
    model.load_state_dict(load_averaged_state_dict(best))
    assert network.evaluate(model) == pytest.approx(deployed, abs=1e-4)  # four digits are printed


@pytest.mark.parametrize("name", covered_by(("ddp", "fsdp2"), NAMES))  # they differ in one line: see below
def test_what_is_deployed_is_what_was_measured(name: str, tmp_path: Path) -> None:
    """P05, P07, P26: the best checkpoint holds the weights of the best metric, and no Trainer is needed to get them."""
    script, out = str(EXAMPLES / f"lightning_{name}.py"), tmp_path / "out"
    if name == "fsdp2":  # one of them as torchrun starts it
        (job,) = run_agents([["--standalone", "--nproc_per_node=2", script, str(out)]], tmp_path, timeout_s=TIMEOUT_S)
    else:
        job = run_python([script, str(out)], tmp_path, timeout_s=TIMEOUT_S)
    check_run(name, out, job.code, job.output)


@pytest.mark.further
@pytest.mark.parametrize("config", ["stage2_bf16", "stage3_hpz"])
def test_deepspeeds_own_json(config: str, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    path, out = EXAMPLES / "deepspeed" / f"{config}.json", tmp_path / "out"
    job = run_python([str(EXAMPLES / "deepspeed_lightning.py"), str(out), str(path)], tmp_path, timeout_s=TIMEOUT_S)
    assert job.code == 0, job.output
    in_training = float(re.findall(rf"^measured in bf16: averaged loss {NUMBER}$", job.output, re.MULTILINE)[0])
    deployed, accuracy = measured(job.output, "deployed in fp32: averaged")
    assert deployed == pytest.approx(in_training, rel=0.02)
    assert accuracy > 0.9


def test_other_weights_fail_the_example() -> None:
    network, report = digits("network"), digits("report")
    torch.manual_seed(0)
    model = network.Digits()
    model.configure_model()
    loss, accuracy = network.evaluate(model)
    table = report.Table()
    table.rows = [report.Row(0, 1.0, 0.5, loss, accuracy)]
    report.verify(model, table)
    model.layers[0].bias.data[0] += 0.1
    with pytest.raises(SystemExit, match="NOT THE SAME"):
        report.verify(model, table)


@pytest.mark.parametrize("name", NAMES[1:])
def test_they_differ_in_one_line(name: str) -> None:
    """Apart from what they say about themselves."""
    files = [EXAMPLES / f"lightning_{each}.py" for each in (NAMES[0], name)]
    first, second = (file.read_text().split('"""\n', maxsplit=1)[1].splitlines() for file in files)
    changed = [line for line in difflib.ndiff(first, second) if line[0] in "+-"]
    assert [line[0] for line in changed] == ["-", "+"]
    assert all("strategy, devices = " in line for line in changed)


def test_they_are_in_the_documentation() -> None:
    text = (ROOT / "docs" / "lightning.md").read_text()
    assert [name for name in NAMES if f"examples/lightning_{name}.py" not in text] == []
