"""The example, as a stranger runs it: every engine, and what happens when the exported file is not the average."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from sharded_avg import load_averaged_state_dict
from tests.helpers.further import covered_by
from tests.helpers.launch import EXAMPLES, Finished, free_port, run_agents, run_python

SCRIPT = EXAMPLES / "text_fsdp2.py"
TIMEOUT_S = {"torch": 300.0, "deepspeed": 500.0}  # on an idle machine 10 s; DeepSpeed builds its op once

STEPS = 4

pytestmark = [pytest.mark.own_processes, pytest.mark.timeout(TIMEOUT_S["deepspeed"] + 200)]


def run_example(out: Path, *arguments: str, ranks: int = 2, script: Path = SCRIPT, kind: str = "torch") -> Finished:
    command = ["--standalone", f"--nproc_per_node={ranks}", str(script), "--tiny", "--out", str(out), *arguments]
    return run_agents([command], out.parent, timeout_s=TIMEOUT_S[kind])[0]


def import_example(name: str) -> Any:
    """A script of the examples, as a module; its own imports look beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        return importlib.import_module(name)


def parameter_bytes(state: dict[str, Any]) -> int:
    """Of each tensor once: `head.weight` is tied to `bytes.weight`."""
    return sum(tensor.nbytes for name, tensor in state.items() if name != "head.weight")


@functools.cache
def trained_alone(ranks: int) -> tuple[float, float]:
    """Raw and averaged validation loss of the same training in one process, its average made of whole tensors."""
    text_fsdp2 = import_example("text_fsdp2")
    shape, (text, held_out) = text_fsdp2.TINY, text_fsdp2.split()
    torch.manual_seed(0)
    model = text_fsdp2.GPT(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=text_fsdp2.LEARNING_RATE)
    streams = [
        text_fsdp2.random_batches(text, shape.context, text_fsdp2.BATCH_SIZE, seed=0, rank=rank)
        for rank in range(ranks)
    ]
    average: dict[str, torch.Tensor] = {}
    for n in range(STEPS):
        optimizer.zero_grad()
        torch.stack([model(next(stream)) for stream in streams]).mean().backward()
        optimizer.step()
        for name, live in model.state_dict().items():
            before = average.get(name, live)
            average[name] = before + (live - before) * (1 - min(0.98, (1 + n) / (10 + n)))
    batches = text_fsdp2.validation_batches(held_out, shape.context, text_fsdp2.VALIDATION_BATCH_SIZE, 4)
    raw = text_fsdp2.validation_loss(model, batches)
    model.load_state_dict(average)
    return raw, text_fsdp2.validation_loss(model, batches)


@pytest.mark.parametrize(
    ("engine", "ranks"),
    covered_by(
        [("fsdp2", 3), ("zero3", 2)],  # what they are in our hands is what test_contract.py and others ask
        [("ddp", 2), ("fsdp1", 2), ("fsdp2", 2), ("fsdp2", 3), ("zero1", 2), ("zero2", 2), ("zero3", 2)],
    ),
)
def test_engine_trains_and_a_fresh_process_reproduces_its_average(engine: str, ranks: int, tmp_path: Path) -> None:
    kind = "deepspeed" if engine.startswith("zero") else "torch"
    if importlib.util.find_spec(kind) is None:
        pytest.skip(f"{kind} is not installed")
    out = tmp_path / "out"
    job = run_example(out, "--engine", engine, "--steps", str(STEPS), ranks=ranks, kind=kind)
    assert job.code == 0, job.output
    assert "\nreproduced, " in job.output
    assert "average holds the same bits" in job.output
    result = json.loads((out / "result.json").read_text())
    assert (result["raw"], result["averaged"]) == pytest.approx(trained_alone(ranks), abs=1e-5)
    total = parameter_bytes(torch.load(out / "averaged.pt", weights_only=True))
    averages = [holding["average_bytes"] for holding in result["holdings"]]
    assert len(averages) == ranks
    assert sum(averages) == total  # fp32, each element on one rank only, tied weights once
    assert (out / "average").is_dir()
    assert (out / "curves.png").stat().st_size > 1000 or importlib.util.find_spec("matplotlib") is None


def test_an_export_of_other_weights_fails_the_job(tmp_path: Path) -> None:
    script = tmp_path / "wrong_export.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r})\n"
        "import torch, text_fsdp2\n"
        "honest = text_fsdp2.export\n"
        "def export(average, out):\n"
        "    honest(average, out)\n"
        "    weights = torch.load(out / 'averaged.pt')\n"
        "    weights['norm.weight'][0] += 0.1\n"
        "    torch.save(weights, out / 'averaged.pt')\n"
        "text_fsdp2.export = export\n"
        "text_fsdp2.main()\n"
    )
    job = run_example(tmp_path / "out", "--engine", "ddp", "--steps", "2", ranks=1, script=script)
    assert job.code == 1, job.output
    assert "NOT REPRODUCED" in job.output


