"""The example, as a stranger runs it: every engine, and what happens when the exported file is not the average."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from .launch import EXAMPLES, Finished, run_agents, run_python

SCRIPT = EXAMPLES / "text_fsdp2.py"
VERIFY = EXAMPLES / "text_verify.py"
TIMEOUT_S = {"torch": 150.0, "deepspeed": 400.0}  # on an idle machine 10 s; DeepSpeed builds its op once

pytestmark = [pytest.mark.own_processes, pytest.mark.timeout(TIMEOUT_S["deepspeed"] + 200)]


def run_example(out: Path, *arguments: str, ranks: int = 2, script: Path = SCRIPT, kind: str = "torch") -> Finished:
    command = ["--standalone", f"--nproc_per_node={ranks}", str(script), "--tiny", "--out", str(out), *arguments]
    return run_agents([command], out.parent, timeout_s=TIMEOUT_S[kind])[0]


def verify(out: Path) -> Finished:
    return run_python([str(VERIFY), str(out)], out.parent, timeout_s=TIMEOUT_S["torch"])


def parameter_bytes(state: dict[str, Any]) -> int:
    """Of each tensor once: `head.weight` is tied to `bytes.weight`."""
    return sum(tensor.nbytes for name, tensor in state.items() if name != "head.weight")


@pytest.mark.parametrize(
    ("engine", "ranks"),
    [("ddp", 2), ("fsdp1", 2), ("fsdp2", 2), ("fsdp2", 3), ("zero1", 2), ("zero2", 2), ("zero3", 2)],
)
def test_engine_trains_and_a_fresh_process_reproduces_its_average(engine: str, ranks: int, tmp_path: Path) -> None:
    kind = "deepspeed" if engine.startswith("zero") else "torch"
    if importlib.util.find_spec(kind) is None:
        pytest.skip(f"{kind} is not installed")
    out = tmp_path / "out"
    job = run_example(out, "--engine", engine, "--steps", "4", ranks=ranks, kind=kind)
    assert job.code == 0, job.output
    assert "\nreproduced, " in job.output
    result = json.loads((out / "result.json").read_text())
    assert result["averaged"] != result["raw"]
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


def test_verification_refuses_a_damaged_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_example(out, "--engine", "ddp", "--steps", "2", ranks=1).code == 0
    assert verify(out).code == 0
    weights = torch.load(out / "averaged.pt", weights_only=True)
    missing = weights.pop("blocks.0.up.bias")
    torch.save(weights, out / "averaged.pt")
    damaged = verify(out)
    assert damaged.code != 0
    assert "Missing key(s)" in damaged.output
    torch.save(weights | {"blocks.0.up.bias": missing + 0.1}, out / "averaged.pt")
    changed = verify(out)
    assert changed.code == 1
    assert "NOT REPRODUCED" in changed.output
