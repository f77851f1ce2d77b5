"""The example as a job of two machines: two torchrun agents that meet through a c10d rendezvous, two ranks each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.launch import EXAMPLES, free_port, run_agents, run_python

TIMEOUT_S = 400.0  # on an idle machine of two cores 25 s


@pytest.mark.own_processes
@pytest.mark.timeout(2 * TIMEOUT_S + 100)
def test_two_agents_of_two_ranks_agree_with_a_fresh_process(tmp_path: Path) -> None:
    out, port = tmp_path / "out", free_port()
    agents = [
        [
            "--nnodes=2",
            f"--node_rank={node}",
            "--nproc_per_node=2",
            "--rdzv_backend=c10d",
            "--rdzv_id=demo",
            f"--rdzv_endpoint=127.0.0.1:{port}",
            "--local_addr=127.0.0.1",  # what the other machine's ranks connect to
            *[str(EXAMPLES / "text_fsdp2.py"), "--tiny", "--steps=4", f"--out={out}"],
        ]
        for node in range(2)
    ]
    jobs = run_agents(agents, tmp_path, timeout_s=TIMEOUT_S)
    everything = "\n".join(f"--- agent {node}\n{job.output}" for node, job in enumerate(jobs))
    assert [job.code for job in jobs] == [0, 0], everything
    assert everything.count("\nreproduced, ") == 1  # rank 0 alone asks a fresh process, wherever it runs
    assert len(json.loads((out / "result.json").read_text())["holdings"]) == 4
    again = run_python([str(EXAMPLES / "text_verify.py"), str(out)], tmp_path, timeout_s=TIMEOUT_S)
    assert again.code == 0, again.output