def test_verification_refuses_a_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["text_verify.py", str(tmp_path)])
    text_verify = import_example("text_verify")
    weights = write_honest_result(tmp_path, text_verify)
    text_verify.main()
    assert "reproduced, to the bit" in capsys.readouterr().out
    torch.save(weights | {"blocks.0.up.bias": weights["blocks.0.up.bias"] + 0.1}, tmp_path / "averaged.pt")
    with pytest.raises(SystemExit, match="NOT REPRODUCED"):
        text_verify.main()
    del weights["blocks.0.up.bias"]
    torch.save(weights, tmp_path / "averaged.pt")
    with pytest.raises(RuntimeError, match=r"Missing key\(s\)"):
        text_verify.main()


def write_honest_result(folder: Path, verify: Any) -> dict[str, torch.Tensor]:
    """What a job leaves behind, from a plain model."""
    shape = verify.Shape(context=8, width=8, num_layers=1, num_heads=1)
    torch.manual_seed(0)
    model = verify.GPT(shape)
    batches = verify.validation_batches(verify.split()[1], shape.context, 4, 2)
    result = {"shape": asdict(shape), "batch_size": 4, "num_batches": 2, "num_threads": torch.get_num_threads()}
    (folder / "result.json").write_text(json.dumps(result | {"averaged": verify.validation_loss(model, batches)}))
    torch.save(model.state_dict(), folder / "averaged.pt")
    return model.state_dict()


def test_which_rule(tmp_path: Path) -> None:
    """Every rule under every learning rate: that it runs, on a toy."""
    command = [str(EXAMPLES / "which_rule.py"), "--tiny", "--steps", "8", "--seeds", "1"]
    done = run_python(command, tmp_path, timeout_s=200)
    assert done.code == 0, done.output
    which_rule = import_example("which_rule")
    names = [name.replace("@", ".") for name in (*which_rule.whole_run(8), *which_rule.last_part(8))]
    assert all(done.output.count(f" {name} ") == len(which_rule.RATES) for name in names)


@pytest.mark.further
def test_posthoc_text(tmp_path: Path) -> None:
    """Each width is tried; what is mixed for the width that was kept as well has its loss; the best is in the file."""
    out, posthoc = tmp_path / "out", import_example("posthoc_text")
    job = run_example(out, "--steps", "32", script=EXAMPLES / "posthoc_text.py")
    assert job.code == 0, job.output
    losses = dict(re.findall(r"^ +(0\.\d{3}) +(\d\.\d{4}) +\d+\.\d\d %", job.output, re.MULTILINE))
    assert [float(width) for width in losses] == list(posthoc.SWEEP)
    ((kept, mixed),) = re.findall(rf"kept at {posthoc.CHECKED}: (\S+); mixed out of the saves: (\S+)", job.output)
    assert float(kept) == pytest.approx(float(mixed), abs=0.05)
    model = posthoc.GPT(posthoc.SHAPE)
    model.load_state_dict(torch.load(out / "best.pt", weights_only=True))
    batches = posthoc.validation_batches(posthoc.split()[1], posthoc.SHAPE.context, 64, 4)
    assert posthoc.validation_loss(model, batches) == pytest.approx(min(map(float, losses.values())), abs=1e-4)
    assert len(list((out / "snapshots").iterdir())) == posthoc.NUM_SAVES


@pytest.mark.further
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_deepspeed_text(launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R30: both launchers; then three ranks go on where two were, with a checkpoint that DeepSpeed has converted."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    script, out = EXAMPLES / "deepspeed_text.py", tmp_path / "out"
    arguments = [str(script), "--tiny", "--steps", "3", "--out", str(out)]
    if launcher == "deepspeed":
        port = ["--master_port", str(free_port())]
        launch = ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", *port]
        job = run_python([*launch, *arguments], tmp_path, timeout_s=TIMEOUT_S["deepspeed"])
    else:
        job = run_example(out, "--steps", "3", script=script, kind="deepspeed")
    assert job.code == 0, job.output
    assert "accumulation, 2 ranks, step 3" in job.output
    full = torch.load(out / "averaged.pt", weights_only=True)
    low = torch.load(out / "averaged_16bit.bin", weights_only=True)
    assert all(torch.equal(low[name], value.to(low[name].dtype)) for name, value in full.items())
    saved = load_averaged_state_dict(out / "average")
    assert all(torch.equal(saved[name], full[name]) for name in saved)
    if launcher == "torchrun":
        folders = ["--input_folder", str(out / "checkpoint/last"), "--output_folder", str(out / "checkpoint/universal")]
        convert = ["-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state", *folders]
        assert run_python(convert, tmp_path, timeout_s=100).code == 0
        job = run_example(out, "--steps", "2", "--resume", ranks=3, script=script, kind="deepspeed")
        assert job.code == 0, job.output
        assert "accumulation, 3 ranks, step 5" in job.output


@pytest.mark.parametrize("script", covered_by(["deepspeed_text.py"], ["deepspeed_text.py", "text_fsdp2.py"]))
def test_what_a_launcher_passes_is_taken(script: str, tmp_path: Path) -> None:
    """R30: `--local_rank`; without a launcher, both are named."""
    job = run_python([str(EXAMPLES / script), "--local_rank=0"], tmp_path, timeout_s=100)
    assert job.code == 2
    assert "unrecognized" not in job.output
    assert "torchrun" in job.output
    assert "deepspeed" in job.output
